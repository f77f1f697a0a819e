"""Checks of single files: what makes a training impossible is a UserError with the file, both values and the fix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..utils.errors import UserError
from .geometry import Geometry, StoredImage

AFFINE_TOLERANCE = 1e-3  # in rotation and spacing: what tools leave behind when they rewrite a header
MICROSCOPY = 0.01  # mm; the tolerance shrinks with voxels smaller than that
ORIGIN_TOLERANCE = 0.1  # of the smallest spacing


def check_image(image: StoredImage) -> None:
    """Raise UserError unless the voxels are finite, and those of a scan or of several channels."""
    voxels = image.voxels
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        raise UserError(
            f"{image.path} has {int((~np.isfinite(voxels)).sum())} NaN or infinite voxels; expected finite intensities:"
            " repair the file."
        )
    if voxels.ndim not in (3, 4):
        raise UserError(f"{image.path} has the shape {voxels.shape}; expected a 3D scan, or 4D with the channels last.")


def label_indices(label: StoredImage, file_values: Sequence[int]) -> np.ndarray:
    """Return the place of each voxel's value among `file_values`, see labels.py.

    Raises:
        UserError: the file holds another value.
    """
    voxels = label.voxels
    stored = np.unique(np.concatenate([np.unique(plane) for plane in voxels]))  # whole volumes would be sorted in int64
    found = stored * label.slope + label.intercept
    known = np.isfinite(found) & (np.abs(found - np.rint(found)) < 1e-3) & np.isin(np.rint(found), file_values)
    closed = list(file_values) == list(range(len(file_values)))
    if not known.all():
        shown = ", ".join(f"{v:g}" for v in (found[~known] if np.isfinite(found).all() else found)[:5])
        named = f"0 to {len(file_values) - 1}" if closed else ", ".join(map(str, file_values))
        raise UserError(
            f"{label.path} has the label value {shown}; dataset.json names {named}: correct the file or dataset.json."
        )
    plain = not label.scaled and np.issubdtype(voxels.dtype, np.integer)
    integers = voxels if plain else np.rint(voxels * label.slope + label.intercept).astype(np.int16)
    if closed:
        return integers
    index = np.zeros(max(file_values) + 1, np.int16)
    index[list(file_values)] = np.arange(len(file_values))
    return index[integers]


def check_same_grid(path: str, one: Geometry, other_path: str, other: Geometry) -> None:
    """Raise UserError unless two files of one case have the same voxels at the same place."""
    if one.shape != other.shape:
        raise UserError(f"{path} has {one.shape} voxels but {other_path} has {other.shape}; export them on one grid.")
    difference = np.abs(one.affine - other.affine)
    far = ORIGIN_TOLERANCE * min(other.spacing)
    near = AFFINE_TOLERANCE * min(1.0, max(other.spacing) / MICROSCOPY)
    if difference[:3, :3].max() > near or difference[:3, 3].max() > far:
        raise UserError(
            f"{path} lies elsewhere than {other_path}: affine {np.round(one.affine[:3], 4).tolist()} against"
            f" {np.round(other.affine[:3], 4).tolist()}; export them on one grid or copy the right header."
        )
