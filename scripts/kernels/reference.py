"""The operations of a MedNeXt block in stock PyTorch: the specification, and the way wherever nothing else runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Moments, Weights, plain

CONV = {4: F.conv2d, 5: F.conv3d}
CONV_TRANSPOSE = {4: F.conv_transpose2d, 5: F.conv_transpose3d}


class Reference:
    """Stock operators, which run everywhere."""

    name = "reference"

    def unsuitable(self, x: Tensor, kernel_size: int | None = None) -> None:
        """Exclude nothing."""

    def incomplete(self, x: Tensor) -> None:
        """Miss nothing, since stock operators are its own."""

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, transposed: bool = False
    ) -> tuple[Tensor, None]:
        """Convolve every channel with its own kernel."""
        convolve = (CONV_TRANSPOSE if transposed else CONV)[x.dim()]
        return convolve(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight)), None

    def mlp(
        self,
        y: Tensor,
        weights: Weights,
        eps: float,
        over_sum: bool = False,
        residual: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Tensor:
        """Compute norm, expansion, GELU, GRN, compression and residual one after another."""
        gamma, beta, w1, b1, w2, b2, grn_gamma, grn_beta = weights
        one = [1] * (y.dim() - 2)
        convolve = CONV[y.dim()]
        hidden = F.gelu(convolve(F.group_norm(y, y.shape[1], gamma, beta, eps), w1.unflatten(1, [-1, *one]), b1))
        if grn_gamma is not None and grn_beta is not None:
            hidden = grn(hidden, grn_gamma.view(-1, *one), grn_beta.view(-1, *one), over_sum)
        out = convolve(hidden, w2.unflatten(1, [-1, *one]), b2)
        return out if residual is None else residual + out

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with a 1x1x1 kernel: a matrix product on channels-last memory."""
        return pointwise(x, weight, bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (N, C, *space) with a 1x1x1 kernel, weight (K, C), by a matrix product on channels-last memory."""
    return F.linear(plain(x).movedim(1, -1), weight, bias).movedim(-1, 1)


def grn(y: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, over_sum: bool) -> torch.Tensor:
    """Apply Global Response Normalisation of ConvNeXt V2, which adds y (N, R, *space); can be scripted.

    A channel's energy, its norm over space, is divided by the mean over the channels or by their sum.
    """
    wide = torch.float32 if y.is_cuda else torch.float64  # float32 sums on a CPU err by 4e-3 at 128^3
    energy = torch.linalg.vector_norm(y, dim=list(range(2, y.dim())), keepdim=True, dtype=wide)
    total = energy.sum(1, keepdim=True) if over_sum else energy.mean(1, keepdim=True)
    return gamma * (y * (energy / (total + 1e-6)).to(y.dtype)) + beta + y
