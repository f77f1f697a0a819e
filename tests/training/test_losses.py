"""The loss is MONAI's where MONAI has one, and the published formula for regions and ignored voxels."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.training import losses
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


def whole(logits: torch.Tensor, label: torch.Tensor, regions, ignore, batch_dice: bool) -> torch.Tensor:
    """The loss by its formula, from probabilities and one-hot labels of whole patches, in float64."""
    logits, known = logits.double(), torch.ones_like(label).double() if ignore is None else (label != ignore).double()
    groups = [[c] for c in range(logits.shape[1])] if regions is None else regions
    truth = torch.cat([sum((label == value) * known for value in group) for group in groups], dim=1)
    if regions is None:
        p = logits.softmax(1)
        entropy = -(logits.log_softmax(1) * truth).sum() / known.sum()
    else:
        p = logits.sigmoid()
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        entropy = (each * known).sum() / known.sum() / len(groups)
    axes = [*([0] if batch_dice else []), *range(2, label.ndim)]
    dice = (2 * (p * truth).sum(axes) + 1e-5) / ((p * known).sum(axes) + truth.sum(axes) + 1e-5)
    return entropy + 1 - dice[..., 1:].mean() if regions is None else entropy + 1 - dice.mean()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["rows", "channels last"])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(
    ("classes", "regions", "ignore"),
    [(2, None, None), (15, None, None), (15, None, 15), (143, None, 143), (3, REGIONS, None), (3, REGIONS, 3)],
)
def test_pieces_add_up_to_the_whole(classes, regions, ignore, batch_dice, layout, monkeypatch):
    monkeypatch.setitem(losses.AT_ONCE, "cpu", 700)  # many pieces, the last one shorter
    logits, label = drawn(len(regions) if regions else classes, classes + (ignore is not None), (9, 8, 7))
    logits = (3 * logits.detach()).contiguous(memory_format=layout).requires_grad_()
    ours = SegmentationLoss(batch_dice, regions, ignore)(logits, MetaTensor(label))
    expected = whole(logits, label, regions, ignore, batch_dice)
    assert ours.item() == pytest.approx(expected.item(), rel=2e-7)
    found, right = (torch.autograd.grad(2 * loss, logits)[0] for loss in (ours, expected))
    assert (found - right).abs().max() < 2e-6 * right.abs().max()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_monai_in_double_precision_has_the_same_value_and_gradient(batch_dice):
    logits, label = drawn(15, 15, (16, 16, 16))
    options = {"include_background": False, "smooth_nr": 1e-5, "smooth_dr": 1e-5, "batch": batch_dice}
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, **options)(logits.double(), label)
    ours = SegmentationLoss(batch_dice)(logits, label)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-7)
    found, right = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    assert (found - right).abs().max() < 1e-6 * right.abs().max()


def test_resolutions_of_deep_supervision_are_summed_as_by_monai():
    heads = [drawn(3, 3, (n, n, n))[0] for n in (16, 8, 4)]
    label = torch.randint(0, 3, (2, 1, 16, 16, 16)).float()
    options = {"include_background": False, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
    ours, theirs = (
        DeepSupervisionLoss(loss, weight_mode="exp")(heads, label)
        for loss in (SegmentationLoss(), DiceCELoss(to_onehot_y=True, softmax=True, **options))
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(ours, heads), torch.autograd.grad(theirs, heads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("regions", [None, REGIONS], ids=["exclusive", "regions"])
def test_nothing_of_the_logits_size_is_made_but_their_gradient(regions, monkeypatch):
    monkeypatch.setitem(losses.AT_ONCE, "cpu", 2**10)
    logits, label = drawn(2 if regions else 15, 3, (16, 16, 16))
    label = label.long()
    made = {}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= logits.nbytes // 4:
                made[storage.data_ptr()] = storage  # held, so that no later one has its place
            return result

    with Watched():
        SegmentationLoss(regions=regions, ignore=3)(logits, label).backward()
    assert logits.grad is not None
    given = {t.untyped_storage().data_ptr() for t in (logits, label)}
    assert made.keys() - given == {logits.grad.untyped_storage().data_ptr()}


def test_a_label_without_a_channel_is_refused():
    logits, label = drawn(3, 4)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        SegmentationLoss()(logits, label)
