"""The operations of a MedNeXt block on a CPU: channels-last, a tile at a time, nothing of the hidden size kept.

- A depthwise convolution and its input gradient (a convolution with the flipped kernel, or the transposed one) are
  oneDNN's forward convolution wherever that is an ordinary convolution; the rest is `native`, else `composed`.
- Norm, expansion, GELU, GRN, compression and residual (`expansion`) run over tiles of voxels whose hidden layer stays
  in the cache.

Sums over voxels are kept in float32 at least, those of the norm in float64. Under autocast to bfloat16 activations and
products are bfloat16; weights stay as they are and get their gradients in their own precision.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..utils.files import write_whole
from . import fallback as composed
from . import mlp as expansions
from . import native
from .mlp import Layers
from .reference import CONV, Moments, Weights, channels_last, foreign, plain, pointwise  # noqa: F401

TILE_BYTES = 2**21  # of the hidden layer of a tile; from 1 to 4 MiB made no difference on 1 MiB of L2 a core


def unsuitable(x: torch.Tensor, kernel_size: int | None = None) -> str | None:
    """Why the operations below cannot run on x (N, C, *space), if they cannot; they can with any kernel."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "a graph is being recorded, which needs stock operators"
    if reason := foreign(x):
        return reason
    if x.device.type != "cpu" or x.dtype not in native.STORED:
        return f"the input is {x.dtype} on {x.device}; it needs float32, bfloat16 or float64 on a CPU"
    return None


def missing(x: torch.Tensor) -> str | None:
    """Why x (N, C, *space) would be computed with `composed` instead of `native`, if it would."""
    try:
        native.library()
    except native.UnavailableError as reason:
        return str(reason)
    if x.shape[1] % native.LANES:
        return f"{x.shape[1]} channels are no multiple of {native.LANES}"
    return None


def _helper(x: torch.Tensor, edge: int = 3) -> ModuleType:
    return native if native.suits(x, edge) else composed


# ---- depthwise convolution


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1, transposed: bool = False
) -> tuple[torch.Tensor, None]:
    """As `reference.depthwise`, channels-last."""
    return _Depthwise.apply(plain(x), weight, bias, stride, transposed), None


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


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1) -> torch.Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    y = CONV[x.dim()](x, weight.to(x.dtype), bias, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight))
    return channels_last(y)


# ---- norm, expansion, GELU, GRN, compression, residual


def expansion(
    y: torch.Tensor,
    weights: Weights,
    eps: float,
    over_sum: bool = False,
    residual: torch.Tensor | None = None,
    moments: Moments | None = None,
) -> torch.Tensor:
    """As `reference.expansion`, channels-last."""
    residual = residual if residual is None else plain(residual)
    return _Expansion.apply(plain(y), moments, eps, over_sum, residual, *weights)


class _Expansion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, moments, eps, over_sum, residual, *weights):
        out, kept = expansions.forward(_ROWS, y, moments, eps, Weights(*weights), over_sum, residual)
        ctx.save_for_backward(y, *kept, *weights)
        ctx.over_sum, ctx.has_residual = over_sum, residual is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, scale, shift, energy, *weights = ctx.saved_tensors
        g = channels_last(g)
        kept = expansions.Kept(scale, shift, energy)
        dy, grads = expansions.backward(_ROWS, g, y, Weights(*weights), ctx.over_sum, kept)
        return dy, None, None, None, g if ctx.has_residual else None, *grads


_ROWS = sys.modules[__name__]


def moments(y: torch.Tensor) -> Moments:
    """See `expansion.Rows`, as of the next four."""
    return _helper(y).moments(y)


