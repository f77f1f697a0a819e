"""One reader: a geometry that is the file's own, and damaged files that are named."""

from __future__ import annotations

import builtins

import nibabel as nib
import numpy as np
import pytest
from conftest import GRIDS, grid, save, save_without_spacing

from scripts.data.geometry import Geometry, tilt
from scripts.data.images import read_header, read_image
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


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii.gz", ".NII.GZ", ".Nii.Gz", ".nii.GZ", ".Nii", ".NII"])
def test_endings_in_any_case_are_read_from_the_file_that_is_named(ending, kind, tmp_path):
    written = tmp_path / f"a{ending.lower()}"
    nib.save(kind(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4)), written)
    read = read_image(written.rename(tmp_path / f"b{ending}"))
    np.testing.assert_array_equal(read.voxels.ravel(), np.arange(8))


@pytest.mark.parametrize("read", [read_image, read_header])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_is_opened_once(ending, kind, read, tmp_path, monkeypatch):
    path = tmp_path / f"scan{ending}"
    nib.save(kind(np.ones((9, 9, 9), np.int16), np.eye(4)), path)
    opened, found = builtins.open, []
    monkeypatch.setattr(builtins, "open", lambda *args, **more: (found.append(args[0]), opened(*args, **more))[1])
    assert read(path).geometry.shape == (9, 9, 9)
    assert len(found) == 1


def test_an_extension_of_any_length_lies_before_the_voxels(tmp_path):
    image = nib.Nifti1Image(np.arange(27, dtype=np.int16).reshape(3, 3, 3), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    for ending in (".nii", ".nii.gz"):
        nib.save(image, tmp_path / f"scan{ending}")
        np.testing.assert_array_equal(read_image(tmp_path / f"scan{ending}").voxels, image.dataobj)


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


def damaged(kind: str, content: bytearray) -> bytearray:
    """Change a header in a way that has been seen in the wild, or that fuzzing found."""
    changes = {
        "datatype": (70, (9999).to_bytes(2, "little")),
        "huge": (42, (30000).to_bytes(2, "little") * 3),
        "negative": (42, (-5).to_bytes(2, "little", signed=True)),
        "offset": (108, b"\x00\x00\x80\x7f"),  # inf
        "nan affine": (280, b"\x00\x00\xc0\x7f"),
        "magic": (344, b"oops"),
    }
    place, new = changes[kind]
    content[place : place + len(new)] = new
    return content


@pytest.mark.parametrize("kind", ["datatype", "huge", "negative", "offset", "nan affine", "magic"])
def test_a_damaged_header_is_a_sentence(kind, tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4))
    (tmp_path / "scan.nii").write_bytes(damaged(kind, bytearray(image.to_bytes())))
    with pytest.raises(UserError, match="scan.nii"):
        read_image(tmp_path / "scan.nii")


@pytest.mark.parametrize("kind", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]], ids=["complex", "colours"])
def test_voxels_that_are_no_intensities_are_refused(kind, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), kind), np.eye(4)), tmp_path / "scan.nii.gz")
    with pytest.raises(UserError, match="scan.nii.gz has (complex voxels|colours)"):
        read_image(tmp_path / "scan.nii.gz")


def test_one_flipped_bit_is_noticed(tmp_path):
    generator = np.random.default_rng(0)
    voxels = generator.integers(0, 2000, (24, 24, 12)).astype(np.int16)
    whole = save(tmp_path / "scan.nii.gz", voxels).read_bytes()
    unnoticed = 0
    for _ in range(200):
        content = bytearray(whole)
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        (tmp_path / "scan.nii.gz").write_bytes(content)
        try:
            found = read_image(tmp_path / "scan.nii.gz")
            unnoticed += not np.array_equal(found.voxels, voxels)
        except UserError:
            continue
    assert unnoticed == 0


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
