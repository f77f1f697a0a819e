"""Norm, expansion, GELU (GRN), compression and residual, forward and backward, whoever computes the rows of voxels.

The norm's gamma and beta are folded into the first weights: W1 (gamma z + beta) + b1 = (W1 gamma) z + (W1 beta + b1),
with z the normalised input. GRN multiplies each hidden channel of a case by a number, which is folded into the second
weights of that case, and its beta into their bias. So `rows` needs to know neither norm nor GRN; what is kept for the
backward pass is the norm's input and statistics, and everything else, above all the hidden layer, is computed again.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from .reference import Moments, Weights


class Layers(NamedTuple):
    """z = y * scale + shift, hidden = gelu(first z + start), out = second hidden + end."""

    scale: torch.Tensor  # (N, C), float32 at least, as all but the two matrices
    shift: torch.Tensor  # (N, C)
    first: torch.Tensor  # (R, C), in the precision of y
    start: torch.Tensor  # (R,)
    second: torch.Tensor  # (N, K, R), in the precision of y; expanded where all cases have the same
    end: torch.Tensor  # (K,)


class Rows(Protocol):
    """A module that computes rows of voxels, y (N, voxels, C)."""

    def moments(self, y: torch.Tensor) -> Moments:
        """Mean and variance over space of y (N, C, *space): two (N, C), float32 at least."""

    def energy(self, y, layers: Layers) -> torch.Tensor:
        """Sums over the voxels of hidden squared, (N, R), float32 at least."""

    def forward_rows(self, y, layers: Layers, residual, out) -> None:
        """Fills out (N, voxels, K); residual is like it, or None."""

    def backward_rows(self, g, y, layers: Layers, along, dz) -> tuple[torch.Tensor, ...]:
        """Gradients for the gradient g of out; `along` (N, R) times hidden adds to that of hidden, where not None.

        Fills dz, like y, with the gradient of z; with dz None that is left out.

        Returns:
            Gradients of every case, float32 at least: of first (N, R, C), start (N, R), second (N, K, R), end (N, K).
        """

    def combine_rows(self, dz, y, a, b, c) -> None:
        """dz becomes dz * a + y * b + c, with a, b and c (N, C)."""


class Kept(NamedTuple):
    """What the backward pass needs besides y and the weights."""

    scale: torch.Tensor  # (N, C), as in `Layers`
    shift: torch.Tensor
    energy: torch.Tensor | None  # (N, R), the norm of each hidden channel, of GRN


def forward(
    rows: Rows,
    y: torch.Tensor,
    moments: Moments | None,
    eps: float,
    weights: Weights,
    over_sum: bool,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, Kept]:
    """`reference.expansion` of plain channels-last tensors; `moments` are those of y where they are known."""
    mean, variance = rows.moments(y) if moments is None else moments
    rstd = torch.rsqrt(variance + eps)
    wide = torch.promote_types(y.dtype, torch.float32)
    kept = Kept(rstd.to(wide), (-mean * rstd).to(wide), None)
    layers = _layers(y, weights, kept)
    if weights.grn_gamma is not None:
        kept = kept._replace(energy=rows.energy(flat(y), layers).sqrt())
        layers = _with_grn(layers, weights, kept, over_sum)
    out = y.new_empty((len(y), *y.shape[2:], len(weights.w2))).movedim(-1, 1)  # channels-last
    rows.forward_rows(flat(y), layers, residual if residual is None else flat(residual), flat(out))
    return out, kept


def backward(
    rows: Rows, g: torch.Tensor, y: torch.Tensor, weights: Weights, over_sum: bool, kept: Kept
) -> tuple[torch.Tensor, Weights]:
    """Gradients of y and of the weights, each in its own precision, for g, channels-last; that of the residual is g."""
    layers = _layers(y, weights, kept)
    wide, along, grn = layers.scale.dtype, None, (None, None)
    gamma, beta, w1 = (t.to(wide) for t in weights[:3])
    if weights.grn_gamma is not None:
        plain, layers = layers, _with_grn(layers, weights, kept, over_sum)
        _, _, dsecond, dend = rows.backward_rows(flat(g), flat(y), plain, None, None)
        along, *grn = _grn_backward(weights, kept, over_sum, dsecond, dend)
    dy = torch.empty_like(y)
    dfirst, dstart, dsecond, dend = rows.backward_rows(flat(g), flat(y), layers, along, flat(dy))
    # the norm's backward pass needs, of the gradient of z, the means of it and of it times z
    folded, voxels = w1 * gamma, y.shape[2:].numel()
    mean, slope = dstart @ folded / voxels, -layers.scale * (dfirst * folded).sum(1) / voxels
    rows.combine_rows(flat(dy), flat(y), layers.scale, slope * layers.scale, slope * layers.shift - layers.scale * mean)
    dfirst, dstart, dend = dfirst.sum(0), dstart.sum(0), dend.sum(0)
    if along is None:
        dw2 = dsecond.sum(0)
    else:
        factor = _factor(weights, kept, over_sum)
        dw2 = (dsecond * factor[:, None]).sum(0) + torch.outer(dend, weights.grn_beta.to(wide))
    dw1 = dfirst * gamma + torch.outer(dstart, beta)
    grads = Weights((dfirst * w1).sum(0), dstart @ w1, dw1, dstart, dw2, dend, *grn)
    return dy, Weights(*(d if d is None else d.to(t.dtype) for d, t in zip(grads, weights, strict=True)))


def flat(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *space), channels-last -> (N, voxels, C), of the same memory."""
    return x.movedim(1, -1).flatten(1, -2)


