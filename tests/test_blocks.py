"""The blocks alone: shapes, norms, Global Response Normalisation, the original's way of calling them."""

import pytest
import torch

from scripts.blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # see test_mednext.py


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm_type", ["group", "layer"])  # a module of torch, a module of ours
@pytest.mark.parametrize("space", [(8, 6), (8, 6, 4)], ids=["2d", "3d"])
def test_each_block_works_alone(space, norm_type):
    options = {"exp_r": 2, "kernel_size": 3, "do_res": True, "norm_type": norm_type, "dim": f"{len(space)}d"}
    x = torch.randn(2, 4, *space)
    assert MedNeXtBlock(4, 4, **options)(x).shape == (2, 4, *space)
    assert MedNeXtDownBlock(4, 8, **options)(x).shape == (2, 8, *(n // 2 for n in space))
    up = MedNeXtUpBlock(4, 2, **options)(x)
    assert up.shape == (2, 2, *(2 * n for n in space))
    for axis in range(2, up.dim()):  # the plane that completes 2n is zero and on the low side
        assert not up.select(axis, 0).any()
        assert up.select(axis, -1).any()


@pytest.mark.parametrize("space", [(5, 7), (5, 7, 3)], ids=["2d, where the original mixes axes up", "3d"])
def test_layer_norm_is_over_the_channels_of_each_voxel(space):
    norm = MedNeXtBlock(6, 6, kernel_size=3, norm_type="layer", dim=f"{len(space)}d").double().norm
    x = 3 * image(2, 6, *space) + 1
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt(), **ROUNDING)
    torch.testing.assert_close(norm(x).mean(1), torch.zeros_like(x[:, 0]), **ROUNDING)


def test_the_norm_of_a_large_patch_is_exact_to_float32_in_channels_last():
    norm = MedNeXtBlock(4, 4, kernel_size=3).norm
    x = torch.randn(1, 4, 64, 64, 64, generator=torch.Generator().manual_seed(1)) + 3  # a mean, as images have
    y = norm(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(y, norm.double()(x.double()).float())  # torch's own tolerance for float32


@pytest.mark.parametrize(("grn", "over"), [(True, "mean"), ("mean", "mean"), ("sum", "sum")])
@pytest.mark.parametrize("dim", ["2d", "3d"])
def test_grn_weighs_each_channel_by_its_share_of_the_energy(dim, grn, over):
    torch.manual_seed(0)
    block = MedNeXtBlock(3, 3, exp_r=2, kernel_size=3, dim=dim, grn=grn).double()
    block.grn_gamma.data.normal_()
    block.grn_beta.data.normal_()
    x = image(2, 3, *(6, 5, 4)[: int(dim[0])])
    space = tuple(range(2, x.dim()))
    hidden = torch.nn.functional.gelu(block.conv2(block.norm(block.conv1(x))))
    energy = hidden.square().sum(space, keepdim=True).sqrt()
    share = energy / (getattr(energy, over)(1, keepdim=True) + 1e-6)
    expected = x + block.conv3(block.grn_gamma * hidden * share + block.grn_beta + hidden)
    torch.testing.assert_close(block(x), expected, **ROUNDING)


def test_grn_in_half_precision_survives_energies_beyond_its_range():
    torch.manual_seed(0)
    block = MedNeXtBlock(4, 4, exp_r=4, kernel_size=3, grn="sum")
    block.conv2.weight.data.mul_(3000)  # hidden values near 3000: each channel's energy is over 65504
    block.conv3.weight.data.mul_(1e-3)
    block.grn_gamma.data.fill_(1.0)
    x = image(1, 4, 16, 16, 16)
    exact = block.double()(x)
    half = block.half()(x.half())
    assert half.isfinite().all()
    assert (half - exact).abs().max() < 0.01 * exact.abs().max()  # half precision has three digits


def test_a_second_argument_is_taken_as_in_the_original_and_unused():
    x = image(1, 2, 4, 4)
    for kind in (MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock):
        block = kind(2, 2, kernel_size=3, dim="2d").double()
        assert torch.equal(block(x, torch.ones(1)), block(x))
