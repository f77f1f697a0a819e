"""Norm, expansion, GELU (GRN), compression and residual, forward and backward, whoever computes the rows of voxels.

The norm's gamma and beta are folded into the first weights: W1 (gamma z + beta) + b1 = (W1 gamma) z + (W1 beta + b1),
with z the normalised input. GRN multiplies each hidden channel of a case by a number, which is folded into the second
weights of that case, and its beta into their bias. So `Rows` needs to know neither norm nor GRN; what is kept for the
backward pass is the norm's input and statistics, and everything else, above all the hidden layer, is computed again.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .backend import Moments, Weights


class Layers(NamedTuple):
    """z = y * scale + shift, hidden = gelu(first z + start), out = second hidden + end."""

    scale: Tensor  # (N, C), float32 at least, as all but the two matrices
    shift: Tensor  # (N, C)
    first: Tensor  # (R, C), in the precision of y
    start: Tensor  # (R,)
    second: Tensor  # (N, K, R), in the precision of y; expanded where all cases have the same
    end: Tensor  # (K,)


class Rows(Protocol):
    """Computes rows of voxels, y (N, voxels, C)."""

    def energy(self, y: Tensor, layers: Layers) -> Tensor:
        """Sum the squares of hidden over the voxels: (N, R), float32 at least."""
        ...

    def forward(self, y: Tensor, layers: Layers, residual: Tensor | None, out: Tensor) -> None:
        """Fill out (N, voxels, K); residual is like it, or None."""
        ...

    def backward(
        self, g: Tensor, y: Tensor, layers: Layers, along: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute gradients for the gradient g of out; `along` (N, R) times hidden adds to that of hidden, if given.

        Fills dz, like y, with the gradient of z; with dz None that is left out.

        Returns:
            Gradients of every case, float32 at least: of first (N, R, C), start (N, R), second (N, K, R), end (N, K).
        """
        ...

    def combine(self, dz: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        """Turn dz into dz * a + y * b + c, with a, b and c (N, C)."""
        ...


class Kept(NamedTuple):
    """What the backward pass needs besides y and the weights."""

    scale: Tensor  # (N, C), as in `Layers`
    shift: Tensor
    energy: Tensor | None  # (N, R), the norm of each hidden channel, of GRN


def forward(
    rows: Rows,
    y: Tensor,
    moments: Moments,
    eps: float,
    weights: Weights,
    over_sum: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Kept]:
    """Compute `Backend.mlp` of plain channels-last tensors; `moments` are those of y, float32 at least."""
    mean, variance = moments
    rstd = torch.rsqrt(variance + eps)
    wide = torch.promote_types(y.dtype, torch.float32)
    kept = Kept(rstd.to(wide), (-mean * rstd).to(wide), None)
    layers = _layers(y, weights, kept)
    if weights.grn_gamma is not None:
        kept = kept._replace(energy=rows.energy(flat(y), layers).sqrt())
    response = _response(weights, kept, over_sum)
    if response is not None:
        layers = response.fold(layers)
    out = y.new_empty((len(y), *y.shape[2:], len(weights.w2))).movedim(-1, 1)  # channels-last
    rows.forward(flat(y), layers, residual if residual is None else flat(residual), flat(out))
    return out, kept


def backward(
    rows: Rows, g: Tensor, y: Tensor, weights: Weights, over_sum: bool, kept: Kept
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute gradients of y and of the weights, each in its own precision, for g, channels-last.

    The gradient of the residual is g itself.
    """
    layers = _layers(y, weights, kept)
    wide = layers.scale.dtype
    gamma, beta, w1 = (t.to(wide) for t in (weights.gamma, weights.beta, weights.w1))
    response = _response(weights, kept, over_sum)
    along = dgamma = dbeta = None
    if response is not None:
        plain, layers = layers, response.fold(layers)
        _, _, dsecond, dend = rows.backward(flat(g), flat(y), plain, None, None)
        along, dgamma, dbeta = response.backward(dsecond, dend)
    dy = torch.empty_like(y)
    dfirst, dstart, dsecond, dend = rows.backward(flat(g), flat(y), layers, along, flat(dy))
    # the norm's backward pass needs, of the gradient of z, the means of it and of it times z
    folded, voxels = w1 * gamma, y.shape[2:].numel()
    mean, slope = dstart @ folded / voxels, -layers.scale * (dfirst * folded).sum(1) / voxels
    rows.combine(flat(dy), flat(y), layers.scale, slope * layers.scale, slope * layers.shift - layers.scale * mean)
    dfirst, dstart, dend = dfirst.sum(0), dstart.sum(0), dend.sum(0)
    dw2 = dsecond.sum(0) if response is None else response.unfold(dsecond, dend)
    dw1 = dfirst * gamma + torch.outer(dstart, beta)
    grads = ((dfirst * w1).sum(0), dstart @ w1, dw1, dstart, dw2, dend, dgamma, dbeta)
    return dy, tuple(d if d is None or t is None else d.to(t.dtype) for d, t in zip(grads, weights, strict=True))


def flat(x: Tensor) -> Tensor:
    """Return x (N, C, *space), channels-last, as (N, voxels, C) of the same memory."""
    return x.movedim(1, -1).flatten(1, -2)


def _layers(y: Tensor, weights: Weights, kept: Kept) -> Layers:
    wide = kept.scale.dtype
    gamma, beta, w1, b1, w2, b2 = (t.to(wide) for t in weights[:6])
    second = w2.to(y.dtype).expand(len(y), -1, -1)
    return Layers(kept.scale, kept.shift, (w1 * gamma).to(y.dtype), b1 + w1 @ beta, second, b2)


class _Response(NamedTuple):
    """GRN of one batch, whose gamma and beta are (R,) and w2 (K, R), all in the precision of the norm's statistics."""

    gamma: Tensor
    beta: Tensor
    w2: Tensor
    energy: Tensor  # (N, R)
    over_sum: bool

    def total(self) -> Tensor:
        """Compute what the energy of each hidden channel is compared with, (N, 1)."""
        energy = self.energy
        return (energy.sum(1, keepdim=True) if self.over_sum else energy.mean(1, keepdim=True)) + 1e-6

    def factor(self) -> Tensor:
        """Compute what GRN multiplies each hidden channel of a case by, (N, R)."""
        return 1 + self.gamma * (self.energy / self.total())

    def fold(self, layers: Layers) -> Layers:
        """Put GRN into the second weights and their bias."""
        second = (self.w2 * self.factor()[:, None]).to(layers.second.dtype)
        return layers._replace(second=second, end=layers.end + self.w2 @ self.beta)

    def unfold(self, dsecond: Tensor, dend: Tensor) -> Tensor:
        """Compute the gradient of w2 out of those of the folded weights (N, K, R) and of their bias (K,)."""
        return (dsecond * self.factor()[:, None]).sum(0) + torch.outer(dend, self.beta)

    def backward(self, dsecond: Tensor, dend: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what times hidden adds to its gradient because its energy counts, (N, R).

        Returns:
            That, and the gradients of gamma and beta.
        """
        energy, total = self.energy, self.total()
        dfactor = (dsecond * self.w2).sum(1)
        dresponse = dfactor * self.gamma
        dtotal = -(dresponse * energy).sum(1, keepdim=True) / total.square()
        denergy = dresponse / total + dtotal / (1 if self.over_sum else energy.shape[1])
        along = torch.where(energy > 0, denergy / energy, 0)
        return along, (dfactor * energy / total).sum(0), dend.sum(0) @ self.w2


def _response(weights: Weights, kept: Kept, over_sum: bool) -> _Response | None:
    gamma, beta, wide = weights.grn_gamma, weights.grn_beta, kept.scale.dtype
    if gamma is None or beta is None or kept.energy is None:
        return None
    return _Response(gamma.to(wide), beta.to(wide), weights.w2.to(wide), kept.energy, over_sum)
