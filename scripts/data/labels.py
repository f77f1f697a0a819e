"""What the values in label files mean: exclusive labels, overlapping regions, voxels to ignore.

`dataset.json` speaks of *values*, as stored in the files and written into masks. In memory a label map holds *indices*
0, 1, 2, .. into `values`, so that gaps cost nothing; voxels to ignore have the index behind the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import UserError
from .datasets import dataset_json

LARGEST = 32767  # int16


class Labels(NamedTuple):
    """A data set's labels.

    names: of the network's channels: the labels, background first, or the regions.
    values: stored in the files, ascending, 0 first; without the one to ignore.
    regions: of each region, the values that belong to it; None where labels exclude each other.
    order: the value that each region is painted with, later regions over earlier ones (`regions_class_order`).
    ignore: value of voxels that nobody annotated, or None.
    """

    names: list[str]
    values: list[int]
    regions: dict[str, list[int]] | None
    order: list[int] | None
    ignore: int | None


def read(dataset_dir: str) -> Labels:
    """The labels of a Decathlon (value to name) or nnU-Net v2 folder (name to value, or to the values of a region).

    Raises:
        UserError: a label has no integer value, two have one, or 0 or any other is missing; "ignore" is not the
            highest; regions without an order to paint them in.
    """
    path, description = Path(dataset_dir) / "dataset.json", dataset_json(dataset_dir)
    found = description["labels"]
    if all(key.isdigit() for key in found):  # Decathlon's
        found = {name: int(value) for value, name in found.items()}
        if len(found) < len(description["labels"]):
            raise UserError(f'{path} gives two "labels" one name: {description["labels"]}; correct dataset.json.')
    groups = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    if not all(group and all(type(value) is int for value in group) for group in groups.values()):
        raise UserError(f'{path} gives "labels" {found}; expected an integer a name, or a list of them for a region.')
    ignore = groups.pop("ignore", [None])[0]
    overlapping = any(isinstance(value, list) for value in found.values())
    stored = [value for group in groups.values() for value in group]
    values = sorted(set(stored) if overlapping else stored)
    repeated = len(set(values)) < len(values)
    if repeated or len(values) < 2 or values[0] != 0 or values[-1] > LARGEST:
        raise UserError(
            f'{path} gives "labels" the values {values}; expected 0 (background) and at least one foreground label,'
            f" up to {LARGEST}, each once; correct dataset.json."
        )
    if ignore is not None and ignore <= values[-1]:
        raise UserError(
            f'{path} gives "ignore" the value {ignore}; expected more than {values[-1]}, the highest label.'
        )
    if not overlapping:
        return Labels(sorted(groups, key=groups.get), values, None, None, ignore)
    regions = {name: group for name, group in groups.items() if group != [0]}
    order = description.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(regions) or not set(order) <= set(values):
        raise UserError(
            f'{path} gives "regions_class_order" {order} for the regions {", ".join(regions)}; expected one of the'
            f" values {values[1:]} for each, in the order in which they are painted over one another."
        )
    return Labels(list(regions), values, regions, order, ignore)


def index_names(labels: Labels) -> list[str]:
    """A name for every index; of regions, whose parts have none, "label 2" and so on."""
    return labels.names if labels.regions is None else ["background", *(f"label {v}" for v in labels.values[1:])]


def stored(values: Sequence[int], ignore: int | None) -> list[int]:
    """Values by index, the one to ignore last: `[0, 1, 4]` or `[0, 1, 4, 5]`."""
    return [*values, *([] if ignore is None else [ignore])]


def ignore_index(values: Sequence[int], ignore: int | None) -> int | None:
    """Index of voxels to ignore, or None."""
    return None if ignore is None else len(values)


def scored(names: Sequence[str], values: Sequence[int], regions: Mapping[str, Sequence[int]] | None) -> dict:
    """What is scored by default, name -> values: the regions, or each foreground label by itself."""
    return dict(regions) if regions else {name: [value] for name, value in zip(names[1:], values[1:], strict=True)}


def indices(classes: Mapping[str, Sequence[int]], values: Sequence[int]) -> dict[str, list[int]]:
    """Classes by the indices of their labels instead of the values.

    Raises:
        UserError: a class has a value that the files do not.
    """
    for name, group in classes.items():
        if not set(group) <= set(values):
            raise UserError(f"{name} is made of the label values {list(group)}; the data set has {list(values)}.")
    return {name: [list(values).index(value) for value in group] for name, group in classes.items()}


def members(regions: Mapping[str, Sequence[int]] | None, values: Sequence[int]) -> list[list[int]] | None:
    """The indices that belong to each region, in the order of the network's channels; None without regions."""
    return None if regions is None else list(indices(regions, values).values())


def painted(order: Sequence[int] | None, values: Sequence[int] | None) -> list[int] | None:
    """The index that each region is painted with; None where labels exclude each other."""
    return None if order is None else [list(values).index(value) for value in order]
