"""The check of a scan as it is loaded, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..data.grid import require_grid
from ..utils.device import total_memory
from ..utils.errors import UserError


class CheckGridd(MapTransform):
    """Passes an image (C, X, Y, Z) on if it can be brought onto a network's grid, before it is.

    Args:
        keys: images on their stored voxels in RAS order.
        spacing: of the network's grid in mm.

    Raises:
        UserError: fewer voxels than the network needs, or more than memory holds; the message names the file.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float]) -> None:
        super().__init__(keys)
        self.spacing = [float(edge) for edge in spacing]
        total_memory()  # asks the system now, so that nothing is read while an array in memory is segmented

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            if isinstance(image, MetaTensor):
                name = str(image.meta.get("filename_or_obj", "the image"))
                require_grid(name, list(image.shape[1:]), image.pixdim.tolist(), self.spacing, len(image))
        return data


class CheckScand(MapTransform):
    """Passes a loaded image (C, X, Y, Z) on if a network can work with it, and names what is wrong with it if not.

    Args:
        keys: images to check.
        channels: number of channels they must have.

    Raises:
        UserError: channel count, NaN or infinite voxels, or a grid without a volume; the message names the file.
    """

    def __init__(self, keys: KeysCollection, channels: int) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            name = image.meta.get("filename_or_obj", key) if isinstance(image, MetaTensor) else key
            check_voxels(str(name), image, self.channels)
        return data


def check_voxels(name: str, image: torch.Tensor, channels: int) -> None:
    """Check the axes, channels and values of an image (C, *space).

    Args:
        name: name of its file, for the message.
        image: the image as it was loaded.
        channels: number of channels it must have.

    Raises:
        UserError: it has not, or NaN or infinite voxels.
    """
    if image.ndim != 4:
        raise UserError(f"{name} has {image.ndim - 1} spatial axes; expected a 3D scan.")
    if image.shape[0] != channels:
        raise UserError(
            f"{name} has {image.shape[0]} channels; the network takes {channels}: give case_0000 .. "
            f"case_{channels - 1:04d} or one 4D file a case."
        )
    if not torch.isfinite(image.sum(dtype=torch.float64)) and not torch.isfinite(image).all():
        bad = int((~torch.isfinite(image)).sum())
        raise UserError(f"{name} has {bad} NaN or infinite voxels; expected finite intensities: repair the file.")
