"""The operations of a MedNeXt block on a GPU, in Triton: `triton_depthwise`, `triton_gradient`, `triton_mlp`.

They are operators of PyTorch (`torch.ops.mednext`), so that torch.compile, DDP and autocast take them as they take any
other. They are called by name: whoever imports this file again, as MONAI Label does, replaces them, and networks of the
first import run on. Nothing of the hidden size is kept for the backward pass, and the norm's statistics come with the
convolution.
Where TRITON_INTERPRET=1 is set before Triton is imported, its interpreter runs the same kernels on a CPU: for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from . import mlp as folded
from .autotune import constant
from .backend import Moments, Weights, channels_last, foreign, plain
from .mlp import Kept
from .reference import pointwise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_SIZES = (3, 5, 7)
OLDEST = (8, 0)  # compute capability: Ampere
INSTALLED = importlib.util.find_spec("triton") is not None


class Triton:
    """Triton's kernels for GPUs from Ampere on; see `Backend`."""

    name = "triton"

    def unsuitable(self, x: Tensor, kernel_size: int | None = None) -> str | None:
        """Say why the operations cannot run on x (N, C, D, H, W) with such a depthwise kernel, if they cannot."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return "a graph is being recorded, which needs stock operators"
        if reason := foreign(x):
            return reason
        if x.dim() != 5 or x.dtype not in DTYPES or x.shape[1:].numel() // x.shape[2] >= 2**31:
            return f"the input is {x.dtype} of {tuple(x.shape)}; it needs float32, float16 or bfloat16 in 3D"
        if kernel_size not in (None, *KERNEL_SIZES):
            return f"a depthwise kernel of {kernel_size} is none of {', '.join(map(str, KERNEL_SIZES))}"
        return _missing(x.device)

    def incomplete(self, x: Tensor) -> None:
        """Miss nothing: what is not suitable does not run at all."""

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, transposed: bool = False
    ) -> tuple[Tensor, Moments]:
        """Convolve every channel with its own kernel, channels-last, with the moments of the result."""
        x = plain(x)
        if transposed and stride == 1:  # is a convolution with the flipped kernel
            weight, transposed = weight.flip(2, 3, 4), False
        size = [2 * n - 1 if transposed else -(-n // stride) for n in x.shape[2:]]
        y, mean, variance = torch.ops.mednext.depthwise(x, weight, bias, stride, transposed, size, True)
        return y, (mean, variance)

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
        y, residual = plain(y), residual if residual is None else plain(residual)
        mean, variance = moments or _moments(y)
        out, *_ = torch.ops.mednext.mlp(y, mean, variance, *weights, residual, eps, over_sum)
        return out

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with a 1x1x1 kernel: a matrix product on channels-last memory."""
        return pointwise(x, weight, bias)


def _missing(device: torch.device) -> str | None:
    """Say what is missing to run Triton's kernels on the device, if anything is."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda":
        return None if device.type == "cpu" and interpreted() else f"the input is on {device}, not on a GPU"
    if _capability(device) < OLDEST:
        return f"the GPU is older than compute capability {'.'.join(map(str, OLDEST))}"
    return None


@constant
def interpreted() -> bool:
    """Tell whether Triton interprets: it decides when it is imported, so the variable must have been set before."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@custom_op("mednext::depthwise", mutates_args=())
def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, transposed: bool, size: Sequence[int], moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve x to (N, C, *size); return that, and its mean and variance over space (N, C), or two empty tensors."""
    from . import triton_depthwise as kernels

    x = channels_last(x)
    if transposed:
        y, found = kernels.transposed(x, weight, bias, size, moments)
    else:
        y, found = kernels.convolve(x, weight, bias, stride, moments)
    return y, *(found or (_none(x), _none(x)))


@_depthwise.register_fake
def _(x, weight, bias, stride, transposed, size, moments):
    y = x.new_empty((len(x), *size, x.shape[1])).movedim(-1, 1)
    row = x.new_empty(x.shape[:2] if moments else 0, dtype=torch.float32)
    return y, row, torch.empty_like(row)


@custom_op("mednext::depthwise_weight_gradient", mutates_args=())
def _weight_gradient(fine: Tensor, coarse: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Compute the gradient of the weights, see `cpu.Helper`."""
    from .triton_gradient import weight_gradient

    return weight_gradient(channels_last(fine), channels_last(coarse), stride, weight)


