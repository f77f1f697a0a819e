"""Masks have the values of the data set's files, and headers that other programs understand."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from scripts.data.scans import mask_name
from scripts.inference.export import LabelValuesd, LabelWriter, MaskLayout, Scan, write_mask
from scripts.preprocessing.loading import load_scan
from scripts.utils.errors import UserError


def test_values_of_the_files_are_put_back():
    labels = MetaTensor(
        torch.tensor([[[[0, 1, 2]]]], dtype=torch.uint8), affine=torch.diag(torch.tensor([2.0, 2, 2, 1]))
    )
    found = LabelValuesd("pred", [0, 2, 300])({"pred": labels})["pred"]
    assert found.tolist() == [[[[0, 2, 300]]]]
    assert torch.equal(found.affine, labels.affine)
    for closed in (None, [0, 1, 2]):
        assert LabelValuesd("pred", closed)({"pred": labels})["pred"] is labels


def scan_of(kind: str, path: Path) -> nib.Nifti1Image:
    """Save a scan whose header says where it lies in an unusual way."""
    affine = np.array([[0, 0, 3.0, 20], [1.0, 0, 0, 30], [0, -2.0, 0, 5], [0, 0, 0, 1]])
    shape = {"single slice": (4, 5, 1), "four axes": (4, 5, 6, 1), "vector": (4, 5, 6, 1, 2)}.get(kind, (4, 5, 6))
    image = nib.Nifti1Image(np.zeros(shape, ">i2" if kind == "big-endian" else np.int16), affine)
    if kind == "qform alone":
        image.set_sform(None, code=0)
        image.set_qform(affine, code="scanner")
    if kind == "qform elsewhere":
        image.set_qform(np.diag([1.0, 2.0, 3.0, 1.0]) @ affine, code="scanner")
        image.set_sform(affine, code="mni")
    if kind == "micron":
        image.header.set_xyzt_units("micron")
    if kind == "no form":
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)
    if kind == "scaled":
        image.header.set_slope_inter(0.5, 3)
        image.header["cal_max"] = 99
    nib.save(nib.Nifti2Image.from_image(image) if kind == "NIfTI-2" else image, path)
    return nib.load(path)


KINDS = (
    "plain", "qform alone", "qform elsewhere", "micron", "no form", "scaled", "big-endian", "single slice",
    "four axes", "vector", "NIfTI-2",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_lies_on_its_scan_for_nibabel_and_for_itk(kind, tmp_path):
    scan = scan_of(kind, tmp_path / "scan.nii.gz")
    loaded = load_scan(tmp_path / "scan.nii.gz", "a.b c")
    labels = MetaTensor(torch.zeros(1, *scan.shape[:3], dtype=torch.uint8), affine=loaded.affine, meta=loaded.meta)
    labels[0, 1, 2, 0] = 7
    options = {"output_dtype": None, "resample": False, "print_log": False, "output_name_formatter": mask_name}
    SaveImaged("pred", folder_layout=MaskLayout(str(tmp_path / "masks")), writer=LabelWriter, **options)(
        {"pred": labels}
    )
    path = tmp_path / "masks" / "a.b c_seg.nii.gz"
    mask = nib.load(path)
    assert mask.shape == scan.shape[:3]
    assert mask.get_data_dtype() == np.uint8
    assert int(np.asarray(mask.dataobj)[1, 2, 0]) == 7 == int(np.asarray(mask.dataobj).sum())
    for name in ("get_sform", "get_qform"):
        ours, theirs = (getattr(image, name)(coded=True) for image in (mask, scan))
        assert ours[1] == theirs[1]
        if theirs[0] is not None:
            np.testing.assert_array_equal(ours[0], theirs[0])
    assert mask.header.get_xyzt_units()[0] == scan.header.get_xyzt_units()[0]
    if kind in ("four axes", "vector", "NIfTI-2"):  # images of more axes, and those ITK does not read, have no pair
        return
    one, other = (SimpleITK.ReadImage(str(file)) for file in (path, tmp_path / "scan.nii.gz"))
    assert one.GetSize() == other.GetSize()
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(one, get)(), getattr(other, get)(), rtol=1e-6, atol=1e-6)


def test_the_mask_of_an_array_has_its_affine_in_both_forms(tmp_path):
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    labels = MetaTensor(torch.ones(1, 4, 5, 6, dtype=torch.int16), affine=torch.from_numpy(affine))
    writer = LabelWriter()
    writer.set_data_array(labels, channel_dim=0)
    writer.set_metadata({"affine": affine}, resample=False)
    writer.write(tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == (2, 2)
    np.testing.assert_array_equal(mask.get_qform(), affine)
    assert mask.header.get_xyzt_units()[0] == "mm"


def test_a_mask_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "masks"
    folder.write_text("a file, where a folder should be")
    writer = LabelWriter()
    writer.set_data_array(np.ones((4, 5, 6), np.uint8), channel_dim=None)
    writer.set_metadata({"affine": np.eye(4)}, resample=False)
    with pytest.raises(UserError, match="masks/mask.nii.gz could not be written .File exists: .*/masks"):
        writer.write(folder / "mask.nii.gz")
    assert folder.read_text().startswith("a file")


def layout(folder, **options) -> MaskLayout:
    return MaskLayout(str(folder), **options)


@pytest.mark.parametrize("name", ["a.nii.gz", "b c.NRRD", "x.seg.nrrd", "m.mha", "p.png"])
def test_one_mask_has_the_name_that_it_is_given(tmp_path, name):
    found = layout(tmp_path / "tables", output_file=str(tmp_path / f"new/{name}"))
    found.require([{"case": "case", "image": "scan.nii.gz"}])
    assert found.mask({"case": "case", "image": "scan.nii.gz"}) == tmp_path / f"new/{name}"
    write_mask(found.mask({"case": "case", "image": "scan.nii.gz"}), np.ones((4, 3, 1), np.uint8), Scan())
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    image = SimpleITK.ReadImage(str(tmp_path / f"new/{name}"))
    assert SimpleITK.GetArrayFromImage(image).all()


@pytest.mark.parametrize(
    ("options", "cases", "said"),
    [
        ({"output_file": "a.nii.gz"}, 2, "output_file a.nii.gz is the mask of one scan, and there are 2"),
        ({"output_file": "a.vtk"}, 1, r"a.vtk does not end as a mask does; expected .nii.gz, .nrrd, .mha, .png, .dcm"),
        ({"output_file": "a"}, 1, "a does not end as a mask does"),
        ({"output_file": "a.nii.gz", "output_format": "mha"}, 1, "ends as nii.gz does, output_format is mha; give one"),
        ({"output_file": "a.dcm"}, 1, "scan.nii.gz is no DICOM series"),
    ],
)
def test_a_name_that_no_mask_can_have_is_refused(tmp_path, options, cases, said):
    with pytest.raises(UserError, match=said):
        layout(tmp_path, **options).require([{"case": "case", "image": "scan.nii.gz"}] * cases)
