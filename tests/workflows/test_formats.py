"""A scan gives the same mask in every format, in the format that it came in or the one that is asked for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from conftest import COARSE, ROOT, TINY, bundle, overlays, python_m, save
from dicom_maker import LPS, multiframe, save_slices, slices
from PIL import Image

from scripts.inference.predictor import Predictor
from scripts.mednext import create_mednext
from scripts.utils.files import read_table
from scripts.weights.model_settings import write_model_settings

NAMES = ["background", "liver", "left kidney", "tumor"]
SHAPE = (30, 26, 14)
FORMS = ("nii", "nii.gz", "nrrd", "nhdr", "mha", "mhd")


def oblique() -> np.ndarray:
    """An affine whose slices lie along the normal of rows and columns, as those of DICOM do."""
    affine = np.diag([-1.3, -1.3, 2.2, 1])
    a, b = np.radians((15, -10))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]] @ affine[:3, :3]
    affine[:3, 3] = (12.5, -34.25, 56)
    return affine


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of a network that was never trained: its masks are noise, in which every difference shows."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for dim, patch in (("3d", [32, 32, 32]), ("2d", [32, 32, 1])):
        settings = {"size": "S", "kernel_size": 3, "dim": dim, "out_channels": 4, "labels": NAMES, "patch_size": patch}
        if dim == "3d":
            settings |= {"label_values": [0, 1, 2, 5], "spacing": [1.5, 1.5, 2.0]}
        (folder / dim).mkdir()
        torch.save(create_mednext(1, 4, "S", 3, True, dim=dim).state_dict(), folder / dim / "model.pt")
        write_model_settings(str(folder / dim / "model.pt"), settings)
    return folder / "3d"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """One volume in every format; the DICOM slices have the stored voxels, and a scale as a CT's."""
    folder, affine = tmp_path_factory.mktemp("scans"), oblique()
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.int16)
    save(folder / "files/of_niigz.nii.gz", stored - np.int16(1024), affine)
    nib.save(nib.load(folder / "files/of_niigz.nii.gz"), folder / "files/of_nii.nii")
    series = SimpleITK.ImageSeriesReader()
    save_slices(folder / "dicom/series/below", slices(stored, affine, scales=[(1, -1024)] * SHAPE[2]))
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(folder / "dicom/series/below")))
    for form in FORMS[2:]:
        (folder / form).mkdir()
        SimpleITK.WriteImage(series.Execute(), str(folder / f"{form}/of_{form}.{form}"), True)
        for file in (folder / form).iterdir():
            shutil.move(file, folder / "files" / file.name)
    multiframe(folder / "dicom/frames/file", stored, affine, (1, -1024))
    return folder


