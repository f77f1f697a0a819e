"""The model card of a bundle that is made of a training: what it knows, its scores in tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from ..data.datasets import Dataset, GivenCases
from ..data.scans import mask_file
from ..evaluation.report import READING, draw_case, mean_dice, notable_cases, number
from ..evaluation.tables import METRICS, read_summary
from ..utils.files import read_table
from ..weights.model_settings import ModelSettings
from .metadata import mask_classes, preprocessing

SPECIAL = re.compile(r"([\\`*|<>\[\]])")


def plain_markdown(text: object) -> str:
    """Spell text of a data set so that it is text in Markdown, and in a cell of a table."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def write_card(
    file: Path,
    metadata: Mapping,
    model: ModelSettings,
    trained: Mapping[str, object],
    scores: str | Path | None,
    dataset_dir: str | Path | None,
) -> None:
    """Write the card, and the pictures that it shows beside it.

    Args:
        file: where to write.
        metadata: what metadata.json says.
        model: the settings of the weights.
        trained: what else stands beside the weights, such as the epoch that they are from.
        scores: folder of an evaluation, or None.
        dataset_dir: its data set, for pictures, or None.
    """
    progress = file.parent / "training.png"
    facts = {
        "network": f"MedNeXt-{model.size}, kernel {model.kernel_size}, {model.dim}",
        "channels": ", ".join(GivenCases(model).channels),
        "values of a mask": ", ".join(f"{value} {label}" for value, label in mask_classes(model).items()),
        "scans are": preprocessing(model),
        "patch": " x ".join(map(str, model.patch_size)),
        "epoch of": _length(model),
        "held out": "nothing" if model.fold == "all" else f"fold {model.fold}",
        **{name: value for name, value in trained.items() if isinstance(value, int | float)},
    }
    file.write_text(
        Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).substitute(
            **{key: plain_markdown(metadata[key]) for key in ("version", "description", "authors", "data_source")},
            name=metadata["name"],
            licence=plain_markdown(metadata["copyright"]),
            facts=_table(["", ""], facts.items()),
            progress="![loss, Dice and learning rate over the epochs](training.png)" if progress.is_file() else "",
            scores="\n\n".join(_scores(file.parent, model, trained, scores, dataset_dir)),
        ),
        encoding="utf-8",
    )


def _length(model: ModelSettings) -> str:
    return f"{model.iterations} iterations of {model.batch_size} patches" if model.iterations else "unknown length"


def _table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *([plain_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(
    folder: Path, model: ModelSettings, trained: Mapping, scores: str | Path | None, dataset_dir: str | Path | None
) -> list[str]:
    """Give the paragraphs of an evaluation, or else what the training itself measured."""
    if scores is None:
        dice = f"Dice {trained['dice']} of the held-out cases while training" if "dice" in trained else "None"
        return [f"{dice}; the weights were not evaluated by themselves."]
    summary = read_table(Path(scores, "summary.csv"))
    tolerance = read_summary(scores, "nsd_tolerance_mm")
    heads = ["class", "cases", *METRICS.values()]
    rows = [[row["label"], row["cases"], *(number(row, metric) for metric in METRICS)] for row in summary]
    told = [_table(heads, rows), f"NSD at {tolerance:g} mm; every case is in [cases.csv](cases.csv)."]
    return told if dataset_dir is None else [*told, *_pictures(folder, model, Path(scores), Dataset(dataset_dir))]


def _pictures(folder: Path, model: ModelSettings, scores: Path, data: Dataset) -> list[str]:
    means = mean_dice(read_table(scores / "cases.csv"))
    cases = {case["case"]: case for case in data.cases}
    told = []
    for case, role in notable_cases(means).items():
        mask = scores / "predictions" / mask_file(case)
        if case in cases and mask.is_file():
            picture, slice_name = draw_case(cases[case], mask, data.labels.values)
            name = f"{role.lower().replace(', ', '_')}.png"
            (folder / name).write_bytes(picture)
            told.append(f"![{role} case: scan, reference and prediction]({name})")
            told.append(f"{role} case {plain_markdown(case)}, Dice {means[case]:.3f}, {slice_name}.")
    return [re.sub(r"</?p>", "", READING), *told] if told else told
