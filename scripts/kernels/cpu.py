"""The operations of a MedNeXt block on a CPU: channels-last, a tile at a time, nothing of the hidden size kept.

- A depthwise convolution and its input gradient (a convolution with the flipped kernel, or the transposed one) are
  oneDNN's forward convolution wherever that is an ordinary convolution; the rest is `native`, else `fallback`.
- Norm, expansion, GELU, GRN, compression and residual are `mlp` on the rows of `native_mlp`, else of `cpu_mlp`.

Sums over voxels are kept in float32 at least, those of the norm in float64. Under autocast to bfloat16 activations and
products are bfloat16; weights stay as they are and get their gradients in their own precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import mlp, native
from .backend import Moments, Weights, channels_last, foreign, plain
from .cpu_mlp import CpuRows
from .fallback import Fallback
from .native import Native
from .native_mlp import NativeRows
from .reference import CONV, pointwise


class Helper(Protocol):
    """The operations that oneDNN lacks or does slowly, on channels-last tensors."""

    def transposed(self, x: Tensor, weight: Tensor, bias: Tensor, stride: int, size: Sequence[int]) -> Tensor:
        """Compute the transposed depthwise convolution of x (N, C, *space) to (N, C, *size).

        It is also the input gradient of the convolution that made (N, C, *space) of (N, C, *size).
        """
        ...

    def weight_gradient(self, fine: Tensor, coarse: Tensor, stride: int, weight: Tensor) -> Tensor:
        """Compute the gradient of the weights of the depthwise convolution from `fine` to `coarse`: (C, 1, k, ..).

        One of the two is what the convolution got, the other the gradient of what it made.
        """
        ...

    def moments(self, x: Tensor) -> Moments:
        """Compute mean and variance over space of x (N, C, *space), in float64."""
        ...


NATIVE, FALLBACK = Native(), Fallback()
NATIVE_ROWS, CPU_ROWS = NativeRows(), CpuRows()


def _helper(x: Tensor, edge: int = 3) -> Helper:
    return NATIVE if NATIVE.suits(x, edge) else FALLBACK


def _rows(y: Tensor, weights: Weights, trains: bool) -> mlp.Rows:
    return NATIVE_ROWS if NATIVE_ROWS.suits(y, weights, trains) else CPU_ROWS


class Cpu:
    """oneDNN's convolutions and matrix products, and kernels in C++ where there is a compiler; see `Backend`."""

    name = "cpu"

    def unsuitable(self, x: Tensor, kernel_size: int | None = None) -> str | None:
        """Say why the operations cannot run on x (N, C, *space), if they cannot; they can with any kernel."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return "a graph is being recorded, which needs stock operators"
        if reason := foreign(x):
            return reason
        if x.device.type != "cpu" or x.dtype not in native.STORED:
            return f"the input is {x.dtype} on {x.device}; it needs float32, bfloat16 or float64 on a CPU"
        return None

    def incomplete(self, x: Tensor) -> str | None:
        """Say why x (N, C, *space) would be computed with `fallback` instead of `native`, if it would."""
        try:
            native.library()
        except native.UnavailableError as reason:
            return str(reason)
        if x.shape[1] % native.LANES:
            return f"{x.shape[1]} channels are no multiple of {native.LANES}"
        return None

    def faster(self, x: Tensor, kernel_size: int | None) -> bool:
        """Tell that it is faster wherever it can be used."""
        return True

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, transposed: bool = False
    ) -> tuple[Tensor, None]:
        """Convolve every channel with its own kernel, channels-last."""
        return _Depthwise.apply(plain(x), weight, bias, stride, transposed), None

    def mlp(
        self,
        y: Tensor,
        weights: Weights,
        eps: float,
        over_sum: bool = False,
        residual: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Tensor:
        """Compute norm, expansion, GELU, GRN, compression and residual, channels-last."""
        residual = residual if residual is None else plain(residual)
        return _Mlp.apply(plain(y), moments, eps, over_sum, residual, *weights)

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with a 1x1x1 kernel: a matrix product on channels-last memory."""
        return pointwise(x, weight, bias)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, transposed):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.transposed, ctx.bias_dtype = stride, transposed, bias.dtype
        if transposed:
            size = [stride * (n - 1) + 1 for n in x.shape[2:]]
            return _helper(x, weight.shape[-1]).transposed(x, weight, bias, stride, size)
        return _convolve(x, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        stride = ctx.stride
        g = channels_last(g)
        helper = _helper(x, weight.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            if ctx.transposed:
                dx = _convolve(g, weight, None, stride)
            elif stride == 1:
                dx = _convolve(g, weight.flip(*range(2, g.dim())), None)
            else:
                dx = helper.transposed(g, weight, weight.new_zeros(len(weight)), stride, x.shape[2:])
        if ctx.needs_input_grad[1]:
            fine, coarse = (g, x) if ctx.transposed else (x, g)
            dweight = helper.weight_gradient(fine, coarse, stride, weight)
        if ctx.needs_input_grad[2]:
            mean, _ = helper.moments(g)
            dbias = (mean.sum(0) * g.shape[2:].numel()).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    y = CONV[x.dim()](x, weight.to(x.dtype), bias, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight))
    return channels_last(y)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, moments, eps, over_sum, residual, *weights):
        moments = _helper(y).moments(y) if moments is None else moments
        rows = _rows(y, Weights(*weights), trains=False)
        out, kept = mlp.forward(rows, y, moments, eps, Weights(*weights), over_sum, residual)
        ctx.save_for_backward(y, *kept, *weights)
        ctx.over_sum, ctx.has_residual = over_sum, residual is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, scale, shift, energy, *weights = ctx.saved_tensors
        g = channels_last(g)
        kept = mlp.Kept(scale, shift, energy)
        rows = _rows(y, Weights(*weights), trains=True)
        dy, grads = mlp.backward(rows, g, y, Weights(*weights), ctx.over_sum, kept)
        return dy, None, None, None, g if ctx.has_residual else None, *grads
