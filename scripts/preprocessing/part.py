"""The part of a scan that is brought onto a network's grid: a box, whose voxels there are those of the whole scan."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialCrop, SpatialResample

PART = "part"  # of a scan's metadata: a box of its voxels (2, 3), first and behind the last; without it all is meant
SEGMENTED = "segmented"  # of a mask's metadata, report.csv, masks.json: how much of the scan, where it was looked for
SUPPORT = 8  # voxels about the box, beyond which a cubic spline knows nothing of the others (to 4e-6 of their range)
ROUNDING = 1e-6  # of a voxel


def segmented(meta: Mapping) -> dict[str, str]:
    """Return what a mask's metadata say of the part of its scan that was segmented, by its name; else nothing."""
    return {SEGMENTED: meta[SEGMENTED]} if SEGMENTED in meta else {}


def part_shape(image: MetaTensor) -> list[int]:
    """Count the voxels along each axis that are to be brought onto a grid of an image (C, X, Y, Z)."""
    start, stop = image.meta.get(PART, ((0, 0, 0), image.shape[1:]))
    return [int(b) - int(a) for a, b in zip(start, stop, strict=True)]


def resample_part(image: MetaTensor, whole: MetaTensor, resample: SpatialResample) -> MetaTensor:
    """Resample the part of an image (C, X, Y, Z): the voxels that resampling the whole gives there.

    Args:
        image: on its own voxels, with its `PART`.
        whole: the image resampled lazily, so that its grid is known and nothing was computed.
        resample: how.
    """
    affine = torch.as_tensor(whole.peek_pending_affine(), dtype=torch.float64)
    to_scan = torch.linalg.inv(image.affine.double().cpu()) @ affine
    box = np.array(image.meta[PART], dtype=np.float64) - 0.5  # from face to face
    first, end = _mapped(torch.linalg.inv(to_scan), box) + 0.5
    shape = whole.peek_pending_shape()
    start = [min(max(math.floor(a + ROUNDING), 0), n - 1) for a, n in zip(first, shape, strict=True)]
    stop = [max(min(math.ceil(b - ROUNDING), n), a + 1) for a, b, n in zip(start, end, shape, strict=True)]
    low, high = _mapped(to_scan, np.array([start, stop]) - [[0], [1]])
    near = SpatialCrop(
        roi_start=[max(math.floor(a) - SUPPORT, 0) for a in low], roi_end=[math.ceil(b) + SUPPORT + 1 for b in high]
    )(image)
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor(start)
    made = resample(near, dst_affine=affine @ shift, spatial_size=(np.array(stop) - start).tolist())
    assert isinstance(made, MetaTensor), "as the image is"
    made.meta.pop(PART)
    return made


def _mapped(matrix: torch.Tensor, points: np.ndarray) -> np.ndarray:
    """Map points (n, 3) by a matrix (4, 4)."""
    return points @ matrix[:3, :3].numpy().T + matrix[:3, 3].numpy()
