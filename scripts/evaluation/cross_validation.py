"""Cross-validation: all folds in one command, and one table of cases that no network had seen."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from ..data.datasets import Dataset
from ..data.folds import SPLITS, Fold
from ..data.scans import mask_file
from ..inference.export import MaskLayout
from ..utils.errors import UserError
from ..utils.files import check_writable, copy_file, write_text
from ..utils.ownership import alone, owned
from ..utils.settings import give, prepare
from ..utils.settings_table import SETTINGS
from ..utils.signals import run_child
from ..weights.checkpoint_pair import newest
from ..weights.model_settings import BUNDLE_ROOT, read_model_settings
from .tables import read_summary, with_nan, write_tables

TRAIN = "configs/train.json"
RECORD = "cross_validation.json"  # in output_dir: where the weights are, and how they were scored
SCORED_WITH = ("tta", "overlap", "window_scheme")  # settings of inference, too


def cross_validate(
    dataset_dir: str,
    config_file: str | Sequence[str] = TRAIN,
    ckpt_dir: str = "models",
    output_dir: str = "eval",
    folds: int | Sequence[int] | None = None,
    save_probabilities: bool = False,
    **values,
) -> None:
    """Train and score folds one after the other, each in a process of its own; what is done already is left as it is.

    Fold 0 has its weights in `ckpt_dir/fold_0` and its scores in `output_dir/fold_0`, and so on. When all folds are
    there their scores are pooled in `output_dir`, see `pool_folds`, and the post-processing is decided and laid beside
    the weights of each. The last weights of a training are scored, not those that its cases chose.

    Args:
        dataset_dir: a Decathlon or nnU-Net v2 folder.
        config_file: the training config and its overlays.
        ckpt_dir: folder for the weights.
        output_dir: folder for the scores.
        folds: which to run here, for example `--folds 2` or `--folds "[0,1]"`; all by default. Several machines may
            each run some; the last one pools.
        save_probabilities: keep the probabilities of held-out cases beside their masks, for
            `find_best_configuration`; folds that were scored without are scored again.
        values: any setting of the config with its value; `{fold}` in it becomes the number of the fold, for
            example `--init_weights "k3/fold_{fold}/model.pt"`, so that no network starts from one that saw its cases.

    Raises:
        UserError: folds that share held-out cases or leave cases out, a fold that is not there, earlier weights of
            other settings, a fold that another cross-validation works on, or one that failed; started again, the
            command goes on where it stopped.
    """
    files = [_found(path) for path in ([config_file] if isinstance(config_file, str) else config_file)]
    if refused := {"fold", "resume", "save_predictions"} & set(values):
        raise UserError(
            f"--{min(refused)} is set by cross-validation itself; leave it out (--folds 2 runs fold 2 alone)."
        )
    save_probabilities = SETTINGS["save_probabilities"].of(save_probabilities, "save_probabilities")
    check_writable(ckpt_dir, output_dir)
    existing = range(len(checked_folds(Dataset(dataset_dir))))
    wanted = list(existing) if folds is None else [folds] if isinstance(folds, int) else list(folds)
    if unknown := [fold for fold in wanted if fold not in existing]:
        raise UserError(f"{dataset_dir} has no fold {unknown[0]}; expected 0 to {existing[-1]}.")
    config = _config(files, _of_fold(wanted[0], values))
    fingerprints = {
        "checks#fingerprint#fingerprint_file": f"{output_dir}/checked.json"
    }  # all folds read the same files
    for fold in wanted:
        weights, scores = f"{ckpt_dir}/fold_{fold}", f"{output_dir}/fold_{fold}"
        folders = {"dataset_dir": dataset_dir, "ckpt_dir": weights, "output_dir": scores}
        with owned(weights, "cross_validation"):
            settings = {**folders, **fingerprints, **_of_fold(fold, values)}
            _run_fold(fold, files, config, settings, save_probabilities)
    missing = [fold for fold in existing if not _scores(f"{output_dir}/fold_{fold}")]
    if missing:
        print(f"folds {', '.join(map(str, missing))} are still to be run; the last one pools the scores of all")
        return
    common = {"dataset_dir": dataset_dir, "ckpt_dir": ckpt_dir, "output_dir": output_dir, **values}
    with alone(Path(output_dir, "summary.json")):  # two that end at once both see that all are there
        _run("pooling", [*files, _found("configs/pool.json")], common)
        for fold in existing:
            copy_file(f"{output_dir}/postprocessing.json", f"{ckpt_dir}/fold_{fold}/postprocessing.json")
        record = {"ckpt_dir": os.path.abspath(ckpt_dir), "inference": {name: config[name] for name in SCORED_WITH}}
        write_text(f"{output_dir}/{RECORD}", json.dumps(record, indent=2) + "\n")


def _of_fold(fold: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the number of a fold where the settings have `{fold}`."""
    return {k: v.replace("{fold}", str(fold)) if isinstance(v, str) else v for k, v in values.items()}