def infer(scans: Path, weights: Path, output: Path, *options: object, **kwargs):
    return bundle(
        "inferring", "--config_file", "configs/inference.json", "--dataset_dir", scans, "--ckpt_dir", weights,
        "--output_dir", output, "--num_workers", 0, *options, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def masks(scans, weights) -> Path:
    for kind in ("files", "dicom"):
        infer(scans / kind, weights, scans / "masks" / kind)
    return scans / "masks"


def seg_volume(path: Path, series: Path) -> np.ndarray:
    """Lay a segmentation onto a series with pydicom alone: (X, Y, Z) segment numbers, slices from below."""
    planes = sorted(
        (pydicom.dcmread(file, stop_before_pixels=True) for file in series.iterdir()),
        key=lambda plane: np.dot(
            plane.ImagePositionPatient, np.cross(plane.ImageOrientationPatient[:3], plane.ImageOrientationPatient[3:])
        ),
    )
    place = {str(plane.SOPInstanceUID): index for index, plane in enumerate(planes)}
    found = pydicom.dcmread(path)
    volume = np.zeros((len(planes), planes[0].Rows, planes[0].Columns), np.uint8)
    for frame, group in zip(found.pixel_array, found.PerFrameFunctionalGroupsSequence, strict=True):
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        index = place[str(source.ReferencedSOPInstanceUID)]
        np.testing.assert_allclose(
            group.PlanePositionSequence[0].ImagePositionPatient, planes[index].ImagePositionPatient, atol=1e-5
        )
        volume[index][frame > 0] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return volume.transpose(2, 1, 0)


def test_the_mask_of_a_scan_is_one_whatever_its_format(masks, scans):
    truth = np.asanyarray(nib.load(masks / "files/of_niigz_seg.nii.gz").dataobj)
    assert set(np.unique(truth)) == {0, 1, 2, 5}
    np.testing.assert_array_equal(nib.load(masks / "files/of_nii_seg.nii.gz").dataobj, truth)
    for form, ending in (("nrrd", "seg.nrrd"), ("nhdr", "seg.nrrd"), ("mha", "mha"), ("mhd", "mha")):
        mask = SimpleITK.ReadImage(str(masks / f"files/of_{form}_seg.{ending}"))
        scan = SimpleITK.ReadImage(str(scans / f"files/of_{form}.{form}"))
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(mask).T, truth)
        for get in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
            np.testing.assert_allclose(getattr(mask, get)(), getattr(scan, get)(), rtol=1e-12, atol=1e-12)
    numbers = np.searchsorted([0, 1, 2, 5], truth)
    np.testing.assert_array_equal(seg_volume(masks / "dicom/series_seg.dcm", scans / "dicom/series/below"), numbers)
    for name in ("series", "frames"):
        volume = highdicom.seg.segread(masks / f"dicom/{name}_seg.dcm").get_volume(combine_segments=True)
        lps = LPS @ nib.load(masks / "files/of_niigz_seg.nii.gz").affine
        at = np.rint(np.linalg.inv(lps) @ volume.affine @ [*np.array(volume.spatial_shape) - 1, 1]).astype(int)[:3]
        first = np.rint(np.linalg.inv(lps) @ volume.affine[:, 3]).astype(int)[:3]
        np.testing.assert_allclose(lps @ [*first, 1], volume.affine[:, 3], atol=1e-4)
        ends = np.sort([at, first], axis=0)
        inside = tuple(slice(low, high + 1) for low, high in ends.T)
        array = volume.array if first[2] < at[2] else volume.array[::-1]
        np.testing.assert_array_equal(array.transpose(2, 1, 0), numbers[inside])
        assert numbers.sum() == array.sum()


def test_every_scan_has_a_row(masks):
    rows = {kind: read_table(masks / kind / "report.csv") for kind in ("files", "dicom")}
    assert [row["case"] for row in rows["files"]] == sorted(f"of_{form.replace('.', '')}" for form in FORMS)
    assert [row["case"] for row in rows["dicom"]] == ["frames", "series"]
    measured = [{k: v for k, v in row.items() if k not in ("case", "scan")} for found in rows.values() for row in found]
    assert all(row == measured[0] for row in measured)


def test_segments_have_names_codes_and_the_series(masks, scans):
    found = highdicom.seg.segread(masks / "dicom/series_seg.dcm")
    segments = [found.get_segment_description(number) for number in found.segment_numbers]
    assert [segment.segment_label for segment in segments] == NAMES[1:]
    assert [segment.segmented_property_type.meaning for segment in segments] == ["Liver", "Kidney", "Neoplasm"]
    side = segments[1].SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert side.CodeMeaning == "Left"
    assert all("RecommendedDisplayCIELabValue" in segment for segment in segments)
    one = pydicom.dcmread(next((scans / "dicom/series/below").iterdir()))
    for name in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert found[name].value == one[name].value
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == one.SeriesInstanceUID
    assert len(found.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == SHAPE[2]


def test_slicer_finds_names_and_colours(masks):
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(masks / "files/of_nrrd_seg.seg.nrrd"))
    reader.ReadImageInformation()
    fields = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    assert [fields[f"Segment{n}_Name"] for n in range(3)] == NAMES[1:]
    assert [fields[f"Segment{n}_LabelValue"] for n in range(3)] == ["1", "2", "5"]
    assert fields["Segment0_Extent"] == "0 29 0 25 0 13"
    assert all(re.fullmatch(r"[01]\.\d+ [01]\.\d+ [01]\.\d+", fields[f"Segment{n}_Color"]) for n in range(3))


