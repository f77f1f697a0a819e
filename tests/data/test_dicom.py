"""DICOM series become volumes, or are refused in a sentence that names the file."""

from __future__ import annotations

import json
import locale
import logging
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from conftest import grid, save
from dicom_maker import header, multiframe, put_pixels, save_slices, slices, text
from pydicom.pixels import get_decoder
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)

from scripts.data.datasets import Dataset
from scripts.data.dicom_series import find_series
from scripts.data.images import parts, read_header, read_image
from scripts.data.scans import find_scans, image_files
from scripts.utils.errors import UserError

SHAPE = (9, 8, 6)
AFFINE = np.array([[-0.75, 0, 0, 20], [0, -1.5, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1.0]])
UIDS = [generate_uid(entropy_srcs=[name]) for name in ("one", "two")]


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, SHAPE).astype(np.int16)


def require_same(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    found = read_image(path)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_allclose(found.geometry.affine, affine, atol=1e-5)


@pytest.mark.parametrize("name", ["IM{:04d}", "{:d}", "I.{:d}", "x{:03d}.dcm", "y{:03d}.IMA"])
def test_files_may_have_any_name_and_order(name, voxels, tmp_path):
    require_same(save_slices(tmp_path / "s", slices(voxels, AFFINE), name), voxels)


def test_files_may_lie_in_folders_below_beside_others(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE))
    for number, file in enumerate(sorted(folder.iterdir())):
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        file.rename(folder / f"{number % 2}" / file.name)
    (folder / "readme.txt").write_text("no DICOM")
    (folder / ".hidden").write_bytes(bytes(128) + b"DICM")
    require_same(folder, voxels)
    assert len(parts(folder)) == SHAPE[2]


def test_one_file_stands_for_its_series(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE, UIDS[0]))
    save_slices(tmp_path / "s", slices(voxels[:, :, :3] + 1, AFFINE, UIDS[1]), "other{}")
    require_same(folder / "IM0002", voxels)
    require_same(folder / "other1", voxels[:, :, :3] + 1)


def test_without_its_mark_a_file_is_known_by_its_ending(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE, syntax=ImplicitVRLittleEndian), "{}.dcm")
    for file in folder.iterdir():
        made = pydicom.dcmread(file)
        del made.file_meta
        made.preamble = None
        made.save_as(file, implicit_vr=True, little_endian=True)
        assert file.read_bytes()[128:132] != b"DICM"
    require_same(folder, voxels)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16])
def test_stored_types_are_kept(kind, tmp_path):
    stored = np.random.default_rng(0).integers(0, 255, SHAPE).astype(kind)
    found = read_image(save_slices(tmp_path / "s", slices(stored, AFFINE)))
    assert found.voxels.dtype == kind
    np.testing.assert_array_equal(found.voxels, stored)


def test_one_scale_stays_beside_the_voxels(voxels, tmp_path):
    found = read_image(save_slices(tmp_path / "s", slices(voxels, AFFINE, scales=[(0.5, -1024)] * 6)))
    assert (found.slope, found.intercept, found.voxels.dtype) == (0.5, -1024.0, np.int16)
    np.testing.assert_array_equal(found.values, voxels * 0.5 - 1024)


def test_each_slice_has_its_own_scale(voxels, tmp_path):
    scales = [(1 + k / 4, 3.0 * k) for k in range(6)]
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE, scales=scales))
    expected = voxels * np.array([s for s, _ in scales]) + np.array([i for _, i in scales])
    require_same(folder, expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["oblique", "thick"])
def test_oblique_slices_lie_where_itk_sees_them(kind, tmp_path):
    shape, affine = grid(kind)
    stored = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
    folder = save_slices(tmp_path / "s", slices(stored, affine))
    require_same(folder, stored, affine)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    x, y, z = reader.Execute().TransformIndexToPhysicalPoint([4, 3, 2])
    np.testing.assert_allclose(read_image(folder).geometry.affine[:3] @ [4, 3, 2, 1], [-x, -y, z], atol=1e-4)


def test_slices_from_the_top_down_are_turned(voxels, tmp_path):
    down = AFFINE @ np.diag([1, 1, -1, 1.0])
    found = read_image(save_slices(tmp_path / "s", slices(voxels, down)))
    np.testing.assert_array_equal(found.values, voxels[:, :, ::-1])
    np.testing.assert_allclose(found.geometry.affine @ [0, 0, 5, 1], down @ [0, 0, 0, 1], atol=1e-5)


