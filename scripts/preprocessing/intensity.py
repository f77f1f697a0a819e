"""Intensities as nnU-Net normalises them, one scheme a channel, and the crop that goes with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialCrop, generate_spatial_bounding_box
from scipy.ndimage import binary_fill_holes

from ..utils.errors import UserError

SCHEMES = ("zscore", "zscore_nonzero", "rescale_to_0_1", "rgb_to_0_1", "none")
CT = ("clip", "mean", "std")
EPSILON = 1e-8  # nnU-Net's, so that a constant channel becomes zero
RINGING = 0.01  # standard deviations; what cubic interpolation leaves some voxels outside a mask
ORDINARY = (0.25, 2.0**50)  # largest magnitude; below, EPSILON counts, above, squares leave float32
SCALES = "scales"  # of an image's metadata: of a channel what normalises it, where it is a part of a scan
FLAT = 2.0**-21  # of the largest magnitude; what float32 and interpolation leave of a constant image

Intensity = str | Mapping | Sequence[str | Mapping]


def schemes(intensity: Intensity, channels: int) -> list[str | Mapping]:
    """List the scheme of each channel by the setting `intensity`, which has one for all channels or one for each.

    A scheme is one of

    - "zscore": zero mean and unit variance over the whole image (nnU-Net v1's for MR);
    - "zscore_nonzero": the same within the non-zero voxels, holes filled; the others stay 0 (for skull-stripped MR);
    - {"clip": [low, high], "mean": m, "std": s}: clipped, then shifted and scaled (nnU-Net's for CT, from its plan);
    - "rescale_to_0_1": from smallest to largest; "rgb_to_0_1": divided by 255; "none".

    The z-scores and "rescale_to_0_1" do not depend on the unit of intensity, from 1e-30 to 1e30 of an ordinary one.

    Raises:
        UserError: an unknown scheme, or another number of them than of channels.
    """
    found = [intensity] * channels if isinstance(intensity, str | Mapping) else list(intensity)
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


def masked(intensity: Intensity, channels: int) -> list[int]:
    """List the channels that are 0 outside the region in which they are normalised."""
    return [channel for channel, scheme in enumerate(schemes(intensity, channels)) if scheme == "zscore_nonzero"]


class Intensityd(MapTransform):
    """Normalises an image (C, *space) by its channels' schemes.

    It stands in the list twice, since "zscore_nonzero" needs the native voxels (interpolation would smear the border of
    its mask) and all others the resampled ones, as in nnU-Net v1. What rang around the mask when it was interpolated is
    set to 0 again after resampling.

    Args:
        keys: images.
        intensity: see `schemes`.
        stage: "native", before resampling, or "resampled", after it.
    """

    def __init__(self, keys: KeysCollection, intensity: Intensity, stage: str) -> None:
        super().__init__(keys)
        if stage not in ("native", "resampled"):
            raise ValueError(f"stage is {stage!r}, expected 'native' or 'resampled'.")
        self.intensity, self.stage = intensity, stage

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            found = schemes(self.intensity, len(out[key]))
            within = masked(self.intensity, len(out[key]))
            everywhere = [c for c, scheme in enumerate(found) if c not in within and scheme != "none"]
            if not (within or (everywhere and self.stage == "resampled")):
                continue
            out[key] = out[key].float().clone()
            plain = out[key].as_tensor() if isinstance(out[key], MetaTensor) else out[key]  # the same memory
            if self.stage == "resampled":
                scales = getattr(out[key], "meta", {}).pop(SCALES, {})
                for channel in everywhere:
                    _normalise(plain[channel], found[channel], scales.get(channel))
            if within:
                _normalise_within(plain, within) if self.stage == "native" else _clear_outside(plain, within)
        return out


def scales_of_whole(scan: torch.Tensor, thinned: torch.Tensor, intensity: Intensity) -> dict[int, Scale]:
    """Measure what normalises the channels of a whole scan, of which only a part is to be resampled.

    Mean and deviation are those of its interpolation, which a coarser grid samples as a finer one does; interpolation
    between its voxels, whose noise it averages, has a smaller deviation than they have. Extremes are those of its
    voxels, which a coarse grid misses.

    Args:
        scan: (C, *space), on its own voxels.
        thinned: the same on a coarse grid, resampled as for the network.
        intensity: see `schemes`.
    """
    found = schemes(intensity, len(scan))
    measured = {"zscore": thinned, "rescale_to_0_1": scan}
    plain = {k: image.as_tensor() if isinstance(image, MetaTensor) else image for k, image in measured.items()}
    return {
        c: _scale(plain[scheme][c].float(), scheme)
        for c, scheme in enumerate(found)
        if isinstance(scheme, str) and scheme in plain
    }


class Scale(NamedTuple):
    """What normalises a channel: a power of two, of what that makes of it the origin, and the extent; 0 if constant."""

    power: int
    origin: torch.Tensor
    extent: torch.Tensor


def _normalise(channel: torch.Tensor, scheme: str | Mapping, scale: Scale | None) -> None:
    if isinstance(scheme, Mapping):
        channel.clamp_(*scheme["clip"]).sub_(scheme["mean"]).div_(max(scheme["std"], EPSILON))
    elif scheme == "rgb_to_0_1":
        channel.div_(255)
    else:  # zscore, rescale_to_0_1
        _apply(channel, _scale(channel, scheme) if scale is None else scale)


def _apply(channel: torch.Tensor, scale: Scale) -> None:
    """Shift and scale a channel in place."""
    _multiply(channel, scale.power)
    channel.sub_(scale.origin).div_(scale.extent) if scale.extent else channel.zero_()


def _scale(channel: torch.Tensor, scheme: str, inside: torch.Tensor | None = None) -> Scale:
    """Measure what normalises a channel: mean and deviation of its voxels `inside`, or of all, or their extremes."""
    power, magnitude = _ordinary_unit(channel)
    values = channel if inside is None else channel[inside]
    if power:
        values = values.clone()
        _multiply(values, power)
    if scheme == "rescale_to_0_1":
        origin = values.min()
        extent, noise = values.max() - origin, 4 * FLAT * magnitude  # the extent is some deviations
        return Scale(power, origin, extent.clamp_min(EPSILON) if extent >= noise else torch.zeros(()))
    mean = values.mean(dtype=torch.float64)  # in float32 it would depend on the number of threads
    deviation = (values - mean.float()).square_().mean(dtype=torch.float64).sqrt()
    constant = bool(deviation < FLAT * magnitude)
    return Scale(power, mean.float(), torch.zeros(()) if constant else (deviation + EPSILON).float())


def _ordinary_unit(channel: torch.Tensor) -> tuple[int, float]:
    """Return the power of two to multiply by where the magnitude is extreme, else 0, and the largest magnitude then.

    A power of two changes no digit, and where the magnitude is ordinary nothing is changed at all.
    """
    magnitude = max(abs(float(limit)) for limit in channel.aminmax()) if channel.numel() else 0.0
    power = 0
    if magnitude and math.isfinite(magnitude) and not ORDINARY[0] <= magnitude <= ORDINARY[1]:
        power = 10 - math.frexp(magnitude)[1]
    return power, math.ldexp(magnitude, power)


def _multiply(channel: torch.Tensor, power: int) -> None:
    for part in (power // 2, power - power // 2) if power else ():  # float32 has no 2^137
        channel.mul_(2.0**part)


def _normalise_within(image: torch.Tensor, channels: Sequence[int]) -> None:
    """Normalise the voxels in which any channel is not 0, as nnU-Net has it; all others stay 0."""
    inside = _filled(image != 0)
    for channel in channels if inside.any() else ():
        _apply(image[channel], _scale(image[channel], "zscore", inside))
        image[channel].mul_(inside)


def _clear_outside(image: torch.Tensor, channels: Sequence[int]) -> None:
    inside = _filled(image[channels].abs() > RINGING)
    for channel in channels:
        image[channel].mul_(inside)


def _filled(mask: torch.Tensor) -> torch.Tensor:
    """Mark where any channel of (C, *space) is set, holes filled: (*space)."""
    return torch.from_numpy(binary_fill_holes(mask.any(dim=0).cpu().numpy())).to(mask.device)


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