def test_a_folder_half_done_is_gone_on_with_in_every_format(masks, scans, weights, tmp_path):
    for kind in ("files", "dicom"):
        output = shutil.copytree(masks / kind, tmp_path / kind)
        made = sorted(path for path in output.iterdir() if "_seg" in path.name)
        made[0].unlink()
        made[1].write_bytes(made[1].read_bytes()[:-300])
        before = {path: path.read_bytes() for path in made[2:]}
        done = infer(scans / kind, weights, output, "--skip_existing", "True")
        assert f"{len(before)} of {len(made)} scans have masks in" in done.stdout + done.stderr
        assert "1 masks are damaged" in done.stdout + done.stderr
        assert all(path.read_bytes() == content for path, content in before.items())
        assert all(path.exists() for path in made)
        assert len(read_table(output / "report.csv")) == len(made)


def test_a_scan_that_changed_is_segmented_again_in_every_format(masks, scans, weights, tmp_path):
    shutil.copytree(scans / "files", tmp_path / "files")
    shutil.copytree(scans / "dicom", tmp_path / "dicom")
    with open(tmp_path / "files/of_mhd.zraw", "rb") as stream:
        content = stream.read()
    image = SimpleITK.ReadImage(str(tmp_path / "files/of_mhd.mhd")) + 1
    SimpleITK.WriteImage(image, str(tmp_path / "files/of_mhd.mhd"), True)
    assert (tmp_path / "files/of_mhd.zraw").read_bytes() != content
    one = next((tmp_path / "dicom/series/below").iterdir())
    made = pydicom.dcmread(one)
    made.RescaleIntercept = -1000
    made.save_as(one)
    for kind, left in (("files", 5), ("dicom", 1)):
        done = infer(
            tmp_path / kind, weights, shutil.copytree(masks / kind, tmp_path / "out" / kind), "--skip_existing", "True"
        )
        assert f"{left} of {left + 1} scans have masks in" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["nii.gz", "nrrd", "mha", "dicom_seg"])
def test_a_mask_can_have_another_format(kind, masks, scans, weights, tmp_path):
    source = scans / "dicom/series" if kind != "dicom_seg" else scans / "files/of_nrrd.nrrd"
    done = infer(source, weights, tmp_path, "--output_format", kind, fails=kind == "dicom_seg")
    if kind == "dicom_seg":
        assert "of_nrrd.nrrd is no DICOM series, which a DICOM SEG refers to" in done.stdout + done.stderr
        assert not list(tmp_path.glob("*_seg*"))
        return
    ending = {"nrrd": "seg.nrrd"}.get(kind, kind)
    found = SimpleITK.ReadImage(str(tmp_path / f"below_seg.{ending}"))
    truth = SimpleITK.ReadImage(str(masks / "files/of_mha_seg.mha"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(found), SimpleITK.GetArrayFromImage(truth))
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(found, get)(), getattr(truth, get)(), rtol=1e-5, atol=1e-5)


def test_one_mask_has_the_name_that_it_is_given(masks, scans, weights, tmp_path):
    name, options = tmp_path / "new/liver of A.nrrd", ("--output_file", tmp_path / "new/liver of A.nrrd")
    infer(scans / "dicom/series", weights, tmp_path / "tables", *options)
    found = SimpleITK.ReadImage(str(name))
    truth = SimpleITK.ReadImage(str(masks / "files/of_mha_seg.mha"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(found), SimpleITK.GetArrayFromImage(truth))
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"report.csv", "masks.json"}
    done = infer(scans / "dicom/series", weights, tmp_path / "tables", *options, "--skip_existing", "True")
    assert "1 of 1 scans have masks in" in done.stdout + done.stderr
    done = infer(scans / "files", weights, tmp_path / "tables", *options, fails=True)
    assert "liver of A.nrrd is the mask of one scan, and there are 6: give --output_dir" in done.stderr


def test_one_file_of_a_series_and_its_uid_are_the_series(masks, scans, weights, tmp_path):
    below = scans / "dicom/series/below"
    file = next(below.iterdir())
    uid = pydicom.dcmread(file).SeriesInstanceUID
    for name, options in (("file", [file]), ("uid", [scans / "dicom", "--series", uid])):
        infer(options[0], weights, tmp_path / name, *options[1:])
        np.testing.assert_array_equal(
            seg_volume(tmp_path / name / "below_seg.dcm", below), seg_volume(masks / "dicom/series_seg.dcm", below)
        )


