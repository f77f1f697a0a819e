"""Scans are loaded as MONAI does where it is right, and as their headers say everywhere."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import GRIDS, grid, save
from monai.data import MetaTensor
from monai.transforms import LoadImage

from scripts.preprocessing.cache import CachedDataset
from scripts.preprocessing.loading import LoadScand, load_scan
from scripts.utils.errors import UserError


@pytest.mark.parametrize("kind", GRIDS)
def test_an_ordinary_scan_is_what_monai_loads(kind, tmp_path):
    shape, affine = grid(kind)
    image = nib.Nifti1Image(np.random.default_rng(0).integers(-99, 999, shape).astype(np.int16), affine)
    image.header.set_slope_inter(0.3, -7.0)
    nib.save(image, tmp_path / "scan.nii.gz")
    ours, theirs = (
        load_scan(tmp_path / "scan.nii.gz"),
        LoadImage("NibabelReader", ensure_channel_first=True)(tmp_path / "scan.nii.gz"),
    )
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, theirs.affine)
    for name in ("original_affine", "spatial_shape", "space"):
        np.testing.assert_array_equal(ours.meta[name], theirs.meta[name])


SHAPES = {  # as stored -> as loaded
    (4, 5, 6): (1, 4, 5, 6),
    (4, 5, 6, 1): (1, 4, 5, 6),
    (4, 5, 6, 1, 1): (1, 4, 5, 6),
    (4, 5, 6, 3): (3, 4, 5, 6),
    (4, 5, 6, 1, 3): (3, 4, 5, 6),  # ITK's vector
    (4, 5, 6, 3, 1): (3, 4, 5, 6),
    (4, 5): (1, 4, 5, 1),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_axes_of_one_voxel_go_and_channels_come_first(shape, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
    found = load_scan(save(tmp_path / "scan.nii.gz", voxels))
    assert found.shape == SHAPES[shape]
    assert int(found.sum()) == voxels.sum()
    if found.shape[0] == 3:
        np.testing.assert_array_equal(found[2].numpy(), voxels.reshape(4, 5, 6, 3)[..., 2])


def test_channels_may_differ_by_what_tools_leave_in_headers_and_no_more(tmp_path):
    affine, near, far = np.diag([1.0, 1.0, 2.0, 1.0]), np.zeros((4, 4)), np.zeros((4, 4))
    near[0, 1], far[0, 3] = 2e-5, 5.0
    files = [save(tmp_path / f"a_{i:04d}.nii.gz", np.ones((4, 4, 4), np.int16), affine + i * near) for i in range(2)]
    assert load_scan(files).shape == (2, 4, 4, 4)
    save(files[1], np.ones((4, 4, 4), np.int16), affine + far)
    with pytest.raises(UserError, match="a_0001.nii.gz lies elsewhere than .*a_0000.nii.gz"):
        load_scan(files)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("unknown", 1.0), ("micron", 1e-3), ("meter", 1e3)])
def test_the_unit_of_the_header_counts(unit, factor, tmp_path):
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    found = load_scan(tmp_path / "scan.nii")
    np.testing.assert_allclose(found.pixdim, np.array([2.0, 3.0, 4.0]) * factor)


def test_the_sform_decides_where_the_spacing_says_otherwise(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4))
    image.header["pixdim"][1:4] = 2
    nib.save(image, tmp_path / "scan.nii")
    found = load_scan(tmp_path / "scan.nii")
    np.testing.assert_array_equal(found.affine, np.eye(4))
    assert found.meta["header"] == (
        "its sform has voxels of 1 x 1 x 1 mm, its pixdim of 2 x 2 x 2 mm; the sform is taken"
    )


def test_what_a_host_has_loaded_passes():
    image = torch.ones(1, 2, 2, 2)
    assert LoadScand("image")({"image": image})["image"] is image


def test_the_case_is_known_by_its_id(tmp_path):
    path = save(tmp_path / "p1.T1.nii.gz", np.ones((2, 2, 2), np.int16))
    assert load_scan(path).meta["case"] == "p1.T1"
    assert LoadScand("image")({"image": str(path), "case": "sub-01"})["image"].meta["case"] == "sub-01"


def test_cases_that_share_a_cache_entry_keep_their_ids(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.ones((4, 5, 6), np.int16))
    shutil.copy(path, tmp_path / "b.c.nii.gz")
    cases = [{"case": name, "image": str(tmp_path / f"{name}.nii.gz")} for name in ("a", "b.c")]
    cases.append({"image": cases[1]["image"]})
    cached = CachedDataset(cases, [[LoadScand("image")]], str(tmp_path / "cache"), [1] * 3)
    assert [cached[index]["image"].meta["case"] for index in range(3)] == ["a", "b.c", "b.c"]
    assert len(list((tmp_path / "cache").glob("*/*.pt"))) == 1


@pytest.mark.parametrize("given", [torch.ones(4, 5, 6, dtype=torch.int16), np.ones((4, 5, 6), np.uint8)], ids=type)
def test_voxels_in_memory_get_the_axis_of_their_one_channel(given):
    for image in (given, given[None]):
        found = LoadScand("image")({"image": image})["image"]
        assert type(found) is type(given)
        assert tuple(found.shape) == (1, 4, 5, 6)
        assert str(found.dtype).endswith("float32")


def test_an_image_in_memory_keeps_its_place():
    image = MetaTensor(torch.ones(4, 5, 6), affine=np.diag([1.0, 2, 3, 1]), meta={"original_channel_dim": "no_channel"})
    found = LoadScand("image")({"image": image})["image"]
    assert found.shape == (1, 4, 5, 6)
    assert found.pixdim.tolist() == [1, 2, 3]
    assert found.meta["spatial_shape"].tolist() == [4, 5, 6]
    np.testing.assert_array_equal(found.meta["original_affine"], image.affine)
