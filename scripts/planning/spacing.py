"""The grid to train on: MedNeXt's 1 mm, nnU-Net's median or a mixture of both, and which one suits a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..data.grid import record_faults

PUBLISHED = (1.0, 1.0, 1.0)  # mm, of every experiment of the paper
PATCH = 128  # voxels, as published
STEP = 16  # what the network halves four times
ANISOTROPY = 3.0  # nnU-Net's bound between one thick axis and a grid that is nearly isotropic
COARSER = 1.5  # 1 mm that is this many voxels as stored loses what the scan resolves
INVENTED = 3.0  # times the voxels of the mixed grid from which on 1 mm is mostly interpolation


def target_spacing(records: Sequence[dict]) -> list[float]:
    """Return nnU-Net's target spacing in mm: the median over the cases.

    Where one axis is over three times the others and has a third of their voxels, it is the tenth percentile of that
    axis, so that thick slices do not set the grid.
    """
    spacings, shapes = (np.array([record[name] for record in records]) for name in ("spacing", "cropped"))
    spacing, shape = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != worst]
    if spacing[worst] > ANISOTROPY * spacing[others].max() and shape[worst] * ANISOTROPY < shape[others].min():
        spacing[worst] = max(np.percentile(spacings[:, worst], 10), spacing[others].max())
    return [float(f"{s:.6g}") for s in spacing]


def mixed_spacing(records: Sequence[dict]) -> list[float]:
    """Return the median spacing, and across slices that are too few for the network 1 mm, or the edge in the plane.

    The network halves every axis four times: of fewer than 32 slices the coarsest level would see one, and padding.
    Finer than in the plane the slices are not made, since that is interpolation alone.
    """
    spacing = target_spacing(records)
    across = int(np.argmax(spacing))
    in_plane = max(edge for axis, edge in enumerate(spacing) if axis != across)
    if median_shape(records, spacing)[across] < 2 * STEP:
        spacing[across] = min(spacing[across], max(PUBLISHED[across], in_plane))
    return spacing


BY_NAME: dict[str, Callable[[Sequence[dict]], list[float]]] = {"median": target_spacing, "mixed": mixed_spacing}


def training_grid(records: Sequence[dict], spacing: str | Sequence[float]) -> list[float]:
    """Return the spacing of the training grid in mm: what is given, or by the rule that is named."""
    return BY_NAME[spacing](records) if isinstance(spacing, str) else [float(edge) for edge in spacing]


def median_shape(records: Sequence[dict], grid: Sequence[float]) -> np.ndarray:
    """Return the voxels of the median case on a grid, along each axis."""
    return np.median([np.multiply(r["cropped"], r["spacing"]) / grid for r in records], axis=0)


def target_patch_size(shape: Sequence[float] | np.ndarray, spacing: Sequence[float]) -> list[int]:
    """Return 128 voxels an axis, more on fine and fewer on coarse axes; no more than the median case has.

    Args:
        shape: voxels of the median case on the target grid.
        spacing: mm.
    """
    aspect = np.prod(spacing) ** (1 / 3) / np.array(spacing)
    wanted = np.maximum(np.round(PATCH * aspect / STEP), 1) * STEP
    found = np.minimum(wanted, np.ceil(np.array(shape) / STEP) * STEP)
    if found.max() < 2 * STEP:  # the coarsest level needs two voxels on one axis
        found[int(np.argmax(shape))] = 2 * STEP
    return [int(n) for n in found]


def recommended_spacing(records: Sequence[dict]) -> tuple[str | None, str]:
    """Say which grid suits the data set: "median", "mixed" or None for 1 mm as published, and the reason.

    What suits is a guess from voxels alone: only training on both tells (nnUNet#2951 says so of nnU-Net's own rule).
    """
    median, mixed = target_spacing(records), mixed_spacing(records)
    name = "median" if mixed == median else "mixed"
    stored, made, instead = (float(np.prod(median_shape(records, grid))) for grid in (median, PUBLISHED, mixed))
    voxels = f"1 mm makes {count(made)} voxels of the median case's {count(stored)}"
    finest = sorted(mixed)[:2]
    if record_faults(records, PUBLISHED) and not record_faults(records, mixed):
        return name, "not every case can be on a grid of 1 mm"
    if COARSER * finest[1] < 1:
        return name, f"1 mm merges {1 / finest[1]:.2g} voxels along each axis of the plane into one"
    if made > INVENTED * instead:
        return name, voxels if mixed == median else f"{voxels}, this grid {count(instead)}"
    return None, voxels


def count(voxels: float) -> str:
    """Spell a number of voxels with three digits."""
    return f"{voxels / 1e6:.3g} M" if voxels >= 1e5 else f"{voxels / 1e3:.3g} k"
