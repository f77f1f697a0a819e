"""Which cases are held out: nnU-Net's five folds, or the split that a data set brings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.errors import UserError
from ..utils.files import read_json

FOLDS = 5
EXPECTED = 'a list of {"train": [names of cases], "val": [names of cases]}, one a fold'
SPLITS = "splits_final.json"

Fold = dict[str, list[str]]  # {"train": names of cases, "val": names of cases}


def read_folds(folder: str | Path, names: Sequence[str]) -> list[Fold]:
    """Return the folder's own `splits_final.json` where there is one, else `five_folds`.

    Args:
        folder: of the data set.
        names: ids of its cases.

    Raises:
        UserError: the file is no list of folds, names a case that is not there, holds out one twice or one that it
            trains on, or trains on none.
    """
    path = Path(folder) / SPLITS
    if not os.path.lexists(path):
        return five_folds(names)
    found = read_json(path)
    if not isinstance(found, list) or not found:
        shown = "an empty list" if found == [] else f"a {type(found).__name__}"
        raise UserError(f"{path} holds {shown}; expected {EXPECTED}: correct or remove it.")
    folds = [_fold(path, number, fold) for number, fold in enumerate(found)]
    for number, fold in enumerate(folds):
        if unknown := sorted({*fold["train"], *fold["val"]} - set(names)):
            raise UserError(f"{path} names case {unknown[0]}, which {folder} does not have; correct the split.")
        if both := sorted(set(fold["train"]) & set(fold["val"])):
            raise UserError(
                f"{path} trains fold {number} on case {both[0]} and holds it out as well; correct the split."
            )
        if twice := [name for name, count in Counter(fold["val"]).items() if count > 1]:
            raise UserError(f"{path} holds out case {twice[0]} of fold {number} twice; name it once.")
        if not fold["train"]:
            raise UserError(f"{path} trains fold {number} on no case; name at least one.")
    return folds


def _fold(path: Path, number: int, fold: object) -> Fold:
    """Take a fold as it stands in the file, or say what it lacks."""
    if not isinstance(fold, dict):
        raise UserError(f"{path} has a {type(fold).__name__} as fold {number}; expected {EXPECTED}: correct it.")
    for part in ("train", "val"):
        listed = fold.get(part)
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            shown = repr(listed)[:60] if part in fold else "nothing"
            raise UserError(f'{path} has {shown} as "{part}" of fold {number}; expected {EXPECTED}: correct it.')
    return {part: fold[part] for part in ("train", "val")}


def five_folds(names: Sequence[str]) -> list[Fold]:
    """Split as nnU-Net does; with fewer than five cases there are as many folds as cases.

    Equal to scikit-learn's `KFold(5, shuffle=True, random_state=12345)` over the sorted names.
    """
    names = sorted(names)
    order = np.arange(len(names))
    np.random.RandomState(12345).shuffle(order)
    held_out = [set(part.tolist()) for part in np.array_split(order, max(1, min(FOLDS, len(names))))]
    return [
        {part: [n for i, n in enumerate(names) if (i in held) == (part == "val")] for part in ("train", "val")}
        for held in held_out
    ]