def _run_fold(
    fold: int, files: Sequence[str], config: ConfigParser, values: Mapping[str, Any], save_probabilities: bool
) -> None:
    """Train and score a fold, as far as that is still to be done."""
    weights, scores = values["ckpt_dir"], values["output_dir"]
    _check_same(weights, config)
    if _epochs_done(weights) < config["epochs"]:
        print(f"fold {fold}: training", flush=True)
        _run("training", files, {"checkpoint_selection": "last", **values, "fold": fold, "resume": "auto"})
    cases = [row["case"] for row in _scores(scores)]
    done = cases and _newer(f"{scores}/summary.json", f"{weights}/model.pt")
    if not done or (save_probabilities and not all(probability_file(scores, case).is_file() for case in cases)):
        print(f"fold {fold}: scoring", flush=True)
        for file in probability_file(scores, "").parent.glob("*.npz"):
            file.unlink()  # of earlier weights
        scoring = {**values, "save_probabilities": save_probabilities}
        _run("evaluating", [*files, _found("configs/evaluate.json")], scoring)


def probability_file(folder: str | Path, case: str) -> Path:
    """Return the path of the probabilities of a case that was scored into a folder."""
    return MaskLayout(str(Path(folder, "predictions"))).probabilities(case)


def checked_folds(data: Dataset) -> list[Fold]:
    """Return the folds of a data set, each of whose cases is held out once.

    Raises:
        UserError: a case is held out by two folds, or by none; a fold trains on nothing, or holds nothing out.
    """
    held_out = Counter(name for fold in data.folds for name in fold["val"])
    path = data.folder / SPLITS
    if empty := [number for number, fold in enumerate(data.folds) if not (fold["val"] and fold["train"])]:
        raise UserError(f"{path} leaves fold {empty[0]} without cases to train on or to hold out; correct the split.")
    if twice := [name for name, count in held_out.items() if count > 1]:
        raise UserError(f"{path} holds out case {twice[0]} in {held_out[twice[0]]} folds; let each be in one.")
    if never := sorted({case["case"] for case in data.cases} - set(held_out)):
        raise UserError(f"{path} never holds out case {never[0]} ({len(never)} in all); let each be in one fold.")
    return data.folds


def _epochs_done(weights: str) -> int:
    found = newest(Path(weights, "training"))
    return found.state["epoch"] if found else 0


def _scores(folder: str) -> list[dict]:
    """Return the scored cases of a fold; none where there is no table, or only a part of one."""
    try:
        return read_summary(folder, "cases")
    except UserError:
        return []


def _config(files: Sequence[str], values: Mapping[str, Any]) -> ConfigParser:
    """Read what a training is told, with the settings of the command line."""
    config = ConfigParser()
    config.read_config(list(files))
    give(config, values)
    prepare(config)
    return config


def _check_same(weights: str, config: ConfigParser) -> None:
    """Check that the weights of an earlier run have the settings of the config, as far as it spells them out."""
    for name, value in read_model_settings(f"{weights}/model.pt").items():
        wanted = config["model"].get(name, value)
        if isinstance(wanted, str) and wanted.startswith("@"):
            wanted = config[wanted[1:]]
        derived = isinstance(wanted, str) and wanted.startswith("$")
        if name != "fold" and not derived and wanted != value:
            raise UserError(
                f"{weights} was trained with {name} {value}, this cross-validation has {wanted}; give another"
                " --ckpt_dir and --output_dir, or the same settings."
            )


def _newer(one: str, other: str) -> bool:
    return Path(one).is_file() and Path(one).stat().st_mtime >= Path(other).stat().st_mtime


def _found(path: str) -> str:
    """Find a config from here, or else in the bundle."""
    return path if Path(path).is_file() else str(Path(BUNDLE_ROOT, path))


def _run(name: str, files: Sequence[str], values: Mapping[str, object]) -> None:
    """Run `python -m monai.bundle run NAME` with the bundle on its path."""
    arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    started = [sys.executable, "-m", "monai.bundle", "run", name, "--config_file", str(list(files)), *arguments]
    path = os.pathsep.join([BUNDLE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    if run_child(started, {**os.environ, "PYTHONPATH": path}):
        raise UserError(
            f"{name} failed, as said above; mend it and start the same command again: it goes on from here."
        )


def pool_folds(output_dir: str, classes: Sequence[str], tolerance: float) -> None:
    """Pool the scores of all folds in one table, and their masks in one folder.

    Args:
        output_dir: with `fold_0`, `fold_1`, .. as scoring left them; for `cases.csv`, `summary.csv`, `summary.json` and
            `predictions/`.
        classes: names of the classes that were scored.
        tolerance: distance in mm within which the surface Dice counts surfaces as equal.

    Raises:
        UserError: two folds scored one case, which those of another split may have left.
    """
    rows: list[dict[str, Any]] = []
    scored_by: dict[str, Path] = {}
    for folder in sorted(Path(output_dir).glob("fold_*"), key=lambda path: int(path.name[5:])):
        for row in read_summary(folder, "cases"):
            if row["label"] not in classes:
                raise UserError(
                    f"{folder} was scored for the class {row['label']!r}, which is none of {', '.join(classes)}; remove"
                    " its summary.json: it is scored again."
                )
            first = scored_by.setdefault(row["case"], folder)
            if first != folder:
                raise UserError(
                    f"{first} and {folder} both scored case {row['case']}; one of them is of another split: move it"
                    " away, with its weights, and train it again."
                )
            rows.append({key: with_nan(value) for key, value in row.items()})
    write_tables(output_dir, rows, classes, tolerance)
    masks = Path(output_dir, "predictions")
    for case, folder in scored_by.items():
        copy_file(folder / "predictions" / mask_file(case), masks / mask_file(case))