def test_a_tilted_gantry_shears_the_grid(voxels, tmp_path):
    sheared = AFFINE.copy()
    sheared[:3, 2] = (0, 0.9, 2.5)
    require_same(save_slices(tmp_path / "s", slices(voxels, sheared)), voxels, sheared)


def test_a_single_slice_has_its_thickness(voxels, tmp_path):
    require_same(save_slices(tmp_path / "s", slices(voxels[:, :, :1], AFFINE)), voxels[:, :, :1])


@pytest.mark.parametrize("kind", ["straight", "flipped", "permuted", "oblique"])
def test_frames_of_one_file_are_the_slices(kind, tmp_path):
    shape, affine = grid(kind)
    stored = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
    one, other = (
        multiframe(tmp_path / "m" / "file", stored, affine, (2, -5)),
        slices(stored, affine, scales=[(2, -5)] * shape[2]),
    )
    folder = save_slices(tmp_path / "s", other)
    require_same(one, read_image(folder).values, read_image(folder).geometry.affine)
    assert read_header(one.parent).geometry.shape == shape
    assert parts(one.parent) == [str(one)]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_transfer_syntaxes_are_read(syntax, voxels, tmp_path):
    made = slices(voxels, AFFINE, syntax=syntax)
    for file in made if syntax == ExplicitVRBigEndian else ():
        file.PixelData = np.frombuffer(file.PixelData, np.int16).astype(">i2").tobytes()
    require_same(save_slices(tmp_path / "s", made), voxels)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_pixels_are_read(syntax, voxels, tmp_path):
    made = slices(voxels, AFFINE)
    for file in made:
        file.compress(syntax, generate_instance_uid=False)
    require_same(save_slices(tmp_path / "s", made), voxels)


