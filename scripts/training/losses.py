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
        entropy, overlap, probable, true = _Sums.apply(logits, label, self.regions, self.ignore)
        first = 1 if self.regions is None else 0
        overlap, both = overlap[:, first:], (probable + true)[:, first:]
        if self.batch_dice:
            overlap, both = overlap.sum(0), both.sum(0)
        return (entropy + 1 - ((2 * overlap + self.smooth) / (both + self.smooth)).mean()).float()


class _Sums(torch.autograd.Function):
    """Mean cross entropy, and of each patch and channel the sums of p where the label is there, of p, and of the label.

    The gradient by a voxel's logits follows from its probabilities p, which are computed again, and from the gradients
    by these sums; the sums are float64, as millions of voxels need.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, label: torch.Tensor, regions: Regions, ignore: int | None) -> Any:
        """Read the patches once."""
        flat, label = logits.flatten(2), label.flatten(1)
        entropy, known = flat.new_zeros((2,), dtype=torch.float64)
        overlap, probable, true = flat.new_zeros((3, *flat.shape[:2]), dtype=torch.float64)
        for patch, voxels in _pieces(flat):
            x, own, truth, here = _piece(flat[patch, :, voxels], label[patch, voxels], regions, ignore)
            p, loss = _entropy(x, own, None if regions is None else truth)
            if here is not None:
                p, loss = p * here, loss * here
            entropy += loss.sum()
            known += x.shape[1] if here is None else here.sum()
            probable[patch] += p.sum(1)
            overlap[patch] += p.mul_(truth).sum(1)
            true[patch] += truth.sum(1)
        scale = 1 / (known * (1 if regions is None else flat.shape[1])).clamp_min(1)
        ctx.save_for_backward(logits, label, scale)
        ctx.regions, ctx.ignore = regions, ignore
        ctx.mark_non_differentiable(true)
        return entropy * scale, overlap, probable, true

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Read the patches again."""
        logits, label, scale = ctx.saved_tensors
        flat = logits.flatten(2)
        found = torch.empty_like(flat)
        by_entropy = (gradients[0] * scale).float()
        by_overlap, by_probable = (g.float()[:, :, None] for g in gradients[1:3])
        for patch, voxels in _pieces(flat):
            x, _, truth, here = _piece(flat[patch, :, voxels], label[patch, voxels], ctx.regions, ctx.ignore)
            by_p = torch.addcmul(by_probable[patch], by_overlap[patch], truth)
            if ctx.regions is None:
                p = x.softmax(0)
                by_x = by_p.sub_((by_p * p).sum(0)).mul_(p)
            else:
                p = x.sigmoid()
                by_x = by_p.mul_(p).mul_(1 - p)
            by_x.addcmul_(p.sub_(truth), by_entropy)
            found[patch, :, voxels] = by_x if here is None else by_x.mul_(here)
        return found.view(logits.shape), None, None, None


def _entropy(x: torch.Tensor, own: torch.Tensor, truth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute probabilities and entropy: of regions where their `truth` is given, else of exclusive labels."""
    if truth is not None:
        return x.sigmoid(), F.binary_cross_entropy_with_logits(x, truth, reduction="none")
    logarithms = x.log_softmax(0)
    loss = -logarithms.gather(0, own[None])  # which refuses labels that the network does not have
    return logarithms.exp_(), loss


def _pieces(flat: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Cut patches (N, channels, voxels) into pieces: the patch, and some of its voxels."""
    step = max(AT_ONCE.get(flat.device.type, ELSEWHERE) // flat.shape[1], 1)
    for patch in range(len(flat)):
        for start in range(0, flat.shape[2], step):
            yield patch, slice(start, start + step)


def _piece(
    logits: torch.Tensor, label: torch.Tensor, regions: Regions, ignore: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Prepare some voxels: logits, labels (0 where unknown), what belongs to each channel, and which voxels count.

    All are (channels, voxels) or (voxels), float32 but for the labels.
    """
    label = label.long()
    here = None if ignore is None else label != ignore
    own = label if here is None else label * here
    if regions is None:
        truth = own == torch.arange(len(logits), device=label.device)[:, None]
    else:
        truth = torch.stack([torch.isin(own, torch.tensor(region, device=label.device)) for region in regions])
    if here is None:
        return logits.float(), own, truth.float(), None
    return logits.float(), own, (truth & here).float(), here.float()
