"""The operations of a MedNeXt block on a CPU: channels-last, a tile at a time, nothing of the hidden size kept.

- A depthwise convolution and its input gradient (a convolution with the flipped kernel, or the transposed one) are
  oneDNN's forward convolution wherever that is an ordinary convolution; the rest is `native`, else `composed`.
- Norm, expansion, GELU, compression and residual run over tiles of voxels whose hidden layer stays in the cache; the
  backward pass computes it again from the norm's input. The norm's scale and shift are folded into the first weights:
  W1 (gamma * z + beta) + b1 = (W1 * gamma) z + (W1 beta + b1), with z the normalised input.

Sums over voxels are kept in float32 at least, those of the norm in float64. Under autocast to bfloat16 activations and
products are bfloat16; weights stay as they are and get their gradients in their own precision.
"""

from __future__ import annotations

import functools
import hashlib
import time
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..files import write_whole
from . import composed, native
from .reference import CHANNELS_LAST, CONV

TILE_BYTES = 2**21  # of the hidden layer of a tile; from 1 to 4 MiB made no difference on 1 MiB of L2 a core


def unsuitable(x: torch.Tensor) -> str | None:
    """Why the operations below cannot run on x (N, C, *space), if they cannot."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "a graph is being recorded, which needs stock operators"
    if type(x) is not torch.Tensor and not hasattr(x, "as_tensor"):  # MONAI's MetaTensor has it
        return f"the input is a {type(x).__name__}, not a plain tensor"
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


def _plain(x: torch.Tensor) -> torch.Tensor:
    """In the precision to compute with, channels-last."""
    x = x.as_tensor() if hasattr(x, "as_tensor") else x
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype("cpu"))
    return _channels_last(x)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def _helper(x: torch.Tensor, edge: int = 3) -> ModuleType:
    return native if native.suits(x, edge) else composed


# ---- depthwise convolution


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1, transposed: bool = False
) -> torch.Tensor:
    """As `reference.depthwise`, channels-last."""
    return _Depthwise.apply(_plain(x), weight, bias, stride, transposed)


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
        g = _channels_last(g)
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
    return _channels_last(y)


# ---- norm, expansion, GELU, compression, residual


def expansion(
    y: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.expansion`, channels-last."""
    residual = residual if residual is None else _plain(residual)
    layers = (weight1.flatten(1), bias1, weight2.flatten(1), bias2)
    return _Expansion.apply(_plain(y), norm_weight, norm_bias, eps, *layers, residual)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *space), channels-last -> (N, voxels, C), of the same memory."""
    return x.movedim(1, -1).flatten(1, -2)


def _tiles(voxels: int, hidden: torch.Tensor) -> list[slice]:
    """Of voxels; `hidden` (R, C) are the weights that make the hidden layer."""
    rows = max(TILE_BYTES // (len(hidden) * hidden.element_size()), 64)
    return [slice(start, min(start + rows, voxels)) for start in range(0, voxels, rows)]


class _Expansion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gamma, beta, eps, w1, b1, w2, b2, residual):
        wide = torch.promote_types(y.dtype, torch.float32)
        mean, variance = _helper(y).moments(y)
        rstd = torch.rsqrt(variance + eps)
        scale, shift = rstd.to(wide), (-mean * rstd).to(wide)  # (N, C): z = y * scale + shift
        ctx.save_for_backward(y, gamma, beta, w1, b1, w2, scale, shift)
        ctx.has_residual = residual is not None

        first, start = (t.to(y.dtype) for t in _folded(gamma, beta, w1, b1, wide))
        second, b2 = w2.to(y.dtype), b2.to(y.dtype)
        out = torch.empty((len(y), len(w2), *y.shape[2:]), dtype=y.dtype, memory_format=CHANNELS_LAST[y.dim()])
        residual = residual if residual is None else _rows(residual)
        tiles = _tiles(_rows(y).shape[1], first)
        z_buffer = y.new_empty(tiles[0].stop, first.shape[1])
        for n, (rows, made) in enumerate(zip(_rows(y), _rows(out), strict=True)):
            for tile in tiles:
                z = torch.addcmul(shift[n], rows[tile], scale[n], out=z_buffer[: tile.stop - tile.start])
                product = linear(torch.ops.aten.gelu_(linear(z, first, start)), second, b2)
                if residual is None:
                    made[tile] = product
                else:
                    torch.add(residual[n, tile], product, out=made[tile])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, gamma, beta, w1, b1, w2, scale, shift = ctx.saved_tensors
        g = _channels_last(g)
        first_wide, start = _folded(gamma, beta, w1, b1, scale.dtype)
        first, start, second = first_wide.to(y.dtype), start.to(y.dtype), w2.to(y.dtype)
        first_back, second_back = first.t().contiguous(), second.t().contiguous()
        dfirst, dstart = (scale.new_zeros(len(y), *t.shape) for t in (first, start))  # of each case
        dw2, db2 = scale.new_zeros(w2.shape), scale.new_zeros(len(w2))
        dy = torch.empty_like(y)
        voxels = _rows(y).shape[1]
        tiles = _tiles(voxels, first)
        z_buffer, total_buffer = (t.new_empty(tiles[0].stop, first.shape[1]) for t in (y, scale))
        for n, (rows, grads, made) in enumerate(zip(_rows(y), _rows(g), _rows(dy), strict=True)):
            for tile in tiles:
                z = torch.addcmul(shift[n], rows[tile], scale[n], out=z_buffer[: tile.stop - tile.start])
                hidden, dhidden = linear(z, first, start), linear(grads[tile], second_back)
                torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, grad_input=dhidden)
                torch.ops.aten.gelu_(hidden)
                dw2 += _product(grads[tile], hidden)
                db2 += grads[tile].sum(0, dtype=db2.dtype)
                dfirst[n] += dhidden.t() @ z  # slower than `_product` and more exact, which gamma's gradient needs
                dstart[n] += dhidden.sum(0, dtype=dstart.dtype)
                made[tile] = linear(dhidden, first_back)  # gradient of z, until the norm's sums are known
            # the norm's backward pass needs, of the gradient of z, the means of it and of it times z
            means = (dstart[n] @ first_wide / voxels, (dfirst[n] * first_wide).sum(0) / voxels)
            along = -scale[n] * means[1]
            constant = along * shift[n] - scale[n] * means[0]
            for tile in tiles:
                total = total_buffer[: tile.stop - tile.start]
                torch.addcmul(constant, rows[tile], along * scale[n], out=total)
                torch.addcmul(total, made[tile], scale[n], out=made[tile])
        dfirst, dstart = dfirst.sum(0), dstart.sum(0)
        grads = (
            (dfirst * w1).sum(0).to(gamma.dtype),
            (dstart @ w1.to(dstart.dtype)).to(beta.dtype),
            None,
            (dfirst * gamma + torch.outer(dstart, beta.to(dstart.dtype))).to(w1.dtype),
            dstart.to(b1.dtype),
            dw2.to(w2.dtype),
            db2.to(w2.dtype),
        )
        return (dy, *grads, g if ctx.has_residual else None)


def _folded(gamma: torch.Tensor, beta: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, dtype: torch.dtype):
    """First weights (R, C) and bias (R,) for the normalised input before gamma and beta."""
    gamma, beta, w1, b1 = (t.detach().to(dtype) for t in (gamma, beta, w1, b1))
    return w1 * gamma, b1 + w1 @ beta


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


# ---- 1x1x1 convolutions


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """1x1x1 convolution, (N, C, *space) -> (N, K, *space), channels-last; weight (K, C)."""
    return F.linear(_plain(x).movedim(1, -1), weight, bias).movedim(-1, 1)


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
        square = torch.ones(64, 32, 1, 1, 1)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            y = depthwise(x, torch.ones(32, 1, 3, 3, 3), row)
            expansion(y, row, row, 1e-5, square, torch.ones(64), square.transpose(0, 1), row, x)
            seconds.append(time.perf_counter() - start)
        fastest[dtype] = min(seconds)
    return fastest[torch.bfloat16] < 0.9 * fastest[torch.float32]
