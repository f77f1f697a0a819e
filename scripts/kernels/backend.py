"""What a backend of MedNeXt's kernels offers: the operations of a block, and the tensors they take.

N batch, C channels, K channels made, R hidden channels of the MLP, *space is D, H, W or H, W.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Moments = tuple[Tensor, Tensor]  # mean and variance over space, (N, C) each


class Weights(NamedTuple):
    """Parameters of the layers of a block that follow its depthwise convolution: norm, MLP and GRN."""

    gamma: Tensor  # (C,), of the norm
    beta: Tensor  # (C,)
    w1: Tensor  # (R, C), to the hidden layer
    b1: Tensor  # (R,)
    w2: Tensor  # (K, R)
    b2: Tensor  # (K,)
    grn_gamma: Tensor | None = None  # (R,), of GRN if there is one
    grn_beta: Tensor | None = None  # (R,)


class BlockKind(NamedTuple):
    """What a block is, but for its input: blocks of a kind take the same time on the same tensor."""

    kernel_size: int
    stride: int
    transposed: bool
    made: int  # channels
    hidden: int  # channels
    grn: bool


class Backend(Protocol):
    """One way to compute a block; all backends give, to rounding, the same numbers and gradients."""

    name: str

    def unsuitable(self, x: Tensor, kernel_size: int | None = None) -> str | None:
        """Say why the operations cannot run on x (N, C, *space) with such a depthwise kernel, if they cannot."""
        ...

    def incomplete(self, x: Tensor) -> str | None:
        """Say why stock operators would stand in for some of its own on x (N, C, *space), if they would."""
        ...

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, transposed: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """Convolve every channel with its own kernel of odd edge k, padded by k // 2.

        Args:
            x: (N, C, *space).
            weight: (C, 1, k, ..).
            bias: (C,).
            stride: 1 or 2.
            transposed: the transposed convolution; with stride 2 it makes 2n - 1 voxels of n.

        Returns:
            (N, C, *space), of the sides of x with stride 1, half of them rounded up with 2; and its mean and variance
            over space where they come for nothing.
        """
        ...

    def mlp(
        self,
        y: Tensor,
        weights: Weights,
        eps: float,
        over_sum: bool = False,
        residual: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Tensor:
        """Normalise each channel over space, expand, GELU (exact), GRN if it has weights, compress, add the residual.

        Args:
            y: (N, C, *space).
            weights: of the layers.
            eps: added to the variance.
            over_sum: see `reference.grn`.
            residual: (N, K, *space), or None.
            moments: what `depthwise` said of y.

        Returns:
            (N, K, *space).
        """
        ...

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve x (N, C, *space) with a 1x1x1 kernel, weight (K, C), to (N, K, *space)."""
        ...


def channels_last(x: Tensor) -> Tensor:
    """Return x (N, C, *space), channels-last in memory."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def plain(x: Tensor) -> Tensor:
    """Return x (N, C, *space) as kernels take it: PyTorch's own tensor, in autocast's precision, channels-last."""
    x = x.as_tensor() if hasattr(x, "as_tensor") else x  # MONAI's MetaTensor has it
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return channels_last(x)


def foreign(x: object) -> str | None:
    """Say why kernels, which know `plain` tensors alone, cannot take x, if they cannot."""
    if type(x) is torch.Tensor or hasattr(x, "as_tensor"):
        return None
    return f"the input is a {type(x).__name__}, not a plain tensor"