def _layers(y: torch.Tensor, weights: Weights, kept: Kept) -> Layers:
    wide = kept.scale.dtype
    gamma, beta, w1, b1, w2, b2, *_ = (t if t is None else t.to(wide) for t in weights)
    second = w2.to(y.dtype).expand(len(y), -1, -1)
    return Layers(kept.scale, kept.shift, (w1 * gamma).to(y.dtype), b1 + w1 @ beta, second, b2)


def _total(energy: torch.Tensor, over_sum: bool) -> torch.Tensor:
    """What the energy of each hidden channel (N, R) is compared with, (N, 1)."""
    return (energy.sum(1, keepdim=True) if over_sum else energy.mean(1, keepdim=True)) + 1e-6


def _factor(weights: Weights, kept: Kept, over_sum: bool) -> torch.Tensor:
    """What GRN multiplies each hidden channel of a case by, (N, R)."""
    return 1 + weights.grn_gamma.to(kept.scale.dtype) * (kept.energy / _total(kept.energy, over_sum))


def _with_grn(layers: Layers, weights: Weights, kept: Kept, over_sum: bool) -> Layers:
    wide = kept.scale.dtype
    beta, w2 = (t.to(wide) for t in (weights.grn_beta, weights.w2))
    factor = _factor(weights, kept, over_sum)
    return layers._replace(second=(w2 * factor[:, None]).to(layers.second.dtype), end=layers.end + w2 @ beta)


def _grn_backward(weights: Weights, kept: Kept, over_sum: bool, dsecond: torch.Tensor, dend: torch.Tensor):
    """What times hidden adds to its gradient because its energy counts, (N, R), and the gradients of GRN's weights."""
    wide, energy = kept.scale.dtype, kept.energy
    gamma, w2 = weights.grn_gamma.to(wide), weights.w2.to(wide)
    total = _total(energy, over_sum)
    dfactor = (dsecond * w2).sum(1)
    dresponse = dfactor * gamma
    dtotal = -(dresponse * energy).sum(1, keepdim=True) / total.square()
    denergy = dresponse / total + dtotal / (1 if over_sum else energy.shape[1])
    along = torch.where(energy > 0, denergy / energy, 0)
    return along, (dfactor * energy / total).sum(0), dend.sum(0) @ w2
