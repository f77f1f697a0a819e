"""Every second voxel, taken and added to, with the gradients of slices."""

from __future__ import annotations

import pytest
import torch

from scripts.kernels import every_second


@pytest.mark.parametrize("space", [(6, 4, 8), (5, 4, 7), (6, 4), (2, 2, 2)])
def test_values_and_gradients_are_those_of_slices(space):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *space, dtype=torch.float64, requires_grad=True)
    slices = (slice(None), slice(None), *[slice(0, None, 2)] * len(space))
    assert torch.equal(every_second.take(x), x[slices])
    assert torch.autograd.gradcheck(every_second.take, x)
    y = torch.randn(2, 3, *[n // 2 * 2 for n in space], dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, *[n // 2 for n in space], dtype=torch.float64, requires_grad=True)
    found = every_second.add(y.clone(), z)
    expected = y.detach().clone()
    expected[(slice(None), slice(None), *[slice(1, None, 2)] * len(space))] += z.detach()
    assert torch.equal(found, expected)
    assert torch.autograd.gradcheck(lambda y, z: every_second.add(y.clone(), z), (y, z))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_both_may_be_without_a_gradient(frozen):
    parts = [torch.ones(1, 1, 4, 4, requires_grad=frozen != 0), torch.ones(1, 1, 2, 2, requires_grad=frozen != 1)]
    every_second.add(parts[0] + 0, parts[1]).sum().backward()
    assert [part.grad is None for part in parts] == [frozen == 0, frozen == 1]


def test_memory_is_channels_last():
    found = every_second.take(torch.ones(1, 16, 4, 4, 4, requires_grad=True))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
