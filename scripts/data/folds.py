"""Which cases are held out: nnU-Net's five folds, or the split that a data set brings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.errors import UserError

FOLDS = 5
SPLITS = "splits_final.json"

Fold = dict[str, list[str]]  # {"train": names of cases, "val": names of cases}


def read_folds(folder: str | Path, names: Sequence[str]) -> list[Fold]:
    """Return the folder's own `splits_final.json` where there is one, else `five_folds`.

    Args:
        folder: of the data set.
        names: ids of its cases.

    Raises:
        UserError: the file names a case that is not there, or holds out one that it trains on.
    """
    path = Path(folder) / SPLITS
    if not path.is_file():
        return five_folds(names)
    found = json.loads(path.read_text())
    for number, fold in enumerate(found):
        if unknown := sorted({*fold["train"], *fold["val"]} - set(names)):
            raise UserError(f"{path} names case {unknown[0]}, which {folder} does not have; correct the split.")
        if both := sorted(set(fold["train"]) & set(fold["val"])):
            raise UserError(
                f"{path} trains fold {number} on case {both[0]} and holds it out as well; correct the split."
            )
    return found


def five_folds(names: Sequence[str]) -> list[Fold]:
    """Split as nnU-Net does; with fewer than five cases there are as many folds as cases.

    Equal to scikit-learn's `KFold(5, shuffle=True, random_state=12345)` over the sorted names.
    """
    names = sorted(names)
    order = np.arange(len(names))
    np.random.RandomState(12345).shuffle(order)
    held_out = [set(part.tolist()) for part in np.array_split(order, min(FOLDS, len(names)))]
    return [
        {part: [n for i, n in enumerate(names) if (i in held) == (part == "val")] for part in ("train", "val")}
        for held in held_out
    ]
