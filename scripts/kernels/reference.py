"""The operations of a MedNeXt block in stock PyTorch: the specification, and the way wherever nothing else runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CONV = {4: F.conv2d, 5: F.conv3d}
CONV_TRANSPOSE = {4: F.conv_transpose2d, 5: F.conv_transpose3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1, transposed: bool = False
) -> torch.Tensor:
    """Convolves every channel with its own kernel of odd edge k, padded by k // 2.

    Args:
        x: (N, C, *space).
        weight: (C, 1, k, ..).
        bias: (C,).
        stride: 1 or 2.
        transposed: the transposed convolution; with stride 2 it makes 2n - 1 voxels of n.

    Returns:
        (N, C, *space), of the sides of x with stride 1, half of them rounded up with 2.
    """
    convolve = (CONV_TRANSPOSE if transposed else CONV)[x.dim()]
    return convolve(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight))


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
    """Normalises each channel over space, expands, GELU (exact), compresses, adds the residual.

    Args:
        y: (N, C, *space).
        norm_weight: (C,), as norm_bias.
        norm_bias: (C,).
        eps: added to the variance.
        weight1: (R, C, 1, ..), to the R channels of the hidden layer.
        bias1: (R,).
        weight2: (K, R, 1, ..).
        bias2: (K,).
        residual: (N, K, *space), or None.

    Returns:
        (N, K, *space).
    """
    convolve = CONV[y.dim()]
    hidden = convolve(F.group_norm(y, y.shape[1], norm_weight, norm_bias, eps), weight1, bias1)
    out = convolve(F.gelu(hidden), weight2, bias2)
    return out if residual is None else residual + out
