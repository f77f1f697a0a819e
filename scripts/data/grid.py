"""What a scan becomes on a network's grid, known from its header: refused before anything of that size is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..utils.device import total_memory
from ..utils.errors import UserError

SMALLEST = 16  # voxels: what the network halves four times
# bytes a voxel while it is resampled, and for each channel (docs/benchmarks/preprocessing_2-core-cpu_2026-11-21.md)
PEAK_BYTES, CHANNEL_BYTES = 40, 8
UNITS = ((1e-9, "pm"), (1e-6, "nm"), (1e-3, "um"), (1.0, "mm"), (1e3, "m"))  # mm each


def grid_fault(
    name: str, shape: Sequence[int], spacing: Sequence[float], grid: Sequence[float], channels: int = 1
) -> str | None:
    """Say in one sentence why a scan cannot be brought onto a grid, or return None.

    Args:
        name: of the file.
        shape: voxels of the scan, along the axes x, y, z.
        spacing: of the scan in mm.
        grid: spacing of the network's grid in mm.
        channels: of the scan.
    """
    if not all(math.isfinite(edge) and edge > 0 for edge in (*spacing, *grid)):
        return None  # other checks say so
    wanted = [n * edge / step for n, edge, step in zip(shape, spacing, grid, strict=True)]
    needed = resampling_bytes(wanted, channels)
    memory = total_memory()
    if max(wanted) >= SMALLEST - 0.5 and needed <= memory:
        return None
    if needed > memory:
        reason = f"take {needed / 1e9:.4g} GB of memory, of which this computer has {memory / 1e9:.3g}"
    else:
        reason = f"are under {SMALLEST} along every axis, too few for the network"
    fitting = [float(f"{edge * min(1.0, max(shape) / SMALLEST):.3g}") for edge in spacing]
    made = " x ".join(f"{n:.3g}" for n in wanted)
    return (
        f"{name} has {' x '.join(map(str, shape))} voxels of {_lengths(spacing)}: the {made} on a grid of"
        f" {_lengths(grid)} {reason}; correct the unit of its header, or plan and train on a grid like its own:"
        f' --spacing "{fitting}", or --spacing median in planning.'
    )


def require_grid(
    name: str, shape: Sequence[int], spacing: Sequence[float], grid: Sequence[float], channels: int = 1
) -> None:
    """Raise UserError where `grid_fault` finds one."""
    if fault := grid_fault(name, shape, spacing, grid, channels):
        raise UserError(fault)


def resampling_bytes(shape: Sequence[float], channels: int) -> float:
    """Count the bytes that resampling onto a grid of so many voxels takes."""
    return math.prod(map(float, shape)) * (PEAK_BYTES + CHANNEL_BYTES * channels)


def record_faults(records: Sequence[dict], grid: Sequence[float]) -> list[tuple[dict, str]]:
    """List the records of cases, see planning/fingerprint.py, that have a fault on a grid, each with its sentence."""
    found = [(r, grid_fault(r["file"], r["shape"], r["spacing"], grid, len(r["channels"]))) for r in records]
    return [(record, fault) for record, fault in found if fault]


def _lengths(edges: Sequence[float]) -> str:
    """Spell edges in mm, and where that is unusual in their own unit as well."""
    text = " x ".join(f"{edge:.4g}" for edge in edges) + " mm"
    size = max(edges)
    if 1e-2 <= size < 1e3:
        return text
    scale, unit = next(((scale, unit) for scale, unit in reversed(UNITS) if scale <= size), UNITS[0])
    return f"{text} ({' x '.join(f'{edge / scale:.4g}' for edge in edges)} {unit})"
