"""Which configuration, or mean of two, segments held-out cases best: `python -m scripts find_best_configuration`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..data.checks import check_same_grid, label_indices
from ..data.datasets import Dataset
from ..data.images import read_image
from ..inference.ensemble import check_alike
from ..inference.ensemble_probabilities import MeanProbabilities
from ..utils.errors import UserError
from ..utils.files import check_writable, write_table, write_text
from ..utils.settings_table import SETTINGS
from .comparison import compared, mean_of_both
from .cross_validated import CrossValidated, Dice, mean_dice, read_cross_validated, require_comparable
from .metrics import ClassDice
from .postprocessing_search import search_postprocessing

DIGITS = 6  # of a Dice; what agrees in all of them is a tie
SCANS, MASKS = "SCANS", "MASKS"  # stand for folders in the commands
RUN = ("python", "-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json")


class Candidate(NamedTuple):
    """Holds one configuration, or two whose probabilities are averaged, and the Dice of their held-out cases."""

    members: tuple[CrossValidated, ...]
    dice: Dice

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def means(self) -> dict[str, float]:
        return mean_dice(self.dice, self.members[0].classes)

    @property
    def rank_key(self) -> tuple[float, int]:
        """The best first, nan last; of equals the one with fewer networks."""
        mean = self.means["mean"]
        return (math.inf if math.isnan(mean) else -round(mean, DIGITS)), len(self.members)


def find_best_configuration(dataset_dir: str, folders: Sequence[str], output_dir: str = "best") -> None:
    """Rank cross-validations, and the mean of each two, by the Dice of held-out cases; say how to use the best.

    Means need the probabilities that `cross_validate --save_probabilities True` keeps. Written are `ranking.csv`,
    `postprocessing.json`, decided for the best one, its masks in `predictions` if it is a mean, and `best.txt`: the
    ranking, how sure it is, and the commands that segment new scans with the best.

    Args:
        dataset_dir: the folder whose cases were held out.
        folders: those into which `cross_validate` scored, one a configuration.
        output_dir: for what is written.

    Raises:
        UserError: a cross-validation that is not finished, or two with other cases, folds or classes; no class occurs.
    """
    named = SETTINGS["ensemble"].of(folders, "folders")
    paths = [named] if isinstance(named, str) else named
    if len({Path(path).resolve() for path in paths}) < max(len(paths), 1):
        raise UserError(f"folders is {paths}; expected folders of cross-validations, each once, \"['a','b']\".")
    check_writable(output_dir)
    data = Dataset(dataset_dir)
    found = [read_cross_validated(path, data) for path in paths]
    require_comparable(found, data)
    ranked = sorted([*(Candidate((one,), one.dice) for one in found), *_pairs(found, data)], key=lambda c: c.rank_key)
    best = ranked[0]
    if math.isnan(best.means["mean"]):
        raise UserError(f"no class of {dataset_dir} has a Dice in {paths[0]}; expected cases with labels.")
    folder, lines = Path(output_dir), _ranking(ranked)
    write_table(folder / "ranking.csv", list(lines[0]), lines)
    search_postprocessing(
        str(_masks(best, folder)), data.cases, data.labels.indices_of(best.members[0].classes), data.labels,
        str(folder / "postprocessing.json"),
    )  # fmt: skip
    text = "\n".join([*_table(lines), "", *_doubts(ranked, found), "", *_how_to_use(best, folder), ""])
    write_text(folder / "best.txt", text)
    print(text + f"\nthis is in {folder / 'best.txt'}, the table in {folder / 'ranking.csv'}")


def _pairs(found: Sequence[CrossValidated], data: Dataset) -> Iterator[Candidate]:
    """Score the mean of each two configurations whose probabilities are there, with a reference read once."""
    pairs = list(combinations([one for one in found if not one.without_probabilities], 2))
    metric = ClassDice(data.labels.indices_of(found[0].classes), data.labels.ignore_index)
    dice: list[dict[tuple[str, str], float]] = [{} for _ in pairs]
    for case in tqdm(data.cases if pairs else (), desc="averaging", unit="case", disable=None):
        reference = read_image(case["label"])
        wanted = _batch(label_indices(reference, data.labels.file_values))
        for pair, scores in zip(pairs, dice, strict=True):
            mean = _mean_of(pair, case["case"])
            if mean.labels.values != data.labels.values or mean.labels.regions != data.labels.regions:
                raise UserError(
                    f"{mean.members[0].path} has the labels {mean.labels.value_names}, {data.file}"
                    f" {data.labels.value_names}; expected the same: cross-validate again."
                )
            check_same_grid(str(mean.members[0].path), mean.geometry, reference.path, reference.geometry)
            values = torch.as_tensor(metric(_batch(mean.indices()), wanted))[0].tolist()
            scores |= {(case["case"], name): value for name, value in zip(metric.classes, values, strict=True)}
    yield from map(Candidate, pairs, dice)


def _mean_of(members: Sequence[CrossValidated], case: str) -> MeanProbabilities:
    return MeanProbabilities([member.probabilities(case) for member in members])


def _batch(indices: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(indices, np.int16))[None, None]


def _masks(best: Candidate, folder: Path) -> Path:
    """Return the folder with the masks of held-out cases; those of a mean are written."""
    if len(best.members) == 1:
        return best.members[0].folder / "predictions"
    for case in tqdm(best.members[0].folds, desc="writing masks", unit="case", disable=None):
        _mean_of(best.members, case).write_mask(folder / "predictions", case, "nii.gz", [])
    return folder / "predictions"


def _ranking(ranked: Sequence[Candidate]) -> list[dict]:
    """Make a row a candidate; ties have one rank."""
    rows: list[dict] = []
    for place, candidate in enumerate(ranked, 1):
        tie = rows and candidate.rank_key[0] == ranked[place - 2].rank_key[0]
        scored = sum(math.isfinite(value) for value in candidate.dice.values())
        means = {f"dice_{name}" if name != "mean" else "dice": value for name, value in candidate.means.items()}
        rows.append(
            {
                "rank": rows[-1]["rank"] if tie else place,
                "configuration": candidate.name,
                "cases": len(candidate.members[0].folds),
                "scores": scored,
                **means,
            }
        )
    return rows


def _table(rows: Sequence[dict]) -> list[str]:
    classes = [name for name in rows[0] if name.startswith("dice")]
    heads = [name.removeprefix("dice_").replace("dice", "mean")[:12] for name in classes]
    lines = [f"{'rank':>4} {'  '.join(f'{head:>12}' for head in heads)}  scores  configuration"]
    for row in rows:
        values = "  ".join(f"{row[name]:12.4f}" for name in classes)
        lines.append(f"{row['rank']:4} {values}  {row['scores']:6}  {row['configuration']}")
    return [
        f"Dice of {rows[0]['cases']} held-out cases, averaged over the cases of each class, and over the classes.",
        "A class that neither mask nor reference of a case has does not count; the scores that do are counted.",
        "",
        *lines,
    ]


def _doubts(ranked: Sequence[Candidate], found: Sequence[CrossValidated]) -> list[str]:
    """Say how far the best is ahead of the others, and what was not tried."""
    lines = [line for other in ranked[1:3] for line in _ahead(ranked[0], other)]
    for one in found:
        if len(found) > 1 and (missing := one.without_probabilities):
            lines.append(
                f"{one.name} has no probabilities of {missing} of {len(one.folds)} cases: no mean with it was tried."
                " Run its cross_validate again with --save_probabilities True (the folds are scored again, not"
                " trained), then this command."
            )
    return lines or ["Nothing to compare it with."]


def _ahead(best: Candidate, other: Candidate) -> Iterator[str]:
    cases, classes = sorted(best.members[0].folds), best.members[0].classes
    both = np.array([[[one.dice[case, name] for name in classes] for case in cases] for one in (other, best)])
    row = compared(*mean_of_both(both))
    if row["cases"]:
        yield (
            f"{best.name} beside {other.name}: {row['difference']:+.4f}"
            f" [{row['interval_low']:+.4f}, {row['interval_high']:+.4f}], p {row['wilcoxon_p']:.2g};"
            f" better in {row['higher']} and worse in {row['lower']} of {row['cases']} cases."
        )


def _how_to_use(best: Candidate, folder: Path) -> list[str]:
    """Say which commands segment new scans with the best."""
    return [
        f"Best: {best.name}. Its folds together segment the scans of a folder {SCANS} into a folder {MASKS} so:",
        "",
        *_commands(best, folder),
    ]


def _commands(best: Candidate, folder: Path) -> Iterator[str]:
    decision = ("--postprocessing_file", str((folder / "postprocessing.json").resolve()))
    if _run_as_one(best.members):
        yield _segment(best.members, MASKS, *decision)
        return
    parts = [f"{MASKS}/part_{number}" for number, _ in enumerate(best.members)]
    for member, part in zip(best.members, parts, strict=True):
        yield _segment([member], part, "--postprocessing_file", "none", "--save_probabilities", "True")
    averaging = ("python", "-m", "scripts", "ensemble_probabilities", "--folders", str(parts), "--output_dir", MASKS)
    yield _line(*averaging, *decision)


def _run_as_one(members: Sequence[CrossValidated]) -> bool:
    """Tell whether one inference averages all: networks of one grid, with the same windows."""
    first, *others = members
    try:
        for other in others:
            check_alike(str(other.ckpt_dir / "fold_0/model.pt"), str(first.ckpt_dir / "fold_0/model.pt"))
    except UserError:
        return False
    return all(other.inference == first.inference for other in others)


def _segment(members: Sequence[CrossValidated], output_dir: str, *options: str) -> str:
    weights = str([member.weights for member in members]) if len(members) > 1 else members[0].weights
    settings = [part for name, value in members[0].inference.items() for part in (f"--{name}", str(value))]
    folders = ("--dataset_dir", SCANS, "--output_dir", output_dir)
    return _line(*RUN, *folders, "--ensemble", weights, *settings, *options)


def _line(*words: str) -> str:
    """Spell a command for a shell; lists in double quotes, as people write them."""
    return " ".join(f'"{w}"' if "'" in w and not set(w) & set('"$`\\!') else shlex.quote(w) for w in words)