@pytest.mark.parametrize("scale", [(1, -1024), (2, -1024)])
def test_what_pydicom_cannot_decode_itk_does(scale, voxels, tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    folder = save_slices(tmp_path / "s", slices(np.abs(voxels), AFFINE, scales=[(1, 0)] * 6), shuffle=False)
    writer = SimpleITK.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    for file in list(folder.iterdir()):
        writer.SetFileName(str(folder / f"{file.name}.dcm"))
        writer.Execute(SimpleITK.ReadImage(str(file)))
        file.unlink()
        made = pydicom.dcmread(writer.GetFileName())
        assert made.file_meta.TransferSyntaxUID == JPEGLosslessSV1
        made.RescaleSlope, made.RescaleIntercept = scale
        made.save_as(writer.GetFileName())
    locale.setlocale(locale.LC_ALL, before)
    assert not get_decoder(JPEGLosslessSV1).is_available
    require_same(folder, np.abs(voxels) * float(scale[0]) + scale[1])
    assert locale.setlocale(locale.LC_ALL) == before


def test_compressed_pixels_that_are_none_are_named(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    for file in made:
        file.PixelData = pydicom.encaps.encapsulate([b"nothing!"])
        file["PixelData"].VR, file.file_meta.TransferSyntaxUID = "OB", JPEGLosslessSV1
    with pytest.raises(UserError, match=r"IM000\d \(\d+ bytes\) is not a complete DICOM file"):
        read_image(save_slices(tmp_path / "s", made))


# ---- what is refused


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_image(folder)
    with pytest.raises(UserError, match=message):
        read_header(folder)


@pytest.mark.parametrize("gone", [1, 3, 4])
def test_a_missing_slice_is_refused(gone, voxels, tmp_path):
    made = slices(voxels, AFFINE)
    del made[gone]
    folder = save_slices(tmp_path / "s", made, shuffle=False)
    refused(
        folder, rf"IM{gone - 1:04d} and .*IM{gone:04d} are 5 mm apart, .* usually 2.5 mm: 1 slices are missing there"
    )


def test_uneven_slices_are_refused(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    made[2].ImagePositionPatient[2] += 0.6
    refused(save_slices(tmp_path / "s", made, shuffle=False), "IM0001 and .*IM0002 are 3.1 mm apart.*not evenly spaced")


def test_slices_that_drift_are_refused(voxels, tmp_path):
    made = slices(np.repeat(voxels, 10, axis=2), AFFINE)
    for k, file in enumerate(made):
        file.ImagePositionPatient[2] += max(0, k - 30) * 0.2
    refused(save_slices(tmp_path / "s", made), "not evenly spaced")


def test_a_slice_beside_the_others_is_refused(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    made[2].ImagePositionPatient[0] += 3
    refused(save_slices(tmp_path / "s", made), "not evenly spaced")


def test_rounded_positions_are_even(voxels, tmp_path):
    made = slices(voxels, AFFINE @ np.diag([1, 1, 1 / 3, 1]))
    for file in made:
        file.ImagePositionPatient[2] = text(round(float(file.ImagePositionPatient[2]), 2))
    found = read_image(save_slices(tmp_path / "s", made))
    assert found.geometry.spacing[2] == pytest.approx(0.8333, abs=2e-3)


def test_a_copied_file_counts_once(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE))
    shutil.copy(folder / "IM0003", folder / "IM0003 copy")
    require_same(folder, voxels)


def test_two_slices_at_one_place_are_refused(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    folder = save_slices(tmp_path / "s", made, shuffle=False)
    made[2].SOPInstanceUID = made[2].file_meta.MediaStorageSOPInstanceUID = generate_uid()
    made[2].save_as(folder / "again")
    refused(folder, "(IM0002|again) and .*(IM0002|again) lie at one place, 2 slices")


@pytest.mark.parametrize(
    ("name", "value"),
    [("PixelSpacing", ["1", "1"]), ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), ("PixelSpacing", None)],
)
def test_slices_of_another_stack_are_refused(name, value, voxels, tmp_path):
    made = slices(voxels, AFFINE)
    setattr(made[2], name, value)
    refused(save_slices(tmp_path / "s", made, shuffle=False), rf"IM000\d has the {name} .* of the same series")


def test_another_size_is_refused(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    put_pixels(made[2], voxels[:-1, :, 2].T)
    refused(
        save_slices(tmp_path / "s", made, shuffle=False), r"IM0002 has the Columns 8, .*IM0000 of the same series 9"
    )


def test_colours_are_refused(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    for file in made:
        file.SamplesPerPixel, file.PhotometricInterpretation, file.PlanarConfiguration = 3, "RGB", 0
        file.PixelData = bytes(3 * len(file.PixelData))
    refused(save_slices(tmp_path / "s", made), "has colours; expected one number a voxel")


@pytest.mark.parametrize("which", [0, 2, 5])
@pytest.mark.parametrize("keep", [0, 140, 200, 300, 400, 700, 1000, -100])
def test_a_truncated_file_is_named(keep, which, voxels, tmp_path):
    file = save_slices(tmp_path / "s", slices(voxels, AFFINE), shuffle=False) / f"IM{which:04d}"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file.name} \(\d+ bytes\) is not a complete DICOM file"):
        read_image(file.parent)


def test_a_directory_of_files_and_notes_are_no_slices(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE))
    directory = header(UIDS[1], 0)
    directory.file_meta.MediaStorageSOPClassUID = directory.SOPClassUID = MediaStorageDirectoryStorage
    del directory.SeriesInstanceUID
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    (folder / "notes.txt").touch()
    require_same(folder, voxels)


def test_without_pixels_a_file_is_named(voxels, tmp_path):
    made = slices(voxels, AFFINE)
    del made[3].PixelData
    with pytest.raises(UserError, match="IM0003.* is not a complete DICOM file"):
        read_image(save_slices(tmp_path / "s", made, shuffle=False))


def test_a_folder_without_a_series_is_said(tmp_path):
    (tmp_path / "s").mkdir()
    report = header(UIDS[0], 0)
    report.Modality = "SR"
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    report.save_as(tmp_path / "s" / "report", enforce_file_format=True)
    refused(tmp_path / "s", "s has no DICOM series of slices")


# ---- which series


def coronal() -> np.ndarray:
    return AFFINE[:, [0, 2, 1, 3]] * np.array([1, -1, 1, 1])


def test_of_several_series_the_longest_axial_one_is_taken_and_said(voxels, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE, UIDS[0]))
    save_slices(folder, slices(np.repeat(voxels, 2, axis=2), coronal(), UIDS[1]), "cor{}")
    scout = slices(voxels[:, :, :1], AFFINE, UIDS[0])
    scout[0].ImageType, scout[0].SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], generate_uid()
    save_slices(folder, scout, "scout{}")
    require_same(folder, voxels)
    assert find_scans(str(folder)) == [{"case": "s", "image": str(folder)}]
    assert f"series {UIDS[0]} of 6 slices is taken; --series UID takes another: {UIDS[1]} of 12" in caplog.text
    found = find_scans(str(folder), series=UIDS[1])
    assert found[0]["case"] == "s"
    np.testing.assert_array_equal(read_image(found[0]["image"]).values[:, :, 0], voxels[:, :, 0])
    with pytest.raises(UserError, match=rf"has no series 1.2.3; there are: {UIDS[0]}"):
        find_scans(str(folder), series="1.2.3")


def listed(path: Path, content: object, channels: int = 1) -> dict[str, list[str]]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {case["case"]: image_files(case) for case in find_scans(str(path), channels)}


@pytest.mark.parametrize("made", ["csv", "json"])
def test_a_list_says_the_series_of_each_case(made, voxels, tmp_path):
    folder = save_slices(tmp_path / "dicom/s", slices(voxels, AFFINE, UIDS[0]))
    save_slices(folder, slices(voxels[:, :, ::-1] + 1, AFFINE, UIDS[1]), "other{}")
    save(tmp_path / "ct.nii.gz", voxels, AFFINE)
    entries = [
        {"case": "first", "image": "dicom/s", "series": UIDS[0]},
        {"case": "second", "image": str(folder / "IM0000"), "series": UIDS[1]},  # a file stands for its folder
        {"image": "dicom/s", "series": ""},
        {"image": "ct.nii.gz"},
    ]
    table = "case,image,series\n" + "".join(
        f"{','.join(e.get(k, '') for k in ('case', 'image', 'series'))}\n" for e in entries
    )
    found = listed(tmp_path / f"list.{made}", table if made == "csv" else entries)
    assert sorted(found) == ["ct", "first", "s", "second"]
    assert found["s"] == [str(folder)]
    require_same(found["first"][0], voxels)
    require_same(found["second"][0], voxels[:, :, ::-1] + 1)


@pytest.mark.parametrize("made", ["csv", "json"])
def test_a_list_says_the_series_of_each_channel(made, voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE, UIDS[0]))
    save_slices(folder, slices(voxels + 1, AFFINE, UIDS[1]), "other{}")
    rows = f"image_0001,image_0000,series_0000,series_0001,series_note\ns,s,{UIDS[1]}, {UIDS[0]},x\n"
    entries = [{"image": ["s", "s"], "series": [UIDS[1], UIDS[0]]}]
    ((one, other),) = listed(tmp_path / f"list.{made}", rows if made == "csv" else entries, 2).values()
    require_same(one, voxels + 1)
    require_same(other, voxels)


