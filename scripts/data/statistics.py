"""The measures by which scans and masks of different data sets are compared: plain numbers, each with a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def scan_measures(spacing: Sequence[float], shape: Sequence[int], contrasts: Sequence[float]) -> dict[str, float]:
    """Name the measures of a scan: spacing and extent of each axis, contrast of each channel.

    Args:
        spacing: mm, of the RAS axes.
        shape: voxels, of the RAS axes.
        contrasts: std / mean of the non-zero voxels of each channel, 0 without any. It does not depend on the unit of
            an MR scanner, and is negative or large in a CT.
    """
    found = {f"spacing {axis} (mm)": value for axis, value in zip("xyz", spacing, strict=True)}
    found |= {f"extent {axis} (mm)": n * s for axis, n, s in zip("xyz", shape, spacing, strict=True)}
    return found | {f"contrast of channel {i} (std / mean)": value for i, value in enumerate(contrasts)}


def label_volumes(counts: Mapping[int, int], voxel: float) -> dict[str, float]:
    """Name the measures of a mask: the volume of each label in ml.

    Args:
        counts: voxels of each label, by its value.
        voxel: mm^3.
    """
    return {f"volume of label {label} (ml)": n * voxel / 1000 for label, n in counts.items()}
