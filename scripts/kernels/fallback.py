"""The operations of `native` out of stock operators, for machines without a compiler and numbers of channels it lacks.

The transposed convolution of stride 2 falls into one ordinary convolution on the small grid for each parity of the
voxels it makes (the polyphase form): the same products and sums, but without oneDNN's slow transposed path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F

from .backend import CHANNELS_LAST, Moments
from .reference import CONV

PLANES = 2  # that a weight gradient is summed over at a time


class Fallback:
    """The operations that oneDNN does slowly, put together from others of PyTorch: see `cpu.Helper`."""

    def transposed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, size: Sequence[int]
    ) -> torch.Tensor:
        """Convolve once for each parity of the voxels that are made."""
        axes, p = len(size), weight.shape[-1] // 2
        y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, memory_format=CHANNELS_LAST[x.dim()])
        margin = p + 1
        padded = F.pad(x, [margin] * 2 * axes)
        weight, bias = weight.detach().to(x.dtype), bias.detach().to(x.dtype)
        for phase in product(range(stride), repeat=axes):  # voxels phase, phase + stride, .. of each axis
            made, taken, source = [slice(None)] * 2, [slice(None)] * 2, [slice(None)] * 2
            for first, n in zip(phase, size, strict=True):
                tap = (first + p) % stride
                taps = len(range(tap, 2 * p + 1, stride))
                count = len(range(first, n, stride))
                start = (first + p - tap) // stride - (taps - 1) + margin  # the last tap sees the lowest voxel
                made.append(slice(first, None, stride))
                taken.append(slice(tap, None, stride))
                source.append(slice(start, start + count + taps - 1))
            if y[tuple(made)].numel():
                kernel = weight[tuple(taken)].flip(*range(2, 2 + axes))
                y[tuple(made)] = CONV[x.dim()](padded[tuple(source)], kernel, bias, groups=len(weight))
        return y

    def weight_gradient(
        self, fine: torch.Tensor, coarse: torch.Tensor, stride: int, weight: torch.Tensor
    ) -> torch.Tensor:
        """Sum the stock operator's gradients of two planes at a time.

        torch 2.13 adds up channels-last tensors naively here: with errors several times those of its path for
        contiguous ones, which takes up to 5 times as long. Two planes at a time bring them below it, and cost nothing.
        """
        if stride > 1:
            gradient = _weight_gradient(fine.contiguous(), coarse.contiguous(), stride, weight, weight.shape[-1] // 2)
            return gradient.to(weight.dtype)
        p, depth = weight.shape[2] // 2, coarse.shape[2]
        padded = F.pad(fine, [0, 0] * (fine.dim() - 3) + [p, p])
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for case in range(len(fine)):
            for start in range(0, depth, PLANES):
                some = slice(start, min(start + PLANES, depth))
                seen = padded[case, None, :, some.start : some.stop + 2 * p]
                total += _weight_gradient(seen, coarse[case, None, :, some], 1, weight, 0)
        return total.to(weight.dtype)

    def moments(self, x: torch.Tensor) -> Moments:
        """Reduce with the stock operator, in float32 at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, dim=list(range(2, x.dim())), correction=0)
        return mean.double(), variance.double()


def _weight_gradient(
    fine: torch.Tensor, coarse: torch.Tensor, stride: int, weight: torch.Tensor, padding: int
) -> torch.Tensor:
    """Call the stock operator; `padding` is that of the first axis."""
    axes, p = fine.dim() - 2, weight.shape[-1] // 2
    zeros, mask = [0] * axes, [False, True, False]
    shape = ([stride] * axes, [padding] + [p] * (axes - 1), [1] * axes, False, zeros, len(weight), mask)
    return torch.ops.aten.convolution_backward(coarse, fine, weight.detach().to(fine.dtype), None, *shape)[1]
