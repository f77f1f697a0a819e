"""Folds that stay when a data set grows: `python -m scripts extend_folds`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.settings_table import SETTINGS
from .datasets import Dataset
from .folds import SPLITS, Fold, five_folds


def extend_folds(dataset_dir: str, new: Sequence[str] = ()) -> None:
    """Write the folds of a data set into it, and put cases that came since into them; the others stay where they are.

    Without this, nnU-Net's rule shuffles all cases anew, and networks have seen cases that their fold holds out then.
    Run it before cases are added, and once more afterwards; where they are there already, name them in `new`. Each new
    case is held out by the fold that holds out the fewest, and trained on by the others; of a single fold, all are
    trained on, so that it holds out what it did.

    Args:
        dataset_dir: a Decathlon or nnU-Net v2 folder.
        new: names of cases that no network has seen, where there is no split in the folder yet.

    Raises:
        UserError: a new case is not there, or is in the split already; the split cannot be used.
    """
    data = Dataset(dataset_dir)
    path, names = data.folder / SPLITS, [case["case"] for case in data.cases]
    new = SETTINGS["ensemble"].of(new, "new")
    new = [new] if isinstance(new, str) else new
    if unknown := sorted(set(new) - set(names)):
        raise UserError(f"new names case {unknown[0]}, which {dataset_dir} does not have; give names of its cases.")
    earlier = sorted(set(names) - set(new))
    if path.is_file():
        folds = data.folds
        earlier = sorted({name for fold in folds for part in fold.values() for name in part})
        if known := sorted(set(new) & set(earlier)):
            raise UserError(f"new names case {known[0]}, which {path} has already; leave it out.")
    elif len(earlier) < 2:
        raise UserError(f"new names {len(new)} of {len(names)} cases; expected at least 2 that were there before.")
    else:
        folds = five_folds(earlier)
    added = _put(sorted(set(names) - set(earlier)), folds)
    write_text(path, json.dumps(folds, indent=1) + "\n")
    print(f"wrote {path}: {len(folds)} folds of {len(earlier)} cases that stay where they were, {len(added)} new ones")
    for name, held_out in added.items():
        print(f"{name}: " + ("trained on" if held_out is None else f"held out by fold {held_out}"))


def _put(names: Sequence[str], folds: list[Fold]) -> dict[str, int | None]:
    """Put new cases into folds, and return the one that holds out each."""
    added: dict[str, int | None] = {}
    for name in names:
        sizes = [len(fold["val"]) for fold in folds]
        added[name] = sizes.index(min(sizes)) if len(folds) > 1 else None
        for number, fold in enumerate(folds):
            fold["val" if number == added[name] else "train"].append(name)
    return added