def test_a_list_of_training_cases_says_it_too(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE, UIDS[0]))
    save_slices(folder, slices(voxels + 1, AFFINE, UIDS[1]), "other{}")
    save(tmp_path / "label.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    entries = [{"case": n, "image": "s", "series": u, "label": "label.nii.gz"} for n, u in zip("ab", UIDS, strict=True)]
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "x"}, "training": "cases.json"}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "cases.json").write_text(json.dumps(entries))
    for case, add in zip(Dataset(tmp_path).cases, (0, 1), strict=True):
        require_same(case["image"], voxels + add)
        assert Path(case["label"]).name == "label.nii.gz"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"image": "s", "series": "1.2.3"}, f"s has no series 1.2.3; there are: {UIDS[0]} of 6 slices"),
        ({"image": "ct.nii.gz", "series": UIDS[1]}, f"ct.nii.gz has no series {UIDS[1]}; there are: {UIDS[0]}"),
        ({"image": "gone", "series": UIDS[0]}, "gone does not exist, where the series"),
        ({"image": "empty", "series": UIDS[0]}, "empty has no series .* there are: none"),
        ({"image": "s", "series": 3}, "series of case 0 of .*list.json is 3; expected the UID of a DICOM series"),
        ({"image": "s", "series": "CT thorax"}, "series of case 0 of .*list.json is 'CT thorax'; expected the UID"),
        ({"image": "s", "series": [[UIDS[0]]]}, "series of case 0 of .*expected the UID"),
        ({"image": "s", "series": {"uid": UIDS[0]}}, "series of case 0 of .*expected the UID"),
        ({"image": ["s", "s"], "series": UIDS[0]}, "expected a UID for each of the 2 images, in a list"),
        ({"image": "s", "series": [UIDS[0], UIDS[0]]}, "expected a UID for each of the 1 images, in a list"),
    ],
)
def test_a_list_with_a_wrong_series_is_refused(entry, said, voxels, tmp_path):
    save_slices(tmp_path / "s", slices(voxels, AFFINE, UIDS[0]))
    (tmp_path / "empty").mkdir()
    save(tmp_path / "ct.nii.gz", voxels, AFFINE)
    with pytest.raises(UserError, match=said):
        listed(tmp_path / "list.json", [entry])


def test_one_series_for_a_whole_list_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("image\na.nii.gz\n")
    with pytest.raises(UserError, match='series is 1.2, and .*list.csv lists cases; give each case its own "series"'):
        find_scans(str(tmp_path / "list.csv"), series="1.2")


