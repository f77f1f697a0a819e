"""Loading a scan or a label as the bundle's one reader sees it, for MONAI's transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_data_type, ensure_tuple

from ..data.checks import check_image, check_same_grid
from ..data.geometry import Geometry
from ..data.images import read_image
from ..data.scans import case_id

CASE = "case"  # of a case and of a tensor's metadata: its id, which names masks and rows of tables


class LoadScand(MapTransform):
    """Loads scans as MONAI's LoadImaged does: (channels, X, Y, Z) float32, with the case's id in the metadata.

    It is none of these, into whose inner parts hosts reach. What is a tensor or an array already, as a host may give
    it, becomes float32, and gets the axis of its one channel where its three axes are those of space.

    Args:
        keys: files, or lists of files with a channel each.
    """

    def __call__(self, data: Mapping) -> dict:
        """Load the files of each key.

        Raises:
            UserError: a file that cannot be read, or channels on different grids.
        """
        out = dict(data)
        for key in self.key_iterator(out):
            given = out[key]
            if isinstance(given, np.ndarray | torch.Tensor):
                out[key] = _as_loaded(given)
            else:
                out[key] = load_scan(given, data.get(CASE))
        return out


def _as_loaded(given: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Give voxels in memory what a loaded scan has besides them."""
    image: Any = convert_data_type(given if given.ndim != 3 else given[None], dtype=torch.float32)[0]
    if isinstance(image, MetaTensor):
        for name, value in (
            ("spatial_shape", np.array(image.shape[1:])),
            ("original_affine", image.affine.cpu().numpy()),
        ):
            image.meta.setdefault(name, value)
    return image


def load_scan(files: str | Path | Sequence[str | Path], case: str | None = None) -> MetaTensor:
    """Load one file, or several with a channel each.

    Args:
        files: the file or files.
        case: id of the case; by default what the name of the first file says.

    Returns:
        (channels, X, Y, Z) float32 with its affine in mm, and in the metadata what MONAI's own loader leaves.

    Raises:
        UserError: a file that cannot be read, or channels on different grids.
    """
    paths = [str(file) for file in ensure_tuple(files)]
    images = [read_image(path) for path in paths]
    for image in images:
        check_image(image)
        check_same_grid(image.path, image.geometry, images[0].path, images[0].geometry)
    channels = [channel for image in images for channel in image.channels()]
    voxels = np.empty((len(channels), *images[0].geometry.shape), np.float32)
    for place, channel in zip(voxels, channels, strict=True):
        place[:] = channel.values
    return as_scan(voxels, images[0].geometry, paths[0], case or case_id(Path(paths[0]), 1))


def as_scan(voxels: np.ndarray, geometry: Geometry, path: str | None = None, case: str | None = None) -> MetaTensor:
    """Give voxels (channels, X, Y, Z) their place, as metadata that MONAI's transforms understand."""
    meta = {
        "original_affine": geometry.affine,
        "spatial_shape": np.array(geometry.shape),
        "space": "RAS",
        "header": geometry.disagreement,
        **({} if path is None else {"filename_or_obj": path}),
        **({} if case is None else {CASE: case}),
    }
    return MetaTensor(torch.from_numpy(voxels), affine=torch.from_numpy(geometry.affine.copy()), meta=meta)