def test_python_reads_what_the_command_does(masks, scans, weights):
    truth = np.asanyarray(nib.load(masks / "files/of_niigz_seg.nii.gz").dataobj)
    predictor = Predictor.load(weights / "model.pt", "cpu")
    for path in ("files/of_nrrd.nrrd", "files/of_mhd.mhd", "dicom/series", "dicom/frames/file"):
        np.testing.assert_array_equal(predictor(scans / path), truth)


def test_a_bad_series_is_listed_last_and_the_others_are_done(scans, weights, tmp_path):
    shutil.copytree(scans / "dicom", tmp_path / "dicom")
    bad = shutil.copytree(scans / "dicom/series", tmp_path / "dicom/a bad one")
    heights = {file: pydicom.dcmread(file).ImagePositionPatient[2] for file in bad.rglob("IM*")}
    sorted(heights, key=heights.get)[3].unlink()
    done = infer(tmp_path / "dicom", weights, tmp_path / "masks", fails=True)
    assert re.search(r"1 of 3 scans could not be segmented:\s+.*IM\d+ .*1 slices are missing there", done.stderr)
    assert len(list((tmp_path / "masks").glob("*_seg.dcm"))) == 2


def test_pictures_give_pictures_for_a_2d_network(weights, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50)).astype(np.uint8)
    (tmp_path / "scans").mkdir()
    for name in ("a.png", "b.tif"):
        Image.fromarray(pixels).save(tmp_path / "scans" / name)
    infer(tmp_path / "scans", weights.parent / "2d", tmp_path / "masks")
    one, other = (np.asarray(Image.open(tmp_path / f"masks/{name}_seg.png")) for name in "ab")
    save(tmp_path / "slice.nii.gz", pixels.T[:, :, None])
    infer(tmp_path / "slice.nii.gz", weights.parent / "2d", tmp_path / "masks")
    truth = np.asanyarray(nib.load(tmp_path / "masks/slice_seg.nii.gz").dataobj)[:, :, 0].T
    assert len(np.unique(truth)) > 1
    np.testing.assert_array_equal(one, truth)
    np.testing.assert_array_equal(other, truth)
    predictor = Predictor.load(weights.parent / "2d/model.pt", "cpu")
    np.testing.assert_array_equal(predictor(tmp_path / "scans/a.png")[:, :, 0].T, truth)
    done = infer(tmp_path / "scans", weights, tmp_path / "masks", fails=True)
    assert "pictures are for 2D networks" in done.stderr


def data_of_format(source: Path, target: Path, ending: str) -> list[str]:
    """Write the phantom as an nnU-Net folder of another format; return its cases."""
    names = [path.name.removesuffix(".nii.gz") for path in sorted((source / "imagesTr").iterdir())]
    for part, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
        (target / part).mkdir(parents=True)
        for name in names:
            image = SimpleITK.ReadImage(str(source / part / f"{name}.nii.gz"))
            SimpleITK.WriteImage(image, str(target / part / f"{name}{channel}{ending}"), True)
    labels = json.loads((source / "dataset.json").read_text())["labels"]
    description = {
        "channel_names": {"0": "phantom"}, "file_ending": ending, "numTraining": len(names),
        "labels": {name: int(value) for value, name in labels.items()},
    }  # fmt: skip
    (target / "dataset.json").write_text(json.dumps(description))
    return names


@pytest.mark.parametrize("form", ["nrrd", "mhd", "dicom"])
def test_training_and_scoring_take_every_format(form, phantom_dir, tmp_path):
    data = tmp_path / "data"
    names = data_of_format(phantom_dir, data, ".nrrd" if form == "dicom" else f".{form}")
    if form == "dicom":
        for name in names:
            image, label = (  # on a grid that slices of DICOM can have
                nib.as_closest_canonical(nib.load(phantom_dir / part / f"{name}.nii.gz"))
                for part in ("imagesTr", "labelsTr")
            )
            save_slices(data / "dicom" / name, slices(np.rint(image.get_fdata()).astype(np.int16), image.affine))
            nib.save(label, data / "labelsTr" / f"{name}.nii.gz")
        shutil.rmtree(data / "imagesTr")
        description = json.loads((data / "dataset.json").read_text())
        description["dataset"] = {n: {"images": [f"dicom/{n}"], "label": f"labelsTr/{n}.nii.gz"} for n in names}
        (data / "dataset.json").write_text(json.dumps(description))
    common = ("--dataset_dir", data, "--ckpt_dir", tmp_path / "models", "--output_dir", tmp_path / "eval")
    bundle("training", "--config_file", "configs/train.json", *common, *TINY, *COARSE, "--epochs", 1, "--iterations", 1)
    bundle("evaluating", *overlays("train", "evaluate"), *common, "--num_workers", 0)
    assert (tmp_path / "eval/report.html").is_file()
    assert list((tmp_path / "eval/predictions").glob("*_seg.nii.gz"))


