"""Traits of a data set that change sampling and augmentation: sides, thick voxels, labels that few cases have."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .spacing import ANISOTROPY

SIDES = {"left": 0, "lh": 0, "lt": 0, "l": 0, "right": 1, "rh": 1, "rt": 1, "r": 1}
SIDE = re.compile(
    r"(?i:left|right)"  # anywhere: Left-Putamen, leftlung
    r"|(?<![A-Za-z0-9])(?i:lh|rh|lt|rt|l|r)(?![A-Za-z0-9])"  # alone: ctx-lh-insula, kidney_l
    r"|(?<=[a-z])[LR](?![A-Za-z0-9])|(?<![A-Za-z0-9])[LRlr](?=[A-Z][a-z])"  # by their case: LungR, LKidney
)
ACROSS = 0  # the axis from left to right of a scan that was turned to RAS
ROTATION = 0.5236  # radians, 30 degrees as published
ROTATION_2D = 3.1416  # radians, half a turn: nnU-Net's in 2D, which it takes for patches of thick slices, too
RARE = 0.1  # of the cases: the share that a label is to have of those drawn


def paired_labels(names: Sequence[str]) -> list[tuple[str, str]]:
    """Find labels that differ in a side alone, by their names: [("kidney_left", "kidney_right"), ..]."""
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        for match in SIDE.finditer(name):
            rest = (name[: match.start()].lower(), name[match.end() :].lower(), str(len(match[0]) > 2))
            found.setdefault(rest, {})[SIDES[match[0].lower()]] = name
    return list(dict.fromkeys((pair[0], pair[1]) for pair in found.values() if len(pair) == 2))


def rare_labels(records: Sequence[dict], names: Sequence[str]) -> list[str]:
    """List the foreground labels that some, but under a tenth of the cases have."""
    having = [sum(record["labels"][index] > 0 for record in records) for index in range(len(names))]
    return [name for name, n in list(zip(names, having, strict=True))[1:] if 0 < n < RARE * len(records)]


def rotate_range(grid: Sequence[float]) -> list[float]:
    """Return the largest angle about each axis: as published, or where voxels are over 3 times as thick as in 2D."""
    if max(grid) <= ANISOTROPY * min(grid):
        return [ROTATION] * 3
    thick = max(range(3), key=lambda axis: grid[axis])
    return [ROTATION_2D if axis == thick else 0.0 for axis in range(3)]


def traits(
    records: Sequence[dict], names: Sequence[str], index_names: Sequence[str]
) -> tuple[dict[str, object], dict[str, str]]:
    """Return the settings that a data set needs beside the published ones, and the reason of each.

    Args:
        records: fingerprints of the usable cases.
        names: of what the network tells apart: labels or regions.
        index_names: of the labels by index, background first.
    """
    settings: dict[str, object] = {}
    because = {}
    if pairs := paired_labels(names):
        settings["mirror_axes"] = [axis for axis in range(3) if axis != ACROSS]
        example = f"{pairs[0][0]}, {pairs[0][1]}; pairs: {len(pairs)}"
        because["mirror_axes"] = (
            f"labels that differ in their side alone, by their names ({example}): a mirrored left is no right"
        )
    if rare := rare_labels(records, index_names):
        settings["train#rare_label_share"] = RARE
        because["rare_label_share"] = (
            f"under {100 * RARE:.0f} % of the cases have {', '.join(rare[:3])}{' and others' if len(rare) > 3 else ''}:"
            " drawn evenly, they would hardly be seen"
        )
    return settings, because
