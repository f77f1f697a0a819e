"""The same scan is the same in every format, for nibabel, for SimpleITK and for the bundle's one reader."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import GRIDS, grid, save
from dicom_maker import LPS, save_slices, slices
from PIL import Image

from scripts.data.datasets import Dataset
from scripts.data.images import format_of, parts, read_header, read_image
from scripts.data.scans import find_scans, list_scans, mask_file
from scripts.preprocessing.cache_key import image_digest
from scripts.utils import packages
from scripts.utils.errors import UserError

ITK = ("nrrd", "nhdr", "mha", "mhd")


def itk_image(voxels: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """The image as SimpleITK has it: (Z, Y, X), and x to the left, y to the back."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
    lps = LPS @ affine
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(edges.tolist())
    image.SetDirection((lps[:3, :3] / edges).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def write(folder: Path, name: str, kind: str, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Write voxels in a format: a file, or a folder of DICOM slices."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "dicom":
        return save_slices(folder / name, slices(voxels, affine))
    path = folder / f"{name}.{kind}"
    if kind.startswith("nii"):
        return save(path, voxels, affine)
    SimpleITK.WriteImage(itk_image(voxels, affine), str(path), kind != "mhd")
    return path


def right_handed(kind: str) -> tuple[tuple[int, ...], np.ndarray]:
    """A grid as DICOM has it, whose slices lie along the normal of rows and columns."""
    shape, affine = grid(kind)
    affine[:3, 2] *= np.sign(np.linalg.det(affine[:3, :3]))
    return shape, affine


@pytest.mark.parametrize("form", [*ITK, "dicom", "nii", "NRRD", "MHA"])
@pytest.mark.parametrize("kind", GRIDS)
def test_a_scan_lies_where_nibabel_and_itk_see_it(form, kind, tmp_path):
    shape, affine = right_handed(kind)
    voxels = np.random.default_rng(0).integers(-1000, 2000, shape).astype(np.int16)
    truth = nib.load(save(tmp_path / "truth.nii.gz", voxels, affine))
    path = write(tmp_path, "scan", form.lower(), voxels, affine)
    if form.isupper():
        path = path.rename(path.with_suffix(f".{form}"))
    found = read_image(path)
    np.testing.assert_array_equal(found.values, voxels)
    np.testing.assert_allclose(found.geometry.affine, truth.affine, rtol=1e-6, atol=1e-5)
    assert found.voxels.dtype == np.int16
    header = read_header(path)
    assert (header.geometry.shape, header.channels) == (shape, 1)
    np.testing.assert_array_equal(header.geometry.affine, found.geometry.affine)
    if form == "dicom":
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
        seen = reader.Execute()
    else:
        seen = SimpleITK.ReadImage(str(path), imageIO="MetaImageIO" if form == "MHA" else "")
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(seen).T, voxels)
    point = LPS[:3, :3] @ np.array(seen.TransformContinuousIndexToPhysicalPoint([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(point, found.geometry.affine[:3] @ [1, 2, 3, 1], atol=1e-4)


@pytest.mark.parametrize("form", ITK)
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_voxels_have_their_type(form, kind, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(kind)
    found = read_image(write(tmp_path, "scan", form, voxels, np.eye(4)))
    assert found.voxels.dtype == kind
    np.testing.assert_array_equal(found.voxels, voxels)


@pytest.mark.parametrize("form", ITK)
def test_components_and_a_fourth_axis_are_channels(form, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 200, (4, 5, 6, 2)).astype(np.int16)
    channels = [itk_image(voxels[..., c], np.diag([1, 2, 3, 1.0])) for c in range(2)]
    for name, image in (("vector", SimpleITK.Compose(channels)), ("series", SimpleITK.JoinSeries(channels))):
        SimpleITK.WriteImage(image, str(tmp_path / f"{name}.{form}"))
        found, header = read_image(tmp_path / f"{name}.{form}"), read_header(tmp_path / f"{name}.{form}")
        np.testing.assert_array_equal(found.voxels, voxels)
        assert header.channels == 2
        assert found.geometry.spacing == header.geometry.spacing == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("form", ["nrrd", "mha"])
def test_a_2d_image_is_a_slice(form, tmp_path):
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(np.arange(12, dtype=np.uint8).reshape(3, 4)), str(tmp_path / f"a.{form}")
    )
    found = read_image(tmp_path / f"a.{form}")
    assert found.geometry.shape == found.voxels.shape == (4, 3, 1)


@pytest.mark.parametrize(
    ("space", "sign"), [("left-posterior-superior", -1), ("RAS", 1), ("right-anterior-superior", 1)]
)
def test_the_space_of_a_nrrd_file_is_understood(space, sign, tmp_path):
    text = f"NRRD0005\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\nendian: little\nspace: {space}\n"
    text += "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n\n"
    (tmp_path / "a.nrrd").write_bytes(text.encode() + bytes(16))
    affine = read_image(tmp_path / "a.nrrd").geometry.affine
    np.testing.assert_array_equal(affine[:3], [[sign * 2, 0, 0, sign * 10], [0, sign * 3, 0, sign * 20], [0, 0, 4, 30]])


@pytest.mark.parametrize("form", ["nrrd", "mha", "nhdr", "mhd"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [0, 40, -100])
def test_a_truncated_file_is_named(form, packed, keep, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16)
    SimpleITK.WriteImage(itk_image(voxels, np.eye(4)), str(tmp_path / f"scan.{form}"), packed)
    path = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="scan"):
        read_image(tmp_path / f"scan.{form}")


@pytest.mark.parametrize("form", ITK)
def test_one_flipped_bit_of_packed_voxels_is_noticed(form, tmp_path):
    generator = np.random.default_rng(0)
    voxels = generator.integers(0, 999, (12, 12, 9)).astype(np.int16)
    SimpleITK.WriteImage(itk_image(voxels, np.eye(4)), str(tmp_path / f"scan.{form}"), True)
    path = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    whole = path.read_bytes()
    unnoticed = 0
    for _ in range(40):
        content = bytearray(whole)
        content[generator.integers(len(content) - 1500, len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        try:
            unnoticed += not np.array_equal(read_image(tmp_path / f"scan.{form}").voxels, voxels)
        except UserError:
            continue
    assert unnoticed == 0


def test_too_few_packed_voxels_are_noticed(tmp_path):
    SimpleITK.WriteImage(itk_image(np.ones((4, 4, 4), np.int16), np.eye(4)), str(tmp_path / "a.mha"), True)
    header = (tmp_path / "a.mha").read_bytes().partition(b"LOCAL\n")[0] + b"LOCAL\n"
    (tmp_path / "a.mha").write_bytes(header + zlib.compress(bytes(100)))
    with pytest.raises(UserError, match=r"a.mha has 100 bytes of voxels; expected 128"):
        read_image(tmp_path / "a.mha")


@pytest.mark.parametrize("form", ["nhdr", "mhd"])
def test_a_detached_header_goes_with_its_voxels(form, tmp_path):
    path = write(tmp_path, "scan", form, np.ones((4, 4, 4), np.int16), np.eye(4))
    header, voxels = parts(path)
    assert header == str(path)
    before = image_digest(str(path), {})
    assert before == image_digest(str(path), {})
    content = Path(voxels).read_bytes()
    Path(voxels).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert image_digest(str(path), {}) != before
    Path(voxels).unlink()
    with pytest.raises(UserError, match=rf"which {path} names, not found"):
        read_image(path)
    assert list_scans(tmp_path) == [path]


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("ElementDataFile = LOCAL\n", []),
        ("ElementDataFile = a.raw", ["a.raw"]),
        ("ElementDataFile = LIST\na.1\na.2\n", ["a.1", "a.2"]),
        ("ElementDataFile = a.%03d 1 2 1\n", ["a.001", "a.002"]),
        ("ElementDataFile = a b.raw\r\n", ["a b.raw"]),
    ],
)
def test_what_a_header_names_is_found(text, files, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "a.mhd").write_bytes(text.encode())
    assert parts(tmp_path / "a.mhd") == [str(tmp_path / name) for name in ["a.mhd", *files]]


def test_complex_voxels_are_refused(tmp_path):
    SimpleITK.WriteImage(SimpleITK.Image([3, 3, 3], SimpleITK.sitkComplexFloat32), str(tmp_path / "a.nrrd"))
    with pytest.raises(UserError, match="a.nrrd has complex voxels"):
        read_image(tmp_path / "a.nrrd")


# ---- pictures


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "P", "1"])
def test_a_picture_is_a_slice_with_columns_as_x(ending, mode, tmp_path):
    if (ending, mode) == ("bmp", "I;16"):
        pytest.skip("no such files")
    kind = np.uint16 if mode == "I;16" else np.uint8
    pixels = np.random.default_rng(0).integers(0, 2, (5, 4, 3) if mode == "RGB" else (5, 4)).astype(kind)
    made = Image.fromarray(pixels * kind(255)).convert("1") if mode == "1" else Image.fromarray(pixels)
    if mode == "P":
        made = Image.fromarray(pixels, "L")
        made.putpalette([0, 0, 0, 255, 0, 0])
    made.save(tmp_path / f"a.{ending}")
    found, header = read_image(tmp_path / f"a.{ending}"), read_header(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(found.voxels[:, :, 0] > 0, np.swapaxes(pixels, 0, 1) > 0)
    assert found.geometry.shape == header.geometry.shape == (4, 5, 1)
    assert header.channels == (3 if mode == "RGB" else 1)


def test_what_is_no_picture_of_one_slice_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    page = Image.new("L", (3, 3))
    page.save(tmp_path / "b.tif", save_all=True, append_images=[page])
    Image.new("RGBA", (3, 3)).save(tmp_path / "c.png")
    page.save(tmp_path / "d.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "d.png").read_bytes()[:-20])
    for name, said in (
        ("a.png", "complete picture"),
        ("b.tif", "2 pages"),
        ("c.png", "mode RGBA"),
        ("d.png", "complete"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{said}"):
            read_image(tmp_path / name)


# ---- folders


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd", ".nii", ".png"])
def test_a_training_folder_has_its_file_ending(ending, tmp_path):
    for name in ("a", "b"):
        for folder, file in (("imagesTr", f"{name}_0000"), ("labelsTr", name)):
            if ending == ".png":
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.new("L", (3, 3)).save(tmp_path / folder / f"{file}.png")
            else:
                write(tmp_path / folder, file, ending[1:], np.zeros((3, 3, 3), np.int16), np.eye(4))
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, "file_ending": ending}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    found = Dataset(tmp_path).cases
    assert [Path(case["image"]).name for case in found] == [f"a_0000{ending}", f"b_0000{ending}"]


def test_cases_of_the_dataset_key_lie_anywhere(tmp_path):
    for name in ("a", "b"):
        for part in ("t1", "t2", "label"):
            write(tmp_path / "elsewhere" / name, part, "nrrd", np.zeros((3, 3, 3), np.int16), np.eye(4))
    listed = {
        "a": {"images": ["../elsewhere/a/t1.nrrd", "../elsewhere/a/t2.nrrd"], "label": "../elsewhere/a/label.nrrd"},
        "b": {"images": [str(tmp_path / f"elsewhere/b/{t}.nrrd") for t in ("t1", "t2")],
              "label": str(tmp_path / "elsewhere/b/label.nrrd")},
    }  # fmt: skip
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nrrd"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").write_text(json.dumps(description | {"dataset": listed}))
    assert [(case["case"], len(case["image"])) for case in Dataset(tmp_path / "data").cases] == [("a", 2), ("b", 2)]
    for entry in (
        7,
        {},
        {"images": []},
        {"images": ["x"]},
        {"images": ["x", 1], "label": "y"},
    ):
        (tmp_path / "data/dataset.json").write_text(json.dumps(description | {"dataset": {"a": entry}}))
        with pytest.raises(UserError, match='as "dataset" case a; expected'):
            _ = Dataset(tmp_path / "data").listed_cases


def test_an_nnunet_v1_folder_has_a_file_a_channel(tmp_path):
    for name in ("a", "b"):
        for channel in range(2):
            save(tmp_path / f"imagesTr/{name}_{channel:04d}.nii.gz", np.zeros((3, 3, 3), np.int16))
        save(tmp_path / f"labelsTr/{name}.nii.gz", np.zeros((3, 3, 3), np.int16))
    listed = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("a", "b")]
    description = {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "x"}, "training": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    cases = Dataset(tmp_path).cases
    assert [case["case"] for case in cases] == ["a", "b"]
    assert [Path(file).name for file in cases[0]["image"]] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_scans_of_all_formats_and_no_masks_are_found(tmp_path):
    for form in ("nii.gz", *ITK):
        write(tmp_path, f"of_{form.replace('.', '')}", form, np.zeros((3, 3, 3), np.int16), np.eye(4))
    for name in ("of_nrrd_seg.seg.nrrd", "of_mha_seg.mha", "other.seg.nrrd", "figure.png"):
        (tmp_path / name).touch()
    assert [scan["case"] for scan in find_scans(str(tmp_path))] == [
        "of_mha",
        "of_mhd",
        "of_nhdr",
        "of_niigz",
        "of_nrrd",
    ]


def test_pictures_are_scans_of_2d_networks_alone(tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    assert [scan["case"] for scan in find_scans(str(tmp_path), dim="2d")] == ["a"]
    with pytest.raises(UserError, match="pictures are for 2D networks"):
        find_scans(str(tmp_path))
    save(tmp_path / "b.nii.gz", np.zeros((3, 3, 1), np.int16))
    assert [scan["case"] for scan in find_scans(str(tmp_path), dim="2d")] == ["b"]


@pytest.mark.parametrize(
    ("scan", "output_format", "name"),
    [
        ("a.nii", None, "a_seg.nii.gz"),
        ("a.nrrd", None, "a_seg.seg.nrrd"),
        ("a.MHD", None, "a_seg.mha"),
        ("a.tif", None, "a_seg.png"),
        ("a.nrrd", "nii.gz", "a_seg.nii.gz"),
        (None, None, "a_seg.nii.gz"),
    ],
)
def test_a_mask_has_the_format_of_its_scan_or_the_one_that_is_asked_for(scan, output_format, name):
    assert mask_file("a", scan, output_format) == name


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path, "a", "nrrd", np.zeros((3, 3, 3), np.int16), np.eye(4))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    for name, installed in ((packages.PROJECT, False), ("numpy", True)):
        monkeypatch.setattr(packages, "PROJECT", name)
        said = r"pip install \"numpy\[itk\]\"" if installed else "pip install SimpleITK"
        with pytest.raises(UserError, match=rf"a.nrrd needs the package SimpleITK: {said}"):
            read_image(path)


def test_formats_are_told_by_endings_and_by_content(tmp_path):
    assert format_of("a.nii.mha").mask == "mha"
    assert format_of(tmp_path).mask == "dicom_seg"
    assert format_of(tmp_path / "none").mask == "nii.gz"
