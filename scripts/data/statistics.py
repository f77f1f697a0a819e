"""The measures by which scans and masks of different data sets are compared: plain numbers, each with a name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

TILT = "tilt (degrees)"
LARGEST_TILT = 30.0  # degrees, as far as augmentation turns
VOLUME, OLD_VOLUME = "volume of {} (ml)", re.compile(r"volume of label (\d+) \(ml\)")  # now by the class's name
SLICES = 16  # of a mask whose voxels are counted at once
OLD_CONTRAST, CONTRAST = "(std / mean)", "(degrees)"  # endings of its name until 0.7, and now


def scan_measures(
    spacing: Sequence[float], shape: Sequence[int], contrasts: Sequence[float], tilt: float = 0.0
) -> dict[str, float]:
    """Name the measures of a scan: spacing and extent of each axis, tilt, contrast of each channel.

    Args:
        spacing: mm, of the RAS axes.
        shape: voxels, of the RAS axes.
        contrasts: see `contrast`, of each channel.
        tilt: degrees, see `data.geometry.tilt`.
    """
    found = {f"spacing {axis} (mm)": value for axis, value in zip("xyz", spacing, strict=True)}
    found |= {f"extent {axis} (mm)": n * s for axis, n, s in zip("xyz", shape, spacing, strict=True)}
    found[TILT] = tilt
    return found | {f"contrast of channel {i} {CONTRAST}": value for i, value in enumerate(contrasts)}


def contrast(mean: float, deviation: float) -> float:
    """Return the angle whose tangent is deviation / mean, in degrees, of the non-zero voxels of a channel.

    0 is a constant channel, 90 one whose mean is 0, 180 a constant negative one. It does not depend on the unit of an
    MR scanner, and passes smoothly through the mean of 0 that the units of CT may give, where std / mean has a pole.
    """
    return math.degrees(math.atan2(deviation, mean)) if deviation else 0.0 if mean >= 0 else 180.0


def present_ranges(
    ranges: Mapping[str, Sequence[float]], classes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, list[float]]:
    """Translate ranges that were learnt until version 0.7, and leave out what they say nothing about any more.

    Contrast was std / mean, the tangent of what it is now: a range that holds 0 or less says nothing about the angle.
    Volumes were those of label values, not of classes: that of a part of a region says nothing about the region.

    Args:
        ranges: smallest and largest value of each measure.
        classes: label values of each class by its name, see `label_volumes`.
    """
    present = {VOLUME.format(name) for name in classes or {}}
    class_of = {group[0]: name for name, group in (classes or {}).items() if len(group) == 1}
    found = {}
    for name, (low, high) in ranges.items():
        if name.endswith(OLD_CONTRAST):
            if low > 0:
                found[name.replace(OLD_CONTRAST, CONTRAST)] = [contrast(1.0, low), contrast(1.0, high)]
        elif (old := OLD_VOLUME.fullmatch(name)) and not present <= ranges.keys():
            if (value := int(old[1])) in class_of:
                found[VOLUME.format(class_of[value])] = [low, high]
        else:
            found[name] = [low, high]
    return found


def rounded(value: float) -> float:
    """Round to 4 decimals, or below 0.1 to 6 digits: lengths may be nanometres in mm."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.6g}")


def label_volumes(counts: Mapping[str, float], voxel: float) -> dict[str, float]:
    """Name the measures of a mask: the volume in ml of each class, a label or a region.

    Args:
        counts: voxels of each class, by its name.
        voxel: mm^3.
    """
    return {VOLUME.format(name): n * voxel / 1000 for name, n in counts.items()}


def label_sums(labels: np.ndarray, voxels: np.ndarray | None = None) -> dict[int, float]:
    """Add up voxels (X, Y, Z) by the label values (X, Y, Z) that lie there, or count them; slices are added in turn."""
    sums = np.zeros(int(labels.max(initial=0)) + 1)
    for start in range(0, labels.shape[2], SLICES):
        part = np.s_[:, :, start : start + SLICES]
        weights = None if voxels is None else voxels[part].ravel()
        sums += np.bincount(labels[part].ravel().astype(np.intp), weights, len(sums))
    return dict(enumerate(sums.tolist()))


def class_sums(sums: Mapping[int, float], classes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Add up sums of label values to those of classes, by name."""
    return {name: sum(sums.get(value, 0) for value in group) for name, group in classes.items()}
