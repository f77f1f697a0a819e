"""Decathlon and nnU-Net v2 folders turn into each other without a voxel changing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import python_m, save

from scripts.data.convert import convert_layout
from scripts.data.datasets import Dataset
from scripts.data.scans import image_files
from scripts.utils.errors import UserError

AFFINE = np.diag([-1.0, 2.0, 3.0, 1.0])


def values(path: str) -> np.ndarray:
    return nib.load(path).get_fdata()


def multichannel(folder: Path, slope: float = 1.0) -> Path:
    """A Decathlon folder of two training and one test case with two channels in a 4D file."""
    generator = np.random.default_rng(0)
    for part, names in {"imagesTr": ("a", "b"), "imagesTs": ("t",), "labelsTr": ("a", "b")}.items():
        for name in names:
            shape = (6, 5, 4) if part == "labelsTr" else (6, 5, 4, 2)
            stored = generator.integers(0, 2 if part == "labelsTr" else 900, shape).astype(np.int16)
            image = nib.Nifti1Image(stored, AFFINE)
            image.header.set_slope_inter(1 if part == "labelsTr" else slope, 0)
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(image, folder / part / f"{name}.nii.gz")
    description = {
        "name": "two",
        "licence": "CC0",
        "modality": {"0": "FLAIR", "1": "T1"},
        "labels": {"0": "background", "1": "lesion"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"],
        "test": ["./imagesTs/t.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("slope", [1.0, 0.5], ids=["plain", "scaled"])
def test_channels_are_split_and_stacked_again_unchanged(slope, tmp_path):
    source = multichannel(tmp_path / "Task77_Two", slope)
    convert_layout(str(source), str(tmp_path / "Dataset077_Two"))
    made = Dataset(tmp_path / "Dataset077_Two").cases
    assert [len(image_files(case)) for case in made] == [2, 2]
    for case, given in zip(made, Dataset(source).cases, strict=True):
        for channel, file in enumerate(case["image"]):
            np.testing.assert_array_equal(values(file), values(given["image"])[..., channel])
            assert nib.load(file).get_data_dtype() == np.int16
            np.testing.assert_array_equal(nib.load(file).affine, AFFINE)
        np.testing.assert_array_equal(values(case["label"]), values(given["label"]))
    description = json.loads((tmp_path / "Dataset077_Two/dataset.json").read_text())
    assert description == {
        "name": "two", "licence": "CC0", "channel_names": {"0": "FLAIR", "1": "T1"},
        "labels": {"background": 0, "lesion": 1}, "numTraining": 2, "file_ending": ".nii.gz",
    }  # fmt: skip

    convert_layout(str(tmp_path / "Dataset077_Two"), str(tmp_path / "back"))
    for case, given in zip(Dataset(tmp_path / "back").cases, Dataset(source).cases, strict=True):
        np.testing.assert_array_equal(values(case["image"]), values(given["image"]))
    np.testing.assert_array_equal(
        values(str(tmp_path / "back/imagesTs/t.nii.gz")), values(str(source / "imagesTs/t.nii.gz"))
    )
    back = json.loads((tmp_path / "back/dataset.json").read_text())
    assert (back["modality"], back["labels"]) == ({"0": "FLAIR", "1": "T1"}, {"0": "background", "1": "lesion"})
    assert back["test"] == ["./imagesTs/t.nii.gz"]


def test_single_channels_are_linked_not_copied(phantom_dir, tmp_path):
    source = tmp_path / "Task"
    shutil.copytree(phantom_dir, source)
    done = python_m("scripts", "convert_dataset", "--source", source, "--target", tmp_path / "Dataset001_Phantom")
    assert "5 training and 2 test cases, 1 channel(s)" in done.stdout
    made, given = Dataset(tmp_path / "Dataset001_Phantom").cases, Dataset(source).cases
    for one, other in zip(made, given, strict=True):
        assert one["case"] == other["case"]
        assert Path(one["image"]).samefile(other["image"])
        assert Path(one["label"]).samefile(other["label"])
    assert Dataset(tmp_path / "Dataset001_Phantom").labels == Dataset(source).labels
    assert Dataset(tmp_path / "Dataset001_Phantom").channels == Dataset(source).channels


def test_channels_of_other_types_keep_their_values(tmp_path):
    folder = tmp_path / "Dataset"
    for name in "ab":
        save(folder / f"imagesTr/{name}_0000.nii.gz", np.full((4, 4, 4), 7, np.int16), AFFINE)
        save(folder / f"imagesTr/{name}_0001.nii.gz", np.full((4, 4, 4), 0.25, np.float32), AFFINE)
        save(folder / f"labelsTr/{name}.nii.gz", np.eye(4, dtype=np.uint8)[..., None].repeat(4, 2), AFFINE)
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "x", "1": "y"}, "labels": {"background": 0, "z": 1}})
    )
    convert_layout(str(folder), str(tmp_path / "Task"))
    assert np.unique(values(str(tmp_path / "Task/imagesTr/a.nii.gz"))[..., 0]).tolist() == [7]
    assert np.unique(values(str(tmp_path / "Task/imagesTr/a.nii.gz"))[..., 1]).tolist() == [0.25]


def test_nothing_is_overwritten_and_a_fault_leaves_no_half_folder(phantom_dir, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists and is not overwritten"):
        convert_layout(str(phantom_dir), str(tmp_path / "there"))
    source = multichannel(tmp_path / "Task77_Two")
    save(source / "imagesTr/a.nii.gz", np.zeros((6, 5, 4, 3), np.int16))
    with pytest.raises(UserError, match=r"a.nii.gz has the shape \(6, 5, 4, 3\); dataset.json names 2 channels"):
        convert_layout(str(source), str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()
