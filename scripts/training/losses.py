"""The published loss, over exclusive labels or overlapping regions, blind to voxels that nobody annotated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class SegmentationLoss(nn.Module):
    """Soft Dice + cross entropy, one to one, of one resolution; MONAI's DeepSupervisionLoss sums several.

    Exclusive labels: softmax, cross entropy, Dice without the background. Regions: sigmoid, binary cross entropy, Dice
    of every region. Without `regions` and `ignore` the value is that of MONAI's `DiceCELoss(to_onehot_y=True,
    softmax=True, include_background=False, smooth_nr=1e-5, smooth_dr=1e-5)`, which cannot leave voxels out.
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
        logits, label = logits.float(), label.long()
        known = None if self.ignore is None else label != self.ignore
        if known is not None:
            label = label * known
        truth = self._truth(label, logits.shape[1])
        entropy, probability = self._entropy(logits, label, truth, known)
        if known is not None:
            probability, truth = probability * known, truth & known
        if self.regions is None:
            probability, truth = probability[:, 1:], truth[:, 1:]
        return entropy + 1 - self._dice(probability, truth)

    def _truth(self, label: torch.Tensor, channels: int) -> torch.Tensor:
        """Mark the voxels of each channel: (N, channels, *space) bool."""
        if self.regions is None:
            return label == torch.arange(channels, device=label.device).view(1, -1, *[1] * (label.ndim - 2))
        return torch.cat([torch.isin(label, torch.tensor(r, device=label.device)) for r in self.regions], dim=1)

    def _entropy(
        self, logits: torch.Tensor, label: torch.Tensor, truth: torch.Tensor, known: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the entropy's mean over the known voxels, and the probabilities."""
        if self.regions is None:
            entropy, probability = F.cross_entropy(logits, label[:, 0], reduction="none")[:, None], logits.softmax(1)
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
            probability = logits.sigmoid()
        if known is None:
            return entropy.mean(), probability
        return (entropy * known).sum() / (known.sum() * entropy.shape[1]).clamp_min(1), probability

    def _dice(self, probability: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        axes = [*([0] if self.batch_dice else []), *range(2, truth.ndim)]
        overlap = (probability * truth).sum(axes)
        both = probability.sum(axes) + truth.sum(axes)
        return ((2 * overlap + self.smooth) / (both + self.smooth)).mean()
