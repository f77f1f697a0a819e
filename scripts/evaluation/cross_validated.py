"""Finished cross-validations as `cross_validate` leaves them: held-out cases, their scores, the weights."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.datasets import Dataset
from ..data.folds import SPLITS
from ..utils.errors import UserError
from ..utils.files import remembered
from ..weights.model_settings import read_model_settings
from .cross_validation import RECORD, probability_file
from .tables import with_nan

Dice = Mapping[tuple[str, str], float]  # (case, class) -> Dice, nan where the class is in neither mask


class CrossValidated(NamedTuple):
    """Holds what a cross-validation found.

    Args:
        folder: its `output_dir`.
        ckpt_dir: of its weights, `fold_0/model.pt` and so on.
        inference: settings that its cases were scored with, by their names in inference.
        folds: case -> the fold that held it out.
        classes: those that were scored, and the label values that belong to them.
        dice: of each case and class.
    """

    folder: Path
    ckpt_dir: Path
    inference: Mapping[str, Any]
    folds: Mapping[str, int]
    classes: Mapping[str, Sequence[int]]
    dice: Dice

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def weights(self) -> str:
        """A pattern of the weights of all folds, as the setting `ensemble` takes it."""
        return str(Path(glob.escape(str(self.ckpt_dir)), "fold_*", "model.pt"))

    def probabilities(self, case: str) -> Path:
        """Return the file of a case's probabilities."""
        return probability_file(self.folder / f"fold_{self.folds[case]}", case)

    @property
    def without_probabilities(self) -> int:
        """Number of cases whose probabilities were not saved."""
        return sum(not self.probabilities(case).is_file() for case in self.folds)


def read_cross_validated(folder: str | Path, data: Dataset) -> CrossValidated:
    """Read a cross-validation of a data set.

    Raises:
        UserError: it is not there, or was not finished; a case of two folds; its weights are gone.
    """
    again = "run cross_validate again with the settings of that folder: it goes on where it stopped"
    record = remembered(Path(folder, RECORD))
    if not isinstance(record.get("ckpt_dir"), str) or not isinstance(record.get("inference"), dict):
        raise UserError(f"{Path(folder, RECORD)} is missing or damaged; expected a finished cross-validation: {again}.")
    ckpt_dir = Path(record["ckpt_dir"])
    first = ckpt_dir / "fold_0/model.pt"
    if not first.is_file():
        raise UserError(f"{first}, whose scores are in {folder}, is not there; move it back, or {again}.")
    classes = read_model_settings(first).get("eval_classes") or data.labels.eval_classes
    folds: dict[str, int] = {}
    dice: dict[tuple[str, str], float] = {}
    for place in sorted(Path(folder).glob("fold_*")):
        number = int(place.name.removeprefix("fold_"))
        for row in remembered(place / "summary.json").get("cases") or []:
            if folds.setdefault(row["case"], number) != number:
                raise UserError(
                    f"{place} and fold_{folds[row['case']]} both scored case {row['case']}; move the one that is of"
                    " another split away."
                )
            dice[row["case"], row["label"]] = float(with_nan(row["dice"]))  # type: ignore[arg-type] # None is nan now
    if unknown := {label for _, label in dice} ^ set(classes):
        raise UserError(
            f"{folder} and {first.with_suffix('.json')} differ in the class {min(unknown)}; expected scores of"
            f" {', '.join(classes)}: {again}."
        )
    return CrossValidated(Path(folder), ckpt_dir, record["inference"], folds, classes, dice)


def require_comparable(found: Sequence[CrossValidated], data: Dataset) -> None:
    """Raise UserError, naming the first difference, unless all scored the cases of a data set in the same folds."""
    first = found[0]
    _require_cases(first, {case["case"] for case in data.cases}, str(data.folder))
    for other in found[1:]:
        _require_cases(other, first.folds, first.name)
        if moved := [case for case in sorted(first.folds) if first.folds[case] != other.folds[case]]:
            raise UserError(
                f"{first.folder} held out {moved[0]} in fold {first.folds[moved[0]]}, {other.folder} in fold"
                f" {other.folds[moved[0]]} ({len(moved)} cases differ); expected the same folds: cross-validate both"
                f" with the same {SPLITS} in the data set."
            )
        for name in sorted({*first.classes, *other.classes}):
            if first.classes.get(name) != other.classes.get(name):
                raise UserError(
                    f"{first.folder} scored the class {name} as {first.classes.get(name)}, {other.folder} as"
                    f" {other.classes.get(name)}; expected the same classes: score both with the same"
                    " --model#eval_classes."
                )


def _require_cases(found: CrossValidated, wanted: Iterable[str], source: str) -> None:
    if different := sorted(set(found.folds) ^ set(wanted)):
        there, missing = (found.name, source) if different[0] in found.folds else (source, found.name)
        raise UserError(
            f"{there} has case {different[0]}, {missing} has not ({len(different)} cases are in one alone); expected"
            " the same cases: run cross_validate on the same data set into a new folder."
        )


def mean_dice(dice: Dice, classes: Iterable[str]) -> dict[str, float]:
    """Average over the cases that have a Dice, for each class; "mean" is that of the classes that have one."""
    by_class = {name: _mean(value for (_, label), value in dice.items() if label == name) for name in classes}
    return {"mean": _mean(by_class.values()), **by_class}


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
