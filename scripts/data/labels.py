"""What the values in label files mean: exclusive labels, overlapping regions, voxels to ignore.

`dataset.json` and the files speak of *values*. In memory a label map holds *indices* 0, 1, 2, .. into `values`, so that
gaps cost nothing; voxels to ignore have the index behind the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..utils.errors import UserError

LARGEST = 32767  # int16


class LabelSettings(Protocol):
    """Name what is written of labels beside a set of weights, see weights/model_settings.py."""

    @property
    def out_channels(self) -> int: ...
    @property
    def labels(self) -> Sequence[str] | None: ...
    @property
    def label_values(self) -> Sequence[int] | None: ...
    @property
    def regions(self) -> Mapping[str, Sequence[int]] | None: ...
    @property
    def regions_class_order(self) -> Sequence[int] | None: ...


@dataclass(frozen=True)
class Labels:
    """Answers every question about a data set's labels, as nnU-Net's LabelManager does.

    Args:
        names: of the network's channels: the labels, background first, or the regions.
        values: of the labels in the files, ascending, 0 first; without the one to ignore.
        regions: of each region, the values that belong to it; None where labels exclude each other.
        regions_class_order: the value that each region is written as, later regions over earlier ones.
        ignore_value: value of voxels that nobody annotated, or None.
    """

    names: list[str]
    values: list[int]
    regions: dict[str, list[int]] | None = None
    regions_class_order: list[int] | None = None
    ignore_value: int | None = None

    @classmethod
    def from_dataset_json(cls, description: Mapping, path: str | Path) -> Labels:
        """Read Decathlon's (value to name) or nnU-Net v2's "labels" (name to value, or to the values of a region).

        Args:
            description: content of a dataset.json whose "labels" are a dictionary.
            path: names the file in messages.

        Raises:
            UserError: a label has no integer value, two have one, or 0 or any other is missing; "ignore" is not the
                highest; regions without an order to write them in.
        """
        groups, overlapping = _groups(description["labels"], path)
        ignore = _ignored(groups, path)
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
            return cls(sorted(groups, key=lambda name: groups[name]), values, ignore_value=ignore)
        regions = {name: group for name, group in groups.items() if group != [0]}
        order = _regions_class_order(description, regions, values, path)
        return cls(list(regions), values, regions, order, ignore)

    @classmethod
    def from_settings(cls, settings: LabelSettings) -> Labels:
        """Take what is written beside weights; labels that nobody wrote down are 0, 1, 2, .. by their channels."""
        numbers = range(settings.out_channels)
        names = settings.labels or ["background", *(f"label {number}" for number in numbers[1:])]
        values = settings.label_values or numbers
        regions = {name: list(group) for name, group in (settings.regions or {}).items()}
        order = settings.regions_class_order
        return cls(list(names), list(values), regions or None, None if order is None else list(order))

    @property
    def file_values(self) -> list[int]:
        """Values by index, the one to ignore last: `[0, 1, 4]` or `[0, 1, 4, 5]`."""
        return [*self.values, *([] if self.ignore_value is None else [self.ignore_value])]

    @property
    def ignore_index(self) -> int | None:
        """Index of voxels to ignore, or None."""
        return None if self.ignore_value is None else len(self.values)

    @property
    def index_names(self) -> list[str]:
        """A name for every index; of regions, whose parts have none, "label 2" and so on."""
        return self.names if self.regions is None else ["background", *(f"label {v}" for v in self.values[1:])]

    @property
    def eval_classes(self) -> dict[str, list[int]]:
        """What is scored by default, name -> values: the regions, or each foreground label by itself."""
        if self.regions:
            return dict(self.regions)
        return {name: [value] for name, value in zip(self.names[1:], self.values[1:], strict=True)}

    @property
    def value_names(self) -> dict[int, str]:
        """What each foreground value of a mask means: a label, or the region that is written as it."""
        if self.regions_class_order is not None:
            return dict(zip(self.regions_class_order, self.names, strict=True))
        return dict(zip(self.values[1:], self.index_names[1:], strict=True))

    @property
    def activation(self) -> str:
        """What makes probabilities of logits: "softmax", or "sigmoid" where regions overlap."""
        return "sigmoid" if self.regions_class_order else "softmax"

    @property
    def region_indices(self) -> list[list[int]] | None:
        """Indices that belong to each region, in the order of the network's channels; None without regions."""
        return None if self.regions is None else list(self.indices_of(self.regions).values())

    @property
    def region_order(self) -> list[int] | None:
        """Index that each region is written as, later ones over earlier ones; None where labels exclude each other."""
        order = self.regions_class_order
        return None if order is None else [self.values.index(value) for value in order]

    def indices_of(self, classes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Translate classes made of values into classes made of indices.

        Raises:
            UserError: a class has a value that the files do not.
        """
        for name, group in classes.items():
            if not set(group) <= set(self.values):
                raise UserError(f"{name} is made of the label values {list(group)}; the data set has {self.values}.")
        return {name: [self.values.index(value) for value in group] for name, group in classes.items()}


def _groups(found: Mapping, path: str | Path) -> tuple[dict[str, list[int]], bool]:
    """Values of each name, and whether any name is a region."""
    numbered = all(key.isdecimal() and len(key) < 9 for key in found) and not any(
        type(v) is int for v in found.values()
    )
    if numbered and not all(isinstance(name, str) for name in found.values()):
        raise UserError(f'{path} gives "labels" {repr(found)[:200]}; expected a name for each value: correct it.')
    named = {name: int(value) for value, name in found.items()} if numbered else dict(found)
    if len(named) < len(found):
        raise UserError(f'{path} gives two "labels" one name: {found}; correct dataset.json.')
    groups = {name: value if isinstance(value, list) else [value] for name, value in named.items()}
    if not all(group and all(type(value) is int for value in group) for group in groups.values()):
        raise UserError(f'{path} gives "labels" {named}; expected an integer a name, or a list of them for a region.')
    return groups, any(isinstance(value, list) for value in named.values())


def _ignored(groups: dict[str, list[int]], path: str | Path) -> int | None:
    """Take the value of "ignore" out of the groups."""
    values: list = groups.pop("ignore", [None])
    if len(values) > 1 or (values[0] is not None and values[0] > LARGEST):
        raise UserError(f'{path} gives "ignore" the value {repr(values)[:60]}; expected one, up to {LARGEST}.')
    return values[0]


def _regions_class_order(description: Mapping, regions: Mapping, values: list[int], path: str | Path) -> list[int]:
    order = description.get("regions_class_order")
    known = isinstance(order, list) and all(type(value) is int and value in values for value in order)
    if not isinstance(order, list) or not known or len(order) != len(regions):
        raise UserError(
            f'{path} gives "regions_class_order" {order} for the regions {", ".join(regions)}; expected one of the'
            f" values {values[1:]} for each, in the order in which they are painted over one another."
        )
    return order
