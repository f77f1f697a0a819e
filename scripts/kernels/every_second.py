"""Every second voxel of a tensor, read and added to: the shortcuts of blocks that change the resolution.

PyTorch differentiates a slice axis by axis, each with a tensor of zeros, and a sum into one with two copies of the
whole; here either gradient is one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def take(x: Tensor) -> Tensor:
    """Return every second voxel of x (N, C, *space), from the first on."""
    return x[_slices(x, 0)] if torch.compiler.is_compiling() else _Take.apply(x)


def add(y: Tensor, z: Tensor) -> Tensor:
    """Add z (N, C, *space) to every second voxel of y (N, C, *twice the space), from the second on, in place."""
    if not torch.compiler.is_compiling():  # a compiler differentiates slices by itself
        return _Add.apply(y, z)
    y[_slices(y, 1)] += z
    return y


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x[_slices(x, 0)].contiguous(memory_format=_format(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx = torch.empty(ctx.shape, dtype=g.dtype, device=g.device, memory_format=_format(g)).zero_()
        dx[_slices(dx, 0)] = g
        return dx


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z):
        y[_slices(y, 1)] += z
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, g[_slices(g, 1)] if ctx.needs_input_grad[1] else None


def _slices(x: Tensor, first: int) -> tuple[slice, ...]:
    return (slice(None), slice(None), *[slice(first, None, 2)] * (x.dim() - 2))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last