def test_a_layout_of_another_format_becomes_nifti(phantom_dir, tmp_path):
    names = data_of_format(phantom_dir, tmp_path / "data", ".mha")
    python_m("scripts", "convert_dataset", "--source", tmp_path / "data", "--target", tmp_path / "made")
    for part in ("imagesTr", "labelsTr"):
        for name in names:
            one, other = (nib.load(folder / part / f"{name}.nii.gz") for folder in (phantom_dir, tmp_path / "made"))
            np.testing.assert_array_equal(one.dataobj, other.dataobj)
            for get in ("get_sform", "get_qform"):
                np.testing.assert_allclose(getattr(other, get)(), one.affine, atol=1e-6)


def commands(page: str) -> list[list[str]]:
    """The commands of a how-to page, without those that install."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / f"docs/how-to/{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("page", ["formats", "dicom"])
def test_the_commands_of_the_pages_run(page, weights, phantom_dir, tmp_path):
    scan = nib.load(phantom_dir / "imagesTs/phantom_05.nii.gz")
    stored = np.rint(scan.get_fdata()).astype(np.int16)
    for name in ("scans/a.nii.gz", "scan.nii.gz"):
        save(tmp_path / name, stored, scan.affine)
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "scan.nii.gz")), str(tmp_path / "scan.nrrd"))
    (tmp_path / "cases.csv").write_text("case,image\nlisted,scans/a.nii.gz\nas nrrd,scan.nrrd\n")
    for folder, uid in (("patient", "1.2.3.4"), ("patients/one", "1.2.3.5"), ("patients/two", "1.2.3.6")):
        save_slices(tmp_path / folder, slices(stored, scan.affine, uid))
    for command in commands(page):
        _, option, what, *rest = (word.replace("/path/to", str(tmp_path)) for word in command)
        if option == "-c":
            exec(what)
        elif what == "monai.bundle":
            python_m(what, *rest, "--ckpt_dir", weights, "--num_workers", 0)
        else:
            data_of_format(phantom_dir, tmp_path / "Dataset_nrrd", ".nrrd")
            python_m(what, *rest)
    made = {path.name for path in (tmp_path / "masks").iterdir()}
    assert (tmp_path / "liver.nii.gz").exists() == (page == "formats")
    wanted = {
        "formats": {
            "a_seg.nii.gz",
            "scan_seg.nii.gz",
            "scan_seg.seg.nrrd",
            "listed_seg.nii.gz",
            "as nrrd_seg.seg.nrrd",
        },
        "dicom": {"patient_seg.dcm", "one_seg.nii.gz", "two_seg.nii.gz"},
    }
    assert made == {*wanted[page], "report.csv", "masks.json"}


def test_the_commands_of_the_page_of_scoring_run(trained, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir, tmp_path / "Dataset123_Liver")
    score, infer, compare = commands("scoring")
    for command in (infer, score, compare):
        words = [
            re.sub("^(masks|scores|other_scores|comparison|Dataset123_Liver)(?=/|$)", rf"{tmp_path}/\1", word)
            for word in command
        ]
        python_m(words[2], *words[3:], *(("--ckpt_dir", trained, "--num_workers", 0) if command is infer else ()))
        if command is score:
            shutil.copytree(tmp_path / "scores", tmp_path / "other_scores")
    assert (tmp_path / "scores/summary.csv").is_file()
    differences = read_table(tmp_path / "comparison/differences.csv")
    assert {float(row["difference"]) for row in differences if row["score"] == "dice"} == {0}
