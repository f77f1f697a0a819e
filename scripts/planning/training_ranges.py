"""The ranges of the training cases, with which inference compares the scans that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data.labels import Labels
from ..data.scans import image_files
from ..data.statistics import class_sums, contrast, label_volumes, rounded, scan_measures


def learn_training_ranges(
    records: Sequence[dict], cases: Sequence[dict], labels: Labels, crop_to_nonzero: bool = False
) -> dict[str, list[float]]:
    """Find the smallest and the largest value of each measure over the training cases, by the measure's name.

    Args:
        records: fingerprints of cases, see fingerprint_file.py; those of other cases and unusable ones are left out.
        cases: the training cases.
        labels: of the data set; the volumes are of its regions, or else of its foreground labels.
        crop_to_nonzero: measure the box of non-zero voxels, which is what the network gets then.
    """
    shape = "cropped" if crop_to_nonzero else "shape"
    files = {image_files(case)[0] for case in cases}
    found: dict[str, list[float]] = {}
    for record in records:
        if record["file"] in files and "error" not in record:
            counts = class_sums(dict(zip(labels.values, record["labels"], strict=False)), labels.eval_classes)
            contrasts = [contrast(c["mean"], c["std"]) if c else 0.0 for c in record["channels"]]
            measured = scan_measures(record["spacing"], record[shape], contrasts, record.get("tilt", 0.0))
            for name, value in {**measured, **label_volumes(counts, math.prod(record["spacing"]))}.items():
                found.setdefault(name, []).append(value)
    return {name: [rounded(min(v)), rounded(max(v))] for name, v in found.items()}
