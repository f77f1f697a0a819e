"""The largest component is the one that SciPy's labelling of voxels finds, whatever the labels look like."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from scripts.inference.components import keep_largest


def by_voxels(labels: np.ndarray, steps: list[list[int]]) -> np.ndarray:
    """Do the same by scipy.ndimage.label, whose neighbours share a face."""
    out = labels.copy()
    for members in steps:
        component, count = ndimage.label(np.isin(out, members))
        sizes = np.bincount(component.ravel(), minlength=count + 1)
        sizes[0] = 0
        out[(component > 0) & (sizes[component] < sizes.max())] = 0
    return out


@pytest.mark.parametrize("shape", [(9, 8, 7), (1, 6, 30), (30, 1, 6), (6, 30, 1)])
@pytest.mark.parametrize("steps", [[[1]], [[1], [2], [3]], [[1, 2, 3]], [[1, 2, 3], [2, 3], [3]]], ids=str)
@pytest.mark.parametrize("filled", [0.2, 0.35, 0.6, 1.0])
def test_equals_labelling_voxel_by_voxel(shape, steps, filled):
    random = np.random.default_rng(0)
    for _ in range(20):
        labels = (random.integers(1, 4, shape) * (random.random(shape) < filled)).astype(np.uint8)
        assert np.array_equal(keep_largest(labels, steps), by_voxels(labels, steps))


def test_order_of_the_axes_in_memory_does_not_matter():
    labels = np.asfortranarray(np.random.default_rng(1).integers(0, 3, (9, 8, 7)).astype(np.int16))
    assert np.array_equal(keep_largest(labels, [[1], [2]]), by_voxels(labels, [[1], [2]]))


def test_voxels_that_share_an_edge_alone_are_not_connected():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, 0], labels[1, 1, :2] = 1, 1
    assert keep_largest(labels, [[1]]).sum() == 2


def test_the_end_of_a_row_does_not_touch_the_start_of_the_next():
    labels = np.zeros((2, 2, 4), np.uint8)
    labels[0, 0, 2:], labels[0, 1, :1] = 1, 1
    assert keep_largest(labels, [[1]]).sum() == 2


def test_the_last_row_of_a_plane_does_not_touch_the_first_of_the_next():
    labels = np.zeros((2, 3, 4), np.uint8)
    labels[0, 2, 1:], labels[1, 0, 1:3] = 1, 1
    assert keep_largest(labels, [[1]]).sum() == 3


def test_all_of_the_largest_components_stay_where_several_are():
    labels = np.zeros((9, 3, 3), np.uint8)
    labels[0:2], labels[3:5], labels[6] = 1, 1, 1
    kept = keep_largest(labels, [[1]])
    assert np.array_equal(kept[:6], labels[:6])
    assert not kept[6].any()


def test_labels_of_one_step_are_one_object():
    labels = np.zeros((9, 3, 3), np.uint8)
    labels[0:2], labels[2:4], labels[5:8] = 1, 2, 1
    assert np.array_equal(keep_largest(labels, [[1, 2]])[:4], labels[:4])  # 4 planes against 3
    assert not keep_largest(labels, [[1], [2]])[:2].any()  # alone, the 3 planes are the largest of label 1


def test_a_label_that_is_not_there_changes_nothing_and_the_given_array_stays():
    labels = np.zeros((5, 3, 3), np.int16)
    labels[0], labels[2:4] = 1, 1
    before = labels.copy()
    assert np.array_equal(keep_largest(labels, [[2]]), before)
    kept = keep_largest(labels, [[1]])
    assert not kept[0].any()
    assert kept.dtype == np.int16
    assert np.array_equal(labels, before)
    assert not keep_largest(np.zeros((3, 3, 3), np.uint8), [[1], [1, 2]]).any()
