"""One reader: a geometry that is the file's own, and damaged files that are named."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from conftest import GRIDS, grid, save, save_without_spacing

from scripts.data.images import Geometry, read_image, tilt
from scripts.utils.errors import UserError


@pytest.mark.parametrize("kind", GRIDS)
def test_spacing_and_orientation_are_those_of_the_affine(kind, tmp_path):
    shape, affine = grid(kind)
    path = save(tmp_path / "scan.nii.gz", np.zeros(shape, np.int16), affine)
    geometry, header = read_image(path).geometry, nib.load(path).header
    assert geometry.shape == shape
    np.testing.assert_allclose(geometry.spacing, header.get_zooms(), rtol=1e-6)
    assert geometry.orientation == "".join(nib.aff2axcodes(affine))
    ras = nib.as_closest_canonical(nib.load(path))
    assert tuple(geometry.in_ras(geometry.shape)) == ras.shape
    np.testing.assert_allclose(geometry.in_ras(geometry.spacing), ras.header.get_zooms(), rtol=1e-6)


def test_tiny_spacings_keep_their_digits():
    assert Geometry((2, 2, 2), np.diag([4.6e-6, 4.6e-6, 3e-5, 1])).spacing == (4.6e-6, 4.6e-6, 3e-5)


def test_voxels_are_as_stored_with_what_makes_values_of_them(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 3.0)
    nib.save(image, tmp_path / "scan.nii")
    found = read_image(tmp_path / "scan.nii")
    assert (found.voxels.dtype, found.slope, found.intercept, found.scaled) == (np.int16, 0.5, 3.0, True)
    np.testing.assert_array_equal(found.voxels * found.slope + found.intercept, nib.load(found.path).get_fdata())


def test_channels_come_one_by_one(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9, (2, 3, 4, 2)).astype(np.int16)
    found = list(read_image(save(tmp_path / "scan.nii.gz", voxels)).channels())
    assert len(found) == 2
    np.testing.assert_array_equal(found[1].voxels, voxels[..., 1])


def test_what_is_no_nifti_file_is_said(tmp_path):
    nib.save(nib.MGHImage(np.zeros((2, 2, 2), np.float32), np.eye(4)), tmp_path / "scan.mgz")
    with pytest.raises(UserError, match=r"scan.mgz is a MGHImage; expected a NIfTI file: convert it"):
        read_image(tmp_path / "scan.mgz")


def test_a_spacing_of_zero_is_not_read_as_one_millimetre(tmp_path):
    with pytest.raises(UserError, match="has a voxel spacing of 1 x 1 x 0 mm; expected it positive"):
        read_image(save_without_spacing(tmp_path / "scan.nii"))


@pytest.mark.parametrize("keep", [0, 40, 300, 500])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = save(tmp_path / "scan.nii.gz", np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"scan.nii.gz \({keep} bytes\) is not a complete NIfTI file"):
        read_image(path)


def turned(*degrees: float) -> np.ndarray:
    """An affine of 1 x 2 x 3 mm voxels, turned about x, y and z."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    for axis, angle in enumerate(np.radians(degrees)):
        one, other = [a for a in range(3) if a != axis]
        turn = np.eye(4)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        affine = turn @ affine
    return affine


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [((0, 0, 0), 0), ((0, 0, 20), 20), ((50, 0, 0), 40), ((0, 90, 0), 0), ((0, -100, 180), 10), ((0, 0, 45), 45)],
)
def test_tilt_is_what_the_nearest_axes_leave(degrees, expected):
    for unit in (1e-6, 1.0, 1e3):
        affine = turned(*degrees) * np.array([unit] * 3 + [1.0])
        assert tilt(affine) == pytest.approx(expected, abs=1e-4)
    assert tilt(turned(*degrees)[:, [2, 0, 1, 3]] * [-1, 1, -1, 1]) == pytest.approx(expected, abs=1e-4)
