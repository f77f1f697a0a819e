"""Intensities as nnU-Net normalises them, one scheme a channel, and the crop that goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialCrop, generate_spatial_bounding_box
from scipy.ndimage import binary_fill_holes

from .errors import UserError

SCHEMES = ("zscore", "zscore_nonzero", "rescale_to_0_1", "rgb_to_0_1", "none")
CT = ("clip", "mean", "std")
EPSILON = 1e-8  # nnU-Net's, so that a constant channel becomes zero


def schemes(intensity: str | Mapping | Sequence[str | Mapping], channels: int) -> list[str | dict]:
    """The control panel's `intensity`, one scheme for all channels or one each, as a list.

    A scheme is one of

    - "zscore": zero mean and unit variance over the whole image (nnU-Net v1's for MR);
    - "zscore_nonzero": the same within the non-zero voxels, holes filled; the others stay 0 (for skull-stripped MR);
    - {"clip": [low, high], "mean": m, "std": s}: clipped, then shifted and scaled (nnU-Net's for CT, from its plan);
    - "rescale_to_0_1": from smallest to largest; "rgb_to_0_1": divided by 255; "none".

    Raises:
        UserError: an unknown scheme, or another number of them than of channels.
    """
    single = isinstance(intensity, str | Mapping)
    found = [intensity] * channels if single else list(intensity)
    if len(found) != channels:
        raise UserError(
            f"intensity has {len(found)} schemes for {channels} channels; give one for each, or one for all."
        )
    for scheme in found:
        if scheme not in SCHEMES and not (isinstance(scheme, Mapping) and sorted(scheme) == sorted(CT)):
            raise UserError(
                f"intensity is {scheme!r}; expected one of {', '.join(SCHEMES)}, or a dictionary of clip, mean and std."
            )
    return found


class Intensityd(MapTransform):
    """Normalises an image (C, *space) by its channels' schemes.

    It stands in the list twice, since "zscore_nonzero" needs the stored voxels (interpolation would smear the border of
    its mask) and all others the voxels of the network's grid, as in nnU-Net v1.

    Args:
        keys: images.
        intensity: see `schemes`.
        stage: "stored", before resampling, or "grid", after it.
    """

    def __init__(self, keys: KeysCollection, intensity: str | Mapping | Sequence, stage: str) -> None:
        super().__init__(keys)
        if stage not in ("stored", "grid"):
            raise ValueError(f"stage is {stage!r}, expected 'stored' or 'grid'.")
        self.intensity, self.stage = intensity, stage

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            found = schemes(self.intensity, len(out[key]))
            at_stage = [(scheme == "zscore_nonzero") == (self.stage == "stored") for scheme in found]
            if any(at_stage) and not all(scheme == "none" for scheme in found):
                out[key] = self._normalised(out[key], found, at_stage)
        return out

    @staticmethod
    def _normalised(image: torch.Tensor, found: Sequence[str | Mapping], at_stage: Sequence[bool]) -> torch.Tensor:
        image, inside = image.float().clone(), None
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image  # the same memory
        if "zscore_nonzero" in found and at_stage[found.index("zscore_nonzero")]:
            inside = torch.from_numpy(binary_fill_holes((plain != 0).any(dim=0).cpu().numpy())).to(image.device)
        for channel, scheme, now in zip(plain, found, at_stage, strict=True):
            if not now or scheme == "none":
                continue
            if isinstance(scheme, Mapping):
                channel.clamp_(*scheme["clip"]).sub_(scheme["mean"]).div_(max(scheme["std"], EPSILON))
            elif scheme == "rescale_to_0_1":
                channel.sub_(channel.min()).div_(channel.max().clamp_min(EPSILON))
            elif scheme == "rgb_to_0_1":
                channel.div_(255)
            elif scheme == "zscore":
                channel.sub_(channel.mean()).div_(channel.std(correction=0) + EPSILON)
            elif inside.any():
                values = channel[inside]
                channel.sub_(values.mean()).div_(values.std(correction=0) + EPSILON).mul_(inside)
        return image


class CropNonzerod(MapTransform):
    """Crops an image (C, *space) to the box of its non-zero voxels, as nnU-Net does first; one that is all zero stays.

    Args:
        keys: images; their affines follow, so that labels and masks keep their place.
        enabled: false passes everything on.
    """

    def __init__(self, keys: KeysCollection, enabled: bool = True) -> None:
        super().__init__(keys)
        self.enabled = enabled

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out) if self.enabled else ():
            start, end = generate_spatial_bounding_box(out[key], select_fn=lambda x: x != 0, allow_smaller=True)
            if np.all(np.array(end) > np.array(start)):
                out[key] = SpatialCrop(roi_start=start, roi_end=end)(out[key])
        return out