def test_a_series_in_several_folders_cannot_be_named(voxels, tmp_path):
    made = slices(voxels, AFFINE, UIDS[0])
    save_slices(tmp_path / "s/a", made[:3])
    save_slices(tmp_path / "s/b", made[3:])
    with pytest.raises(UserError, match="lies in .*; move its files into one folder"):
        find_scans(str(tmp_path), series=UIDS[0])


def test_a_folder_of_folders_is_a_scan_each(voxels, tmp_path):
    for number, name in enumerate(("p.1", "p2/study/ct", "p3")):
        save_slices(tmp_path / name, slices(voxels + np.int16(number), AFFINE, generate_uid()))
    (tmp_path / "empty").mkdir()
    found = find_scans(str(tmp_path))
    assert [scan["case"] for scan in found] == ["p.1", "p2", "p3"]
    np.testing.assert_array_equal(read_image(found[1]["image"]).values, voxels + 1)


def test_channels_are_folders_too(voxels, tmp_path):
    for channel in range(2):
        save_slices(tmp_path / f"a_{channel:04d}", slices(voxels, AFFINE, generate_uid()))
    assert [(scan["case"], len(scan["image"])) for scan in find_scans(str(tmp_path), 2)] == [("a", 2)]


def test_the_folder_that_one_stands_in_has_its_name(voxels, tmp_path, monkeypatch):
    monkeypatch.chdir(save_slices(tmp_path / "here", slices(voxels, AFFINE)))
    assert find_scans(".") == [{"case": "here", "image": "."}]
    assert find_scans("IM0000")[0]["case"] == "here"


def test_modalities_that_are_no_scans_are_left_out(voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE))
    dose = slices(np.repeat(voxels, 2, axis=2), AFFINE, UIDS[1])
    for file in dose:
        file.Modality = "RTDOSE"
    save_slices(folder, dose, "dose{}")
    require_same(folder, voxels)
    assert [series.slices for series in find_series(folder)] == [6]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RescaleSlope", b"1,5 "),
        ("PixelSpacing", b"1,5\\1,5 "),
        ("ImagePositionPatient", b"0\\0"),
        ("RescaleIntercept", b"x "),
    ],
)
def test_what_is_no_number_is_named(name, value, voxels, tmp_path):
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE), shuffle=False)
    file = folder / "IM0002"
    found = pydicom.dcmread(file)[name].value
    old = "\\".join(map(str, found)) if isinstance(found, pydicom.multival.MultiValue) else str(found)
    raw = old.encode() + b" " * (len(old) % 2)
    content = file.read_bytes()
    assert content.count(raw) >= 1
    at = content.index(
        raw, content.index(pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(name)).group.to_bytes(2, "little"))
    )
    head = content[: at - 2] + len(value).to_bytes(2, "little")
    file.write_bytes(head + value + content[at + len(raw) :])
    with pytest.raises(UserError, match="IM0002|/s has DICOM files that make no volume"):
        read_image(folder)


@pytest.mark.parametrize(("slope", "intercept"), [("", ""), (0, 5), ("1e400", 0)])
def test_an_empty_scale_is_none(slope, intercept, voxels, tmp_path):
    made = slices(voxels, AFFINE)
    for file in made:
        file.RescaleSlope, file.RescaleIntercept = slope, intercept
    folder = save_slices(tmp_path / "s", made)
    if slope == "1e400":
        with pytest.raises(UserError, match=r"IM\d+ has the slope inf"):
            read_image(folder)
    else:
        require_same(folder, voxels + (intercept or 0))


def test_dicom_files_beside_scans_are_left_out_and_said(voxels, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    folder = save_slices(tmp_path / "s", slices(voxels, AFFINE), "{}.dcm")
    assert find_scans(str(folder)) == [{"case": "s", "image": str(folder)}]
    assert not caplog.messages
    save(folder / "a.nii.gz", voxels)
    assert [scan["case"] for scan in find_scans(str(folder))] == ["a"]
    assert "0.dcm, 1.dcm" in caplog.text


def test_a_damaged_folder_does_not_keep_the_others(voxels, tmp_path):
    save_slices(tmp_path / "a", slices(voxels, AFFINE))
    save_slices(tmp_path / "b", slices(voxels, AFFINE))
    (tmp_path / "b/IM0001").write_bytes((tmp_path / "b/IM0001").read_bytes()[:300])
    assert [scan["case"] for scan in find_scans(str(tmp_path))] == ["a", "b"]
    with pytest.raises(UserError):
        read_image(tmp_path / "b")
