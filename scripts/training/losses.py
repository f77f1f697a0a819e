"""The published loss, over exclusive labels or overlapping regions, blind to voxels that nobody annotated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import nn

Regions = Sequence[Sequence[int]] | None

AT_ONCE = {"cpu": 2**18}  # logits that become probabilities together, which a CPU's cache holds
ELSEWHERE = 2**25


class SegmentationLoss(nn.Module):
    """Soft Dice + cross entropy, one to one, of one resolution; MONAI's DeepSupervisionLoss sums several.

    Exclusive labels: softmax, cross entropy, Dice without the background. Regions: sigmoid, binary cross entropy, Dice
    of every region. Without `regions` and `ignore` the value is that of MONAI's `DiceCELoss(to_onehot_y=True,
    softmax=True, include_background=False, smooth_nr=1e-5, smooth_dr=1e-5)`, which cannot leave voxels out.
    Patches are read piece by piece, forward and backward, so that their probabilities and one-hot labels never exist.
    Source: nnU-Net v1 `DC_and_CE_loss` (plus 1), v2 `DC_and_BCE_loss`.

    Args:
        batch_dice: Dice over the batch as one volume, not patch by patch.
        regions: labels that belong to each output channel; None where labels exclude each other.
        ignore: label of voxels that count nowhere, or None.
        smooth: added to numerator and denominator of the Dice.
    """

    def __init__(
        self,
        batch_dice: bool = False,
        regions: Sequence[Sequence[int]] | None = None,
        ignore: int | None = None,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        self.batch_dice, self.regions, self.ignore, self.smooth = batch_dice, regions, ignore, smooth

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compute the loss of logits (N, channels, *space) and labels (N, 1, *space); 0 where nothing is known."""
        logits, label = (t.as_tensor() if isinstance(t, MetaTensor) else t for t in (logits, label))
        kind = _Exclusive() if self.regions is None else _Overlapping(self.regions)
        entropy, overlap, probable, true = _Sums.apply(logits, label, kind, self.ignore)
        entropies = label.numel() if self.ignore is None else (label.long() != self.ignore).sum().clamp_min(1)
        if self.regions is None:
            overlap, probable, true = overlap[:, 1:], probable[:, 1:], true[:, 1:]
        else:
            entropies = entropies * len(self.regions)
        both = probable + true
        if self.batch_dice:
            overlap, both = overlap.sum(0), both.sum(0)
        dice = (2 * overlap + self.smooth) / (both + self.smooth)
        return (entropy.sum() / entropies + 1 - dice.mean()).float()


class _Sums(torch.autograd.Function):
    """Sums over the voxels of patches: their entropy, and of each channel p where it is true, p, and where it is true.

    They are (patches), and three times (patches, channels), in float64, as millions of voxels need. The gradient by a
    voxel's logits follows from its probabilities p, which are computed again, and from the gradients by these sums.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, label: torch.Tensor, kind: _Kind, ignore: int | None) -> Any:
        """Read the patches once."""
        flat, label = logits.flatten(2), label.flatten(1)
        entropy = flat.new_zeros(len(flat), dtype=torch.float64)
        of_channels = flat.new_zeros((3, *flat.shape[:2]), dtype=torch.float64)
        for patch, voxels in _pieces(flat):
            x = flat[patch, :, voxels].float().contiguous()
            loss, *found = kind.sums(x, *_known(label[patch, voxels], ignore))
            entropy[patch] += loss
            for total, some in zip(of_channels, found, strict=True):
                total[patch] += some
        ctx.save_for_backward(logits, label)
        ctx.kind, ctx.ignore = kind, ignore
        return entropy, *of_channels

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Read the patches again."""
        logits, label = ctx.saved_tensors
        flat = logits.flatten(2)
        found = torch.empty_like(flat)
        by_entropy, by_overlap, by_probable = (g.float() for g in gradients[:3])
        for patch, voxels in _pieces(flat):
            own, here = _known(label[patch, voxels], ctx.ignore)
            x = flat[patch, :, voxels].float().contiguous()
            by_x = ctx.kind.gradient(x, own, by_entropy[patch], by_overlap[patch], by_probable[patch])
            found[patch, :, voxels] = by_x if here is None else by_x.mul_(here)
        return found.view(logits.shape), None, None, None


class _Exclusive:
    """Labels of which a voxel has one: softmax and cross entropy."""

    def sums(self, x: torch.Tensor, own: torch.Tensor, here: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Sum up logits (channels, voxels) by the voxels' `own` labels, those that are `here`, as `_Sums` has it."""
        logarithms = x.log_softmax(0)
        log_own = logarithms.gather(0, own[None])[0]  # refuses labels that the network does not have
        p, p_own, one = logarithms.exp_(), log_own.exp(), torch.ones_like(log_own)
        if here is not None:
            p, p_own, log_own, one = p.mul_(here), p_own * here, log_own * here, here
        overlap, true = (x.new_zeros(len(x), dtype=torch.float64).index_add_(0, own, v.double()) for v in (p_own, one))
        return -log_own.sum(), overlap, p.sum(1), true

    def gradient(
        self, x: torch.Tensor, own: torch.Tensor, by_entropy: torch.Tensor, by_overlap: torch.Tensor, by_p: torch.Tensor
    ) -> torch.Tensor:
        """Compute the gradient by logits (channels, voxels) from those by the sums."""
        p = x.softmax(0)
        p_own = p.gather(0, own[None])
        by_p_own = by_overlap[own] * p_own
        mean = by_p[None] @ p + by_p_own  # of the gradients by p, weighted by p
        by_x = p.mul_(by_p[:, None] + by_entropy - mean)
        return by_x.scatter_(0, own[None], by_x.gather(0, own[None]) + by_p_own - by_entropy)


class _Overlapping:
    """Regions, each of some labels: sigmoid and binary cross entropy of each."""

    def __init__(self, regions: Sequence[Sequence[int]]) -> None:
        self.regions = regions

    def _truth(self, own: torch.Tensor) -> torch.Tensor:
        """Mark the voxels of each region."""
        return torch.stack(
            [torch.isin(own, torch.tensor(region, device=own.device)) for region in self.regions]
        ).float()

    def sums(self, x: torch.Tensor, own: torch.Tensor, here: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Sum up logits (channels, voxels) by the voxels' `own` labels, those that are `here`, as `_Sums` has it."""
        truth, p = self._truth(own), x.sigmoid()
        loss = F.binary_cross_entropy_with_logits(x, truth, reduction="none")
        if here is not None:
            truth, p, loss = truth * here, p * here, loss * here
        return loss.sum(), (p * truth).sum(1), p.sum(1), truth.sum(1)

    def gradient(
        self, x: torch.Tensor, own: torch.Tensor, by_entropy: torch.Tensor, by_overlap: torch.Tensor, by_p: torch.Tensor
    ) -> torch.Tensor:
        """Compute the gradient by logits (channels, voxels) from those by the sums."""
        truth, p = self._truth(own), x.sigmoid()
        return (by_overlap[:, None] * truth + by_p[:, None]) * p * (1 - p) + by_entropy * (p - truth)


_Kind = _Exclusive | _Overlapping


def _pieces(flat: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Cut patches (N, channels, voxels) into pieces: the patch, and some of its voxels."""
    step = max(AT_ONCE.get(flat.device.type, ELSEWHERE) // flat.shape[1], 1)
    for patch in range(len(flat)):
        for start in range(0, flat.shape[2], step):
            yield patch, slice(start, start + step)


def _known(label: torch.Tensor, ignore: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the labels of some voxels, 0 where they are unknown, and 1 where they count; None where all do."""
    label = label.long()
    if ignore is None:
        return label, None
    here = label != ignore
    return label * here, here.float()