@_weight_gradient.register_fake
def _(fine, coarse, weight, stride):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep_depthwise(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.transposed, *_ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _depthwise_backward(ctx, g, *_):
    x, weight = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        flipped = weight if ctx.transposed or ctx.stride == 2 else weight.flip(2, 3, 4)
        back = ctx.stride == 2 and not ctx.transposed
        dx, *_ = torch.ops.mednext.depthwise(g, flipped, None, ctx.stride, back, x.shape[2:], False)
    if ctx.needs_input_grad[1]:
        fine, coarse = (g, x) if ctx.transposed else (x, g)
        dweight = torch.ops.mednext.depthwise_weight_gradient(fine, coarse, weight, ctx.stride)
    if ctx.needs_input_grad[2]:
        dbias = g.sum((0, 2, 3, 4), dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dweight, dbias, None, None, None, None


_depthwise.register_autograd(_depthwise_backward, setup_context=_keep_depthwise)


def _moments(y: Tensor) -> Moments:
    variance, mean = torch.var_mean(y.detach().float(), dim=(2, 3, 4), correction=0)
    return mean, variance


@custom_op("mednext::mlp", mutates_args=())
def _mlp(
    y: Tensor, mean: Tensor, variance: Tensor,
    gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    grn_gamma: Tensor | None, grn_beta: Tensor | None, residual: Tensor | None, eps: float, over_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `Triton.mlp` does, and what its backward pass needs: `Kept`, with an empty tensor for None."""
    from .triton_mlp import ROWS

    weights = Weights(gamma, beta, w1, b1, w2, b2, grn_gamma, grn_beta)
    residual = residual if residual is None else channels_last(residual)
    out, kept = folded.forward(ROWS, channels_last(y), (mean, variance), eps, weights, over_sum, residual)
    return out, kept.scale, kept.shift, _none(y) if kept.energy is None else kept.energy


@_mlp.register_fake
def _(y, mean, variance, gamma, beta, w1, b1, w2, b2, grn_gamma, grn_beta, residual, eps, over_sum):
    out = y.new_empty((len(y), *y.shape[2:], len(w2))).movedim(-1, 1)
    energy = y.new_empty(0 if grn_gamma is None else (len(y), len(w1)), dtype=torch.float32)
    return out, torch.empty_like(mean), torch.empty_like(mean), energy


@custom_op("mednext::mlp_backward", mutates_args=())
def _mlp_gradients(
    g: Tensor, y: Tensor, scale: Tensor, shift: Tensor, energy: Tensor, weights: Sequence[Tensor], over_sum: bool
) -> list[Tensor]:
    """Compute gradients of y and of the weights."""
    from .triton_mlp import ROWS

    kept = Kept(scale, shift, energy if len(energy) else None)
    dy, grads = folded.backward(ROWS, channels_last(g), channels_last(y), Weights(*weights), over_sum, kept)
    return [dy, *(d for d in grads if d is not None)]


@_mlp_gradients.register_fake
def _(g, y, scale, shift, energy, weights, over_sum):
    dy = y.new_empty((len(y), *y.shape[2:], y.shape[1])).movedim(-1, 1)
    return [dy, *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights)]


def _keep_mlp(ctx, inputs, output):
    y, _, _, *weights, residual, _, ctx.over_sum = inputs
    _, *kept = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(y, *kept, *weights)
    ctx.mark_non_differentiable(*kept)


def _mlp_backward(ctx, g, *_):
    y, *kept, gamma, beta, w1, b1, w2, b2, grn_gamma, grn_beta = ctx.saved_tensors
    grn = [] if grn_gamma is None else [grn_gamma, grn_beta]
    dy, *grads = torch.ops.mednext.mlp_backward(g, y, *kept, [gamma, beta, w1, b1, w2, b2, *grn], ctx.over_sum)
    grads += [None] * (8 - len(grads))
    return dy, None, None, *grads, g if ctx.has_residual else None, None, None


_mlp.register_autograd(_mlp_backward, setup_context=_keep_mlp)


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)
