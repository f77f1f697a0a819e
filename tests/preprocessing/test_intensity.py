"""Intensities as nnU-Net normalises them, and the crop to what is not zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity

from scripts.preprocessing.intensity import RINGING, CropNonzerod, Intensityd, schemes
from scripts.preprocessing.resampling import GridSpacingd
from scripts.utils.errors import UserError


def image(channels: int = 1) -> torch.Tensor:
    """Values about 300, zero in a frame of two voxels and in one hole inside."""
    generator = torch.Generator().manual_seed(0)
    voxels = torch.zeros(channels, 12, 10, 8)
    voxels[:, 2:-2, 2:-2, 2:-2] = 300 + 40 * torch.randn(channels, 8, 6, 4, generator=generator)
    voxels[:, 5, 5, 4] = 0
    return voxels


def normalised(voxels: torch.Tensor, intensity) -> torch.Tensor:
    data = {"image": voxels}
    for stage in ("native", "resampled"):  # as in the configs, with the resampling between them
        data = Intensityd("image", intensity, stage)(data)
    return data["image"]


def test_zscore_is_monais_and_the_input_stays():
    voxels = image(2)
    before = voxels.clone()
    expected = NormalizeIntensity(channel_wise=True)(voxels.clone())
    torch.testing.assert_close(normalised(voxels, "zscore"), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(voxels, before)


def test_zscore_nonzero_counts_holes_in_and_leaves_the_outside_zero():
    voxels = image()
    found = normalised(voxels, "zscore_nonzero")
    inside = torch.zeros_like(voxels, dtype=torch.bool)
    inside[:, 2:-2, 2:-2, 2:-2] = True  # the hole is inside
    values = voxels[inside].double()
    expected = (values - values.mean()) / values.std(correction=0)
    clear = expected.abs() > RINGING  # at the border, what is less is taken for the outside
    torch.testing.assert_close(found[inside].double()[clear], expected[clear], rtol=1e-5, atol=1e-5)
    assert (found[inside][~clear].abs() <= RINGING).all()
    assert not found[~inside].any()


def test_ct_is_clipped_shifted_and_scaled():
    voxels = torch.tensor([-1000.0, -100.0, 40.0, 300.0, 3000.0]).reshape(1, 5, 1, 1)
    found = normalised(voxels, {"clip": [-100.0, 300.0], "mean": 40.0, "std": 20.0})
    assert found.ravel().tolist() == [-7.0, -7.0, 0.0, 13.0, 13.0]


def test_each_channel_has_its_scheme():
    found = normalised(image(3), ["zscore_nonzero", "none", "rescale_to_0_1"])
    assert abs(found[0].mean()) < 0.05
    assert torch.equal(found[1], image(3)[1])
    assert (found[2].min(), found[2].max()) == (0, 1)
    assert normalised(image(), "rgb_to_0_1").max() == image().max() / 255


@pytest.mark.parametrize("intensity", ["zscore", "zscore_nonzero", "rescale_to_0_1"])
def test_a_constant_or_empty_image_becomes_finite(intensity):
    for value in (0.0, 5.0):
        assert normalised(torch.full((1, 4, 4, 4), value), intensity).isfinite().all()


@pytest.mark.parametrize(
    ("intensity", "message"),
    [
        ("ct", "intensity is 'ct'; expected one of zscore"),
        ({"mean": 0, "std": 1}, "or a dictionary of clip, mean and std"),
        (["zscore"] * 2, "2 schemes for 1 channels"),
    ],
    ids=["no scheme", "no clip", "number"],
)
def test_what_is_no_scheme_is_named(intensity, message):
    with pytest.raises(UserError, match=message):
        schemes(intensity, 1)


def test_cropping_keeps_every_voxel_at_its_place():
    affine = torch.diag(torch.tensor([2.0, 1.5, 1.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-10.0, 5.0, 7.0])
    voxels = image()
    voxels[0, 6, 4, 3] = 999
    found = CropNonzerod("image")({"image": MetaTensor(voxels, affine=affine)})["image"]
    assert found.shape == (1, 8, 6, 4)
    at = np.append(np.argwhere(found[0].numpy() == 999)[0], 1)
    np.testing.assert_allclose(found.affine.numpy() @ at, affine.numpy() @ [6, 4, 3, 1])


def test_nothing_is_cropped_where_it_is_off_or_all_is_zero():
    voxels = MetaTensor(image())
    assert CropNonzerod("image", enabled=False)({"image": voxels})["image"] is voxels
    empty = MetaTensor(torch.zeros(1, 3, 4, 5))
    assert CropNonzerod("image")({"image": empty})["image"].shape == empty.shape


def test_what_rings_around_a_mask_on_the_grid_is_zero_again():
    image = torch.zeros(2, 24, 24, 24)
    image[:, 8:16, 8:16, 8:16] = torch.randint(1, 3, (2, 8, 8, 8)).float()
    stored = Intensityd("image", "zscore_nonzero", "native")({"image": image})["image"]
    ringing = stored + 0.004 * torch.randn_like(stored).clamp(-2, 2) * (stored == 0)
    cleared = Intensityd("image", "zscore_nonzero", "resampled")({"image": ringing})["image"]
    assert torch.equal(cleared, stored)
    assert ringing.count_nonzero() > stored.count_nonzero()  # the input is left as it was


@pytest.mark.parametrize("intensity", ["zscore", "zscore_nonzero"])
def test_the_number_of_threads_changes_no_voxel(intensity):
    torch.manual_seed(0)
    voxels = 500 * torch.rand(4, 91, 109, 91) * (torch.rand(4, 91, 109, 91) > 0.7)  # float32 means differ by threads
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(normalised(voxels, intensity))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


INVARIANT = ("zscore", "zscore_nonzero", "rescale_to_0_1")


def formula(voxels: torch.Tensor, scheme: str) -> torch.Tensor:
    """Normalise as version 0.7 did, whatever the magnitude: (1, *space), all of it inside."""
    voxels = voxels.clone()
    if scheme == "rescale_to_0_1":
        voxels -= voxels.min()
        return voxels / voxels.max().clamp_min(1e-8)
    mean = voxels.mean(dtype=torch.float64)
    deviation = (voxels - mean.float()).square_().mean(dtype=torch.float64).sqrt()
    return (voxels - mean.float()) / (deviation + 1e-8).float()


def whole(seed: int = 0) -> torch.Tensor:
    """Values about 300, none of them 0."""
    return 300 + 40 * torch.randn(1, 12, 10, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["zscore", "rescale_to_0_1"])
@pytest.mark.parametrize("factor", [1e-3, 0.01, 1.0, 7.0, 1000.0, -1.0, 1e9])  # down to a scan from 0 to 1
def test_ordinary_scans_keep_every_bit(scheme, factor):
    voxels = whole() * factor
    assert torch.equal(normalised(voxels, scheme), formula(voxels, scheme))


def test_ordinary_scans_keep_every_bit_within_a_mask():
    voxels = image() / 100
    found = Intensityd("image", "zscore_nonzero", "native")({"image": voxels})["image"]
    inside = torch.zeros_like(voxels, dtype=torch.bool)
    inside[:, 2:-2, 2:-2, 2:-2] = True
    assert torch.equal(found[inside], formula(voxels[inside], "zscore"))


@pytest.mark.parametrize("scheme", INVARIANT)
@pytest.mark.parametrize("exponent", [-30, -21, -10, -7, -6, -5, -4, -3, -2, 2, 5, 10, 16, 18, 19, 25, 30])
def test_the_unit_of_intensity_changes_nothing(scheme, exponent):
    expected, found = normalised(image(), scheme), normalised(image() * 10.0**exponent, scheme)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", INVARIANT)
def test_each_channel_has_a_unit_of_its_own(scheme):
    expected = normalised(image(3), scheme)
    units = torch.tensor([1e-28, 1.0, 1e28]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(normalised(image(3) * units, scheme), expected, rtol=0, atol=1e-5)


def test_units_reach_through_the_resampling():
    voxels = MetaTensor(whole(), affine=torch.eye(4))
    found = []
    for factor in (1.0, 1e-28, 1e28):
        data = {"image": voxels * factor}
        for step in (
            Intensityd("image", "zscore", "native"),
            GridSpacingd("image", [0.7, 1.3, 1.0], mode=3, padding_mode="nearest", scale_extent=True,
                         align_corners=False, dtype="float32"),
            Intensityd("image", "zscore", "resampled"),
        ):  # fmt: skip
            data = step(data)
        found.append(data["image"].as_tensor())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", INVARIANT)
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 0.1, 1e-30, 1e-38, 1e-42, 1e18, 3e38])
def test_a_constant_image_is_zero_in_every_unit(scheme, value):
    assert not normalised(torch.full((1, 6, 5, 4), value), scheme).any()
    noise = 1 + 1e-7 * torch.randn(1, 6, 5, 4, generator=torch.Generator().manual_seed(0))  # of an interpolation
    assert scheme == "zscore_nonzero" or not normalised(value * noise, scheme).any()


def test_what_float32_can_hold_does_not_overflow():
    voxels = (3e38 * torch.linspace(-1, 1, 120)).reshape(1, 6, 5, 4)
    assert normalised(voxels, "rescale_to_0_1").max() == 1
    assert normalised(voxels, "zscore").isfinite().all()
