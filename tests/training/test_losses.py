"""The loss is MONAI's where MONAI has one, and the published formula for regions and ignored voxels."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from scripts.training.losses import SegmentationLoss

REGIONS = [[1, 2], [2]]


def drawn(channels: int, classes: int, shape=(6, 5, 7), seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(2, channels, *shape, dtype=torch.float32, requires_grad=True)
    return logits, torch.randint(0, classes, (2, 1, *shape)).float()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 7), (9, 8)], ids=["3D", "2D"])
def test_exclusive_labels_give_the_value_and_gradient_of_monai(batch_dice, shape):
    logits, label = drawn(3, 3, shape)
    label[0] = 0  # a patch without foreground
    options = {"include_background": False, "smooth_nr": 1e-5, "smooth_dr": 1e-5, "batch": batch_dice}
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, **options)(logits, label)
    ours = SegmentationLoss(batch_dice)(logits, label)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_regions_are_the_sum_of_binary_cross_entropy_and_dice_of_each():
    logits, label = drawn(2, 3)
    truth = torch.cat([label >= 1, label == 2], dim=1).float()
    p = logits.sigmoid()
    entropy = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    overlap, both = (p * truth).sum((2, 3, 4)), (p + truth).sum((2, 3, 4))
    expected = entropy + 1 - ((2 * overlap + 1e-5) / (both + 1e-5)).mean()
    assert SegmentationLoss(regions=REGIONS)(logits, label).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("regions", [None, REGIONS], ids=["exclusive", "regions"])
def test_ignored_voxels_change_neither_value_nor_gradient(regions):
    logits, label = drawn(2 if regions else 3, 3)
    label[..., 4:] = 3
    loss = SegmentationLoss(regions=regions, ignore=3, batch_dice=True)
    (gradient,) = torch.autograd.grad(loss(logits, label), logits)
    assert not gradient[..., 4:].any()
    assert gradient[..., :4].any()
    known = SegmentationLoss(regions=regions, batch_dice=True)(logits[..., :4], label[..., :4])
    assert loss(logits, label).item() == pytest.approx(known.item(), rel=1e-6)


@pytest.mark.parametrize("regions", [None, REGIONS], ids=["exclusive", "regions"])
def test_a_patch_that_nobody_annotated_teaches_nothing(regions):
    logits, label = drawn(2 if regions else 3, 3)
    loss = SegmentationLoss(regions=regions, ignore=3)(logits, torch.full_like(label, 3))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_half_precision_logits_are_summed_in_full():
    logits, label = drawn(3, 3, (32, 32, 32))
    rounded = logits.detach().bfloat16()
    assert SegmentationLoss()(rounded, label).item() == SegmentationLoss()(rounded.float(), label).item()
