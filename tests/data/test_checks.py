"""Checks of single files fire where they should."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from scripts.data.checks import check_image, check_same_grid, label_indices
from scripts.data.geometry import Geometry, StoredImage
from scripts.utils.errors import UserError

GRID = Geometry((2, 2, 2), np.diag([1.0, 1.0, 2.0, 1.0]))


def image(voxels, slope: float = 1.0, intercept: float = 0.0) -> StoredImage:
    return StoredImage("scan.nii", GRID, np.asarray(voxels), slope, intercept)


def test_voxels_that_are_not_finite_are_counted():
    with pytest.raises(UserError, match="scan.nii has 2 NaN or infinite voxels"):
        check_image(image(np.array([[[np.nan, 1.0], [np.inf, 2.0]]])))


@pytest.mark.parametrize("shape", [(3, 3), (2, 2, 2, 1, 3)])
def test_images_are_3d_or_have_their_channels_last(shape):
    with pytest.raises(UserError, match="expected a 3D scan, or 4D with the channels last"):
        check_image(image(np.zeros(shape)))
    check_image(image(np.zeros((2, 2, 2, 3))))


def test_values_become_their_places():
    stored = np.array([[[0, 2], [4, 2]]], np.int16)
    np.testing.assert_array_equal(label_indices(image(stored), [0, 2, 4]), [[[0, 1], [2, 1]]])
    np.testing.assert_array_equal(label_indices(image(stored, slope=0.5), [0, 1, 2]), stored // 2)
    np.testing.assert_array_equal(label_indices(image(stored.astype(np.float32)), [0, 1, 2, 3, 4]), stored)


@pytest.mark.parametrize(
    ("value", "values", "message"),
    [
        (7, [0, 1], "label value 7; dataset.json names 0 to 1"),
        (-1, [0, 1], "label value -1;"),
        (0.5, [0, 1], "label value 0.5;"),
        (np.nan, [0, 1], "label value .*nan"),
        (3, [0, 2, 4], "label value 3; dataset.json names 0, 2, 4"),
    ],
)
def test_another_value_is_named(value, values, message):
    with pytest.raises(UserError, match=message):
        label_indices(image(np.full((1, 1, 2), value)), values)


def test_grids_may_differ_by_what_tools_leave_behind():
    def moved(by: float, turned: float = 0.0) -> Geometry:
        affine = GRID.affine.copy()
        affine[0, 3] += by
        affine[0, 1] += turned
        return Geometry(GRID.shape, affine)

    check_same_grid("a", GRID, "b", moved(0.09, 9e-4))
    for far in (moved(0.11), moved(0.0, 2e-3)):
        with pytest.raises(UserError, match="a lies elsewhere than b: affine"):
            check_same_grid("a", GRID, "b", far)
    with pytest.raises(UserError, match=r"a has \(2, 2, 2\) voxels but b has \(2, 2, 3\)"):
        check_same_grid("a", GRID, "b", Geometry((2, 2, 3), GRID.affine))


@pytest.mark.parametrize(
    ("edge", "other", "apart"),
    [
        (4.6e-6, 9.2e-6, True),
        (4.6e-6, 4.60001e-6, False),
        (1.0, 1.0009, False),
        (1.0, 1.002, True),
        (0.05, 0.0509, False),
    ],
)
def test_nanometres_are_compared_as_nanometres(edge, other, apart):
    one, two = (Geometry((9, 9, 9), np.diag([size] * 3 + [1.0])) for size in (edge, other))
    with pytest.raises(UserError, match="lies elsewhere") if apart else nullcontext():
        check_same_grid("a", one, "b", two)
