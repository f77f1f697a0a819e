"""A DICOM SEG has the labels' names and codes, and comes back onto its series voxel for voxel."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import grid
from dicom_maker import multiframe, save_slices, slices

from scripts.data.images import read_image
from scripts.inference import export
from scripts.inference.dicom_seg import property_codes
from scripts.inference.export import Scan, read_mask, require_format, write_mask
from scripts.utils import packages
from scripts.utils.errors import UserError


def series(folder: Path, kind: str = "straight", change=lambda made: None) -> Path:
    shape, affine = grid(kind)
    made = slices(np.random.default_rng(0).integers(0, 99, shape).astype(np.int16), affine)
    for file in made:
        change(file)
    return save_slices(folder, made)


def mask_of(folder: Path, values=(1, 4)) -> np.ndarray:
    mask = np.zeros(read_image(folder).geometry.shape, np.int16 if max(values) > 255 else np.uint8)
    for number, value in enumerate(values):
        mask[3 + number : 9, 4:15, 2 + number : 7 + number] = value
    return mask


def written(path: Path, folder: Path, mask: np.ndarray, names: dict[int, str]) -> pydicom.Dataset:
    write_mask(path, mask, Scan(str(folder), np.eye(4), names))
    return pydicom.dcmread(path)


@pytest.mark.parametrize("kind", ["straight", "flipped", "permuted", "oblique", "thick"])
@pytest.mark.parametrize("several_frames", [False, True])
def test_a_mask_comes_back_onto_its_series(several_frames, kind, tmp_path):
    folder = series(tmp_path / "s", kind)
    if several_frames:
        shape, affine = grid(kind)
        folder = multiframe(tmp_path / "m/file", np.zeros(shape, np.int16), affine).parent
    mask = mask_of(folder)
    written(tmp_path / "a_seg.dcm", folder, mask, {1: "liver", 4: "spleen", 7: "in no voxel"})
    found = read_mask(tmp_path / "a_seg.dcm", str(folder))
    np.testing.assert_array_equal(found.voxels, mask)
    assert found.voxels.dtype == mask.dtype
    np.testing.assert_array_equal(found.geometry.affine, read_image(folder).geometry.affine)


def test_a_tilted_gantry_and_an_empty_mask_are_written(tmp_path):
    shape, affine = grid("straight")
    affine[:3, 2] = (0.0, 0.7, 2.0)
    folder = save_slices(tmp_path / "s", slices(np.zeros(shape, np.int16), affine))
    for mask in (mask_of(folder), 0 * mask_of(folder)):
        written(tmp_path / "a_seg.dcm", folder, mask, {1: "liver", 4: "spleen"})
        np.testing.assert_array_equal(read_mask(tmp_path / "a_seg.dcm", str(folder)).voxels, mask)


def test_names_in_any_alphabet_and_of_any_length(tmp_path):
    def change(made):
        made.SpecificCharacterSet, made.PatientName = "ISO_IR 100", "Müller^Jörg"

    folder = series(tmp_path / "s", change=change)
    names = {1: "Schädel\\頭 " + "x" * 90, 300: "a\nb"}
    mask = mask_of(folder, (1, 300, 301))
    found = written(tmp_path / "a_seg.dcm", folder, mask, names)
    assert found.PatientName == "Müller^Jörg"
    labels = [segment.SegmentLabel for segment in found.SegmentSequence]
    assert labels[0].startswith("Schädel/頭 xxx")
    assert labels[1:] == ["a b", "label 301"]  # a value without a name
    np.testing.assert_array_equal(read_mask(tmp_path / "a_seg.dcm", str(folder)).voxels, mask)


def test_a_series_without_a_patient_has_a_segmentation(tmp_path):
    gone = [
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyInstanceUID",
        "StudyID",
        "StudyDate",
        "StudyTime",
    ]
    gone += ["AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "Manufacturer"]

    def change(made):
        for name in gone:
            delattr(made, name)

    folder = series(tmp_path / "s", change=change)
    one, other = (written(tmp_path / f"{n}_seg.dcm", folder, mask_of(folder), {1: "liver", 4: "x"}) for n in "ab")
    assert one.StudyInstanceUID == other.StudyInstanceUID
    assert one.SOPInstanceUID != other.SOPInstanceUID


@pytest.mark.parametrize("keep", [0, 200, 3000, -200])
def test_a_damaged_mask_is_none(keep, tmp_path):
    folder = series(tmp_path / "s")
    written(tmp_path / "a_seg.dcm", folder, mask_of(folder), {1: "liver", 4: "x"})
    (tmp_path / "a_seg.dcm").write_bytes((tmp_path / "a_seg.dcm").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a_seg.dcm is no segmentation of .*; make it again"):
        read_mask(tmp_path / "a_seg.dcm", str(folder))


def test_a_mask_of_another_series_is_none(tmp_path):
    folder = series(tmp_path / "s")
    written(tmp_path / "a_seg.dcm", folder, mask_of(folder), {1: "liver", 4: "x"})
    shape, affine = grid("oblique")
    other = save_slices(tmp_path / "t", slices(np.zeros(shape, np.int16), affine, "1.2.3"))
    with pytest.raises(UserError, match="a_seg.dcm is no segmentation of"):
        read_mask(tmp_path / "a_seg.dcm", str(other))
    shutil.copy(next(folder.iterdir()), tmp_path / "b_seg.dcm")
    with pytest.raises(UserError, match="b_seg.dcm is no segmentation of"):
        read_mask(tmp_path / "b_seg.dcm", str(folder))


@pytest.mark.parametrize(
    ("name", "meanings"),
    [
        ("liver", ["Anatomical Structure", "Liver", None]),
        ("Left Kidney", ["Anatomical Structure", "Kidney", "Left"]),
        ("kidney_right", ["Anatomical Structure", "Kidney", "Right"]),
        ("left atrium", ["Anatomical Structure", "Left atrium", None]),
        ("lung_upper_lobe_left", ["Anatomical Structure", "Upper lobe of lung", "Left"]),
        ("vertebrae_L1", ["Anatomical Structure", "L1 vertebra", None]),
        ("gall bladder", ["Anatomical Structure", "Gallbladder", None]),
        ("liver tumor", ["Morphologically Abnormal Structure", "Neoplasm", None]),
        ("edema", ["Morphologically Abnormal Structure", "Edema", None]),
        ("label 2", ["Tissue", "Tissue", None]),
        ("left", ["Tissue", "Tissue", None]),
        ("", ["Tissue", "Tissue", None]),
    ],
)
def test_names_have_codes(name, meanings):
    assert [code and code.meaning for code in property_codes(name)] == meanings


def test_a_format_that_cannot_be_written_is_said_before_anything_is_segmented(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="scan.nrrd is no DICOM series, which a DICOM SEG refers to"):
        require_format("scan.nrrd", "dicom_seg")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    folder = str(tmp_path)
    with pytest.raises(UserError, match="needs the package highdicom: pip install pydicom highdicom SimpleITK"):
        require_format(folder, "dicom_seg")
    with pytest.raises(UserError, match="needs the package SimpleITK: pip install SimpleITK"):
        require_format("scan.nii", "nrrd")
    require_format("scan.nrrd", "nii.gz")
    assert set(export.WRITERS) == set(export.MASK_ENDINGS)


def test_png_is_of_single_slices(tmp_path):
    with pytest.raises(UserError, match="has 2 slices; expected one for a png mask"):
        write_mask(tmp_path / "a_seg.png", np.zeros((3, 3, 2), np.uint8), Scan("a.nii"))
    assert not list(tmp_path.iterdir())


def test_an_array_has_no_segmentation(tmp_path):
    with pytest.raises(UserError, match="the image is no DICOM series"):
        write_mask(tmp_path / "a_seg.dcm", np.zeros((3, 3, 2), np.uint8), Scan())
