"""The ranges of the training cases, with which inference compares the scans that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data.statistics import label_volumes, scan_measures
from .fingerprint import survey


def learn_training_ranges(
    items: Sequence[dict],
    channels: int,
    values: Sequence[int],
    fingerprint_file: str,
    ignore: int | None = None,
) -> dict[str, list[float]]:
    """Find the smallest and the largest value of each measure over the training cases, by the measure's name.

    Args:
        items: cases with "image" and "label".
        channels: image channels.
        values: values of the labels, background first.
        fingerprint_file: JSON file that remembers what was read of each case, see `planning.fingerprint`.
        ignore: value of voxels that nobody annotated, or None.
    """
    records = [r for r in survey(items, channels, values, fingerprint_file, ignore) if "error" not in r]
    found: dict[str, list[float]] = {}
    for record in records:
        counts = dict(list(zip(values, record["labels"], strict=False))[1:])
        contrasts = [c["std"] / c["mean"] if c and c["mean"] else 0.0 for c in record["channels"]]
        measured = scan_measures(record["spacing"], record["shape"], contrasts)
        for name, value in {**measured, **label_volumes(counts, math.prod(record["spacing"]))}.items():
            found.setdefault(name, []).append(value)
    return {name: [round(min(v), 4), round(max(v), 4)] for name, v in found.items()}
