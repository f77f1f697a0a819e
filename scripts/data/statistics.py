"""The measures by which scans and masks of different data sets are compared: plain numbers, each with a name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

TILT = "tilt (degrees)"
LARGEST_TILT = 30.0  # degrees, as far as augmentation turns
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


def present_ranges(ranges: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Translate ranges that were learnt until version 0.7: contrast was std / mean, the tangent of what it is now.

    One that holds 0 or less says nothing about the angle, and is left out.
    """
    found = {}
    for name, (low, high) in ranges.items():
        if not name.endswith(OLD_CONTRAST):
            found[name] = [low, high]
        elif low > 0:
            found[name.replace(OLD_CONTRAST, CONTRAST)] = [contrast(1.0, low), contrast(1.0, high)]
    return found


def rounded(value: float) -> float:
    """Round to 4 decimals, or below 0.1 to 6 digits: lengths may be nanometres in mm."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.6g}")


def label_volumes(counts: Mapping[int, int], voxel: float) -> dict[str, float]:
    """Name the measures of a mask: the volume of each label in ml.

    Args:
        counts: voxels of each label, by its value.
        voxel: mm^3.
    """
    return {f"volume of label {label} (ml)": n * voxel / 1000 for label, n in counts.items()}
