"""Labels between voxels that agree are those that interpolating everything gives."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from scripts.preprocessing import resampling
from scripts.preprocessing.agreement import MIXED, axes_of, label_at
from scripts.preprocessing.resampling import LabelsOnGrid, labels_on_grid

FINER = torch.diag(torch.tensor([0.8, 0.7, 1.5, 1.0], dtype=torch.float64))
TURNED = torch.tensor([[0, 0, -1.5, 29], [1.3, 0, 0, -2], [0, -0.7, 0, 20.4], [0, 0, 0, 1]], dtype=torch.float64)
AROUND = torch.tensor([[0.9, 0, 0, -4], [0, 0.9, 0, 3], [0, 0, 0.9, 0.5], [0, 0, 0, 1]], dtype=torch.float64)
GRIDS = {"finer": FINER, "turned": TURNED, "reaching out": AROUND, "the same": torch.eye(4).double()}
SIZE, SHAPE = (30, 28, 22), (40, 30, 31)


def scores(classes: int, edge: int) -> torch.Tensor:
    """Make random scores whose blobs have about `edge` voxels; 1 makes noise."""
    torch.manual_seed(classes)
    coarse = torch.randn(1, classes, *[n // edge for n in SIZE])
    return F.interpolate(coarse, size=SIZE, mode="trilinear")[0]


def everything_interpolated(*args, **kwargs) -> torch.Tensor:
    with patch.object(resampling, "axes_of", lambda to_other: None):
        return labels_on_grid(*args, **kwargs)


@pytest.mark.parametrize("target", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("edge", [1, 7])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("slab", [1, 2**21])
def test_scores_give_the_labels_of_a_full_interpolation(target, edge, classes, slab):
    given = scores(classes, edge)
    found = labels_on_grid(given, torch.eye(4), target, SHAPE, slab_voxels=slab)
    assert torch.equal(found, everything_interpolated(given, torch.eye(4), target, SHAPE))
    assert len(found.unique()) == classes


@pytest.mark.parametrize("target", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("planes", [1, 4])
def test_planes_that_come_a_few_at_a_time_give_the_same_labels(target, planes):
    given = scores(3, 7)
    found = LabelsOnGrid(given.shape, torch.eye(4), target, SHAPE, slab_voxels=1500)
    for part in given.split(planes, dim=1):
        found.add(part)
    assert torch.equal(found.labels, labels_on_grid(given, torch.eye(4), target, SHAPE))


@pytest.mark.parametrize("target", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("edge", [1, 7])
def test_regions_give_the_labels_of_a_full_interpolation(target, edge):
    given = scores(4, edge).sigmoid()
    found = labels_on_grid(given, torch.eye(4), target, SHAPE, region_order=[3, 300, 3, 1])
    expected = everything_interpolated(given, torch.eye(4), target, SHAPE, region_order=[3, 300, 3, 1])
    assert torch.equal(found, expected)
    assert found.unique().tolist() == [0, 1, 3, 300]


@pytest.mark.parametrize("target", GRIDS.values(), ids=GRIDS)
def test_a_label_map_gives_the_labels_of_a_full_interpolation(target):
    given = scores(40, 7).argmax(0)[None]
    target = target.clone()
    target[:3, 3] += torch.tensor([0.0137, 0.0231, -0.0173])  # half way between voxels rounding would decide
    found = labels_on_grid(given, torch.eye(4), target, SHAPE, classes=40)
    assert torch.equal(found, everything_interpolated(given, torch.eye(4), target, SHAPE, classes=40))
    assert len(found.unique()) > 10


def test_where_voxels_agree_nothing_is_interpolated():
    given = torch.zeros(3, *SIZE)
    given[1, :15] = given[2, 15:] = 1
    with patch.object(resampling, "scores_at", wraps=resampling.scores_at) as asked:
        found = labels_on_grid(given, torch.eye(4), FINER, (37, 40, 14))
    assert sum(call.args[1].shape[2] for call in asked.call_args_list) == 40 * 14  # one plane lies between the two
    assert (found[:18] == 1).all()
    assert (found[19:] == 2).all()


def test_an_organ_does_not_shrink_where_its_surfaces_lie_half_way():
    label = torch.zeros(1, 20, 20, 20)
    label[:, 6:14, 6:14, 6:14] = 1
    halves = torch.diag(torch.tensor([0.5, 0.5, 0.5, 1], dtype=torch.float64))
    found = labels_on_grid(label, torch.eye(4), halves, (40, 40, 40), classes=2)
    assert [int(line.sum()) for line in (found[:, 20, 20], found[20, :, 20], found[20, 20])] == [16] * 3


def test_the_label_of_most_weight_wins_also_where_no_corner_has_half():
    labels = torch.tensor([3, 1, 3, 2, 3, 2, 1, 0], dtype=torch.int16).view(2, 2, 2)
    assert label_at(labels, torch.full((1, 3), 0.5, dtype=torch.float64)).tolist() == [3]
    assert label_at(labels, torch.tensor([[0.9, 0.9, 0.9], [1.0, 1.0, 0.0]]).double()).tolist() == [0, 1]


def test_axes_that_lie_tilted_are_none():
    assert axes_of(TURNED) == [1, 2, 0]
    tilted = FINER.clone()
    tilted[0, 1] = 0.01
    assert axes_of(tilted) is None
    assert axes_of(torch.zeros(4, 4)) is None
    assert MIXED < 0  # no label