def _tiles(voxels: int, layers: Layers) -> list[slice]:
    rows = max(TILE_BYTES // (len(layers.first) * layers.first.element_size()), 64)
    return [slice(start, min(start + rows, voxels)) for start in range(0, voxels, rows)]


def _normalised(rows: torch.Tensor, tile: slice, scale: torch.Tensor, shift: torch.Tensor, buffer: torch.Tensor):
    return torch.addcmul(shift, rows[tile], scale, out=buffer[: tile.stop - tile.start])


def energy(y: torch.Tensor, layers: Layers) -> torch.Tensor:
    total = layers.scale.new_zeros(len(y), len(layers.first), dtype=torch.float64)
    start, tiles = layers.start.to(y.dtype), _tiles(y.shape[1], layers)
    buffer = y.new_empty(tiles[0].stop, y.shape[2])
    for n, rows in enumerate(y):
        for tile in tiles:
            z = _normalised(rows, tile, layers.scale[n], layers.shift[n], buffer)
            hidden = torch.ops.aten.gelu_(linear(z, layers.first, start)).to(layers.scale.dtype)
            total[n] += hidden.square_().sum(0)
    return total.to(layers.scale.dtype)


def forward_rows(y: torch.Tensor, layers: Layers, residual: torch.Tensor | None, out: torch.Tensor) -> None:
    scale, shift, first, start, second, end = layers
    start, end = start.to(y.dtype), end.to(y.dtype)
    tiles = _tiles(y.shape[1], layers)
    buffer = y.new_empty(tiles[0].stop, y.shape[2])
    for n, (rows, made) in enumerate(zip(y, out, strict=True)):
        for tile in tiles:
            z = _normalised(rows, tile, scale[n], shift[n], buffer)
            product = linear(torch.ops.aten.gelu_(linear(z, first, start)), second[n], end)
            if residual is None:
                made[tile] = product
            else:
                torch.add(residual[n, tile], product, out=made[tile])


def backward_rows(
    g: torch.Tensor, y: torch.Tensor, layers: Layers, along: torch.Tensor | None, dz: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    scale, shift, first, start, second, end = layers
    found = [scale.new_zeros(len(y), *t.shape, dtype=torch.float64) for t in (first, start, second[0], end)]
    start, first_back = start.to(y.dtype), first.t().contiguous()
    tiles = _tiles(y.shape[1], layers)
    buffer = y.new_empty(tiles[0].stop, y.shape[2])
    for n, (rows, grads, dfirst, dstart, dsecond, dend) in enumerate(zip(y, g, *found, strict=True)):
        second_back = second[n].t().contiguous()
        for tile in tiles:
            z = _normalised(rows, tile, scale[n], shift[n], buffer)
            before, dhidden = linear(z, first, start), linear(grads[tile], second_back)
            hidden = torch.ops.aten.gelu(before)
            # matrix products of MKL are slower than `_product` and more exact, which both gammas' gradients need
            dsecond += _product(grads[tile], hidden) if dz is not None else grads[tile].t() @ hidden
            dend += grads[tile].sum(0, dtype=scale.dtype)
            if along is not None:
                torch.addcmul(dhidden, hidden, along[n], out=dhidden)
            torch.ops.aten.gelu_backward.grad_input(dhidden, before, grad_input=dhidden)
            dfirst += dhidden.t() @ z
            dstart += dhidden.sum(0, dtype=scale.dtype)
            if dz is not None:
                dz[n, tile] = linear(dhidden, first_back)
    return tuple(total.to(scale.dtype) for total in found)


def combine_rows(dz: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    step = max(TILE_BYTES // (y.shape[2] * 4), 64)
    buffer = a.new_empty(min(step, y.shape[1]), y.shape[2])
    for n, (gradient, rows) in enumerate(zip(dz, y, strict=True)):
        for start in range(0, len(rows), step):
            tile = slice(start, min(start + step, len(rows)))
            total = torch.addcmul(c[n], rows[tile], b[n], out=buffer[: tile.stop - tile.start])
            torch.addcmul(total, gradient[tile], a[n], out=gradient[tile])


def _image(rows: torch.Tensor) -> torch.Tensor:
    """(rows, C) as (1, C, rows, 1), channels-last, of the same memory."""
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def _as_convolution(rows: torch.Tensor) -> bool:
    """Whether products with rows (rows, C) are 1x1 convolutions: those are oneDNN's, which uses AVX512 on every
    processor that has it, where MKL's matrix products do on Intel's alone."""
    return rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows (rows, C) @ weight (K, C).T + bias (K,), contiguous."""
    if not _as_convolution(rows):
        return F.linear(rows, weight, bias)
    return F.conv2d(_image(rows), weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(len(rows), -1)


def _product(g: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """g (rows, K).T @ rows (rows, C): the gradient of the weights of `linear` that made of rows what g belongs to."""
    if not _as_convolution(rows):
        return g.t() @ rows
    like, none = rows.new_empty(g.shape[1], rows.shape[1], 1, 1), [0, 0]
    args = (None, [1, 1], none, [1, 1], False, none, 1, [False, True, False])
    return torch.ops.aten.convolution_backward(_image(g), _image(rows), like, *args)[1][:, :, 0, 0]


# ---- precision


@functools.cache
def bfloat16_pays() -> bool:
    """Whether this processor is faster in bfloat16: measured once and remembered, so that results stay the same.

    Processors with AVX512-BF16 or AMX are; others emulate it.
    """
    try:
        key = hashlib.sha256(native.processor() + torch.__version__.encode()).hexdigest()[:16]
        file = native.cache() / f"bfloat16-{key}"
    except OSError:
        return _measure_bfloat16()
    if not file.exists():
        measured = str(_measure_bfloat16())
        write_whole(file, lambda partial: partial.write_text(measured))
    return file.read_text() == "True"


def _measure_bfloat16() -> bool:
    """Whether a block of 32 channels at 64^3 takes at most 0.9 of the time; best of five each."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, row = torch.ones(1, 32, 64, 64, 64, dtype=dtype), torch.ones(32)
        square = torch.ones(64, 32)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            y, _ = depthwise(x, torch.ones(32, 1, 3, 3, 3), row)
            expansion(y, Weights(row, row, square, torch.ones(64), square.t(), row), 1e-5, residual=x)
            seconds.append(time.perf_counter() - start)
        fastest[dtype] = min(seconds)
    return fastest[torch.bfloat16] < 0.9 * fastest[torch.float32]
