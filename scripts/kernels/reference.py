"""The operations of a MedNeXt block in stock PyTorch: the specification, and the way wherever nothing else runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

CONV = {4: F.conv2d, 5: F.conv3d}
CONV_TRANSPOSE = {4: F.conv_transpose2d, 5: F.conv_transpose3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


Moments = tuple[torch.Tensor, torch.Tensor]


class Weights(NamedTuple):
    """Of the layers of a block that follow its depthwise convolution."""

    gamma: torch.Tensor  # (C,), of the norm
    beta: torch.Tensor  # (C,)
    w1: torch.Tensor  # (R, C), to the hidden layer
    b1: torch.Tensor  # (R,)
    w2: torch.Tensor  # (K, R)
    b2: torch.Tensor  # (K,)
    grn_gamma: torch.Tensor | None = None  # (R,), of GRN if there is one
    grn_beta: torch.Tensor | None = None  # (R,)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, *space), channels-last in memory."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def plain(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, *space) as kernels take it: PyTorch's own tensor, in the precision of autocast, channels-last."""
    x = x.as_tensor() if hasattr(x, "as_tensor") else x  # MONAI's MetaTensor has it
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return channels_last(x)


def foreign(x: object) -> str | None:
    """Why kernels, which know `plain` tensors alone, cannot take x, if they cannot."""
    if type(x) is torch.Tensor or hasattr(x, "as_tensor"):
        return None
    return f"the input is a {type(x).__name__}, not a plain tensor"


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """1x1x1 convolution, (N, C, *space) -> (N, K, *space): a matrix product on channels-last memory; weight (K, C)."""
    return F.linear(plain(x).movedim(1, -1), weight, bias).movedim(-1, 1)


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1, transposed: bool = False
) -> tuple[torch.Tensor, Moments | None]:
    """Convolves every channel with its own kernel of odd edge k, padded by k // 2.

    Args:
        x: (N, C, *space).
        weight: (C, 1, k, ..).
        bias: (C,).
        stride: 1 or 2.
        transposed: the transposed convolution; with stride 2 it makes 2n - 1 voxels of n.

    Returns:
        (N, C, *space), of the sides of x with stride 1, half of them rounded up with 2; and its mean and variance over
        space, two (N, C), where they come for nothing.
    """
    convolve = (CONV_TRANSPOSE if transposed else CONV)[x.dim()]
    return convolve(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight)), None


def expansion(
    y: torch.Tensor,
    weights: Weights,
    eps: float,
    over_sum: bool = False,
    residual: torch.Tensor | None = None,
    moments: Moments | None = None,
) -> torch.Tensor:
    """Normalises each channel over space, expands, GELU (exact), GRN if it has weights, compresses, adds the residual.

    Args:
        y: (N, C, *space).
        weights: of the layers.
        eps: added to the variance.
        over_sum: see `grn`.
        residual: (N, K, *space), or None.
        moments: what `depthwise` said of y.

    Returns:
        (N, K, *space).
    """
    gamma, beta, w1, b1, w2, b2, grn_gamma, grn_beta = weights
    one = [1] * (y.dim() - 2)
    convolve = CONV[y.dim()]
    hidden = F.gelu(convolve(F.group_norm(y, y.shape[1], gamma, beta, eps), w1.unflatten(1, [-1, *one]), b1))
    if grn_gamma is not None:
        hidden = grn(hidden, grn_gamma.view(-1, *one), grn_beta.view(-1, *one), over_sum)
    out = convolve(hidden, w2.unflatten(1, [-1, *one]), b2)
    return out if residual is None else residual + out


def grn(y: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, over_sum: bool) -> torch.Tensor:
    """Global Response Normalisation of ConvNeXt V2, which adds y (N, R, *space); can be scripted.

    A channel's energy, its norm over space, is divided by the mean over the channels or by their sum.
    """
    wide = torch.float32 if y.is_cuda else torch.float64  # float32 sums on a CPU err by 4e-3 at 128^3
    energy = torch.linalg.vector_norm(y, dim=list(range(2, y.dim())), keepdim=True, dtype=wide)
    total = energy.sum(1, keepdim=True) if over_sum else energy.mean(1, keepdim=True)
    return gamma * (y * (energy / (total + 1e-6)).to(y.dtype)) + beta + y
