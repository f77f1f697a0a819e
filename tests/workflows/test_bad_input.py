"""What a user can get wrong ends before training in one sentence: file, what was found, what was expected, the fix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, bundle, overlays, save_without_spacing

from scripts.mednext import create_mednext_v1


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    image = nib.load(path)
    voxels, affine = change(np.asarray(image.dataobj, dtype=np.float32), image.affine.copy())
    nib.save(nib.Nifti1Image(voxels, affine), path)


def first_image(folder: Path) -> Path:
    return folder / "imagesTr/phantom_00.nii.gz"


def first_label(folder: Path) -> Path:
    return folder / "labelsTr/phantom_00.nii.gz"


def describe(folder: Path, **changes) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder: Path) -> None:
    content = first_image(folder).read_bytes()
    first_image(folder).write_bytes(content[: len(content) // 2])


def zero_spacing(folder: Path) -> None:
    save_without_spacing(folder / "imagesTr/phantom_00.nii", shape=(44, 40, 22))
    cases = json.loads((folder / "dataset.json").read_text())["training"]
    describe(folder, training=[{**cases[0], "image": "./imagesTr/phantom_00.nii"}, *cases[1:]])


FAULTS = {
    "no dataset.json": (lambda f: (f / "dataset.json").unlink(), "dataset.json not found; dataset_dir must be"),
    "missing file": (lambda f: first_label(f).unlink(), "phantom_00.nii.gz not found, which case phantom_00"),
    "truncated gzip": (truncate, "phantom_00.nii.gz .* is not a complete NIfTI file .* copy or export it again"),
    "not a NIfTI file": (
        lambda f: first_image(f).write_text("no"),
        "phantom_00.nii.gz .* is not a complete NIfTI file",
    ),
    "label shape": (
        lambda f: rewrite(first_label(f), lambda v, a: (v[:-1], a)),
        r"labelsTr/phantom_00.nii.gz has \(43, 40, 22\) voxels but .* has \(44, 40, 22\); export them on one grid",
    ),
    "label affine": (
        lambda f: rewrite(first_label(f), lambda v, a: (v, a + np.eye(4)[:, [1, 2, 3, 0]] * 5)),
        "labelsTr/phantom_00.nii.gz lies elsewhere than .*: affine .* against .*; export them on one grid",
    ),
    "label value": (
        lambda f: rewrite(first_label(f), lambda v, a: (v + 4 * (v == 3), a)),
        "labelsTr/phantom_00.nii.gz has the label value 7; dataset.json names 0 to 3",
    ),
    "fractional label": (
        lambda f: rewrite(first_label(f), lambda v, a: (v * 0.5, a)),
        "has the label value 0.5, 1.5; dataset.json names 0 to 3",
    ),
    "channel count": (
        lambda f: describe(f, modality={"0": "T1", "1": "T2"}),
        "phantom_00.nii.gz and its case have 1 channels; dataset.json names 2",
    ),
    "NaN voxels": (
        lambda f: rewrite(first_image(f), lambda v, a: (np.where(v > 900, np.nan, v), a)),
        r"phantom_00.nii.gz has \d+ NaN or infinite voxels; expected finite intensities",
    ),
    "zero spacing": (zero_spacing, r"phantom_00.nii has a voxel spacing of 1 x 1 x 0 mm; expected it positive"),
}
SETTINGS = {
    "missing folder": (("--dataset_dir", "nowhere"), "dataset_dir nowhere does not exist"),
    "fold": (("--fold", 5), "fold is 5; expected 0 to 4 or 'all'"),
    "size": (("--size", "XL"), "size is 'XL'; expected one of S, B, M, L"),
    "kernel size": (("--kernel_size", 4), "kernel_size is 4; expected one of 3, 5, 7"),
    "patch size": (("--patch_size", "[40,32,32]"), r"patch_size is \[40, 32, 32\]; expected three multiples of 16"),
    "spacing": (("--spacing", "[1,1,0]"), r"spacing is \[1, 1, 0\]; expected three positive"),
    "typo": (("--epoch", 1), "--epoch is no setting; did you mean --epochs"),
    "inner typo": (("--train#trainer#max_epoch", 1), "is no setting; did you mean --train#trainer#max_epochs"),
    "nothing to do": (("--epochs", 0), "epochs is 0; expected an integer from 1 on"),
    "no steps": (("--iterations", 0), "iterations is 0; expected an integer from 1 on"),
    "device": (("--device", "cuda:77"), "device is 'cuda:77'; expected one of cpu.*, which this computer has"),
    "patch of one number": (("--patch_size", 32), r"patch_size is 32; expected three multiples .* \"\[48,64,48\]\""),
    "pretrained weights": (("--init_weights", "k3.pt"), "k3.pt not found; train first, or name another weights file"),
    "resume": (("--resume", "True"), "checkpoint.pt not found; nothing to resume"),
    "switch": (("--fine_tuning#skip_heads", "no"), "fine_tuning#skip_heads is 'no'; expected True or False"),
}


def train(folder: Path, models: Path, *arguments) -> str:
    """Return the error text of a training run that must fail."""
    done = bundle(
        "training", *overlays("train"), "--dataset_dir", folder, "--ckpt_dir", models, "--output_dir", models / "eval",
        *TINY, *arguments, fails=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "epoch 1" not in done.stdout
    assert done.stderr.count("\nerror: ") == 1
    return done.stderr.split("\nerror: ")[1]


@pytest.fixture
def models(tmp_path) -> Path:
    """Make a `ckpt_dir` with earlier weights in it, which must be there afterwards."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"earlier weights")
    yield folder
    assert (folder / "model.pt").read_bytes() == b"earlier weights"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_data_is_named(fault, phantom_dir, models, tmp_path):
    spoil, message = FAULTS[fault]
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    spoil(folder)
    assert re.search(message, train(folder, models))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_cannot_be_is_named(setting, phantom_dir, models):
    arguments, message = SETTINGS[setting]
    assert re.search(message, train(phantom_dir, models, *arguments))


def test_all_faults_are_listed_at_once(phantom_dir, models, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    truncate(folder)
    rewrite(folder / "labelsTr/phantom_03.nii.gz", lambda v, a: (v + 9, a))
    assert "2 of 5 cases cannot be used" in train(folder, models)


def test_a_scan_smaller_than_the_patch_is_padded_and_said(phantom_dir, tmp_path):
    done = bundle(
        "training", *overlays("train"), "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path, "--output_dir", tmp_path,
        *TINY, "--patch_size", "[64,64,64]", "--epochs", 1, "--iterations", 1,
    )  # fmt: skip
    assert "of the [64, 64, 64] patch" in done.stdout
    assert '"[48, 48, 48]"' in done.stdout
    assert "epoch 1/1" in done.stdout


def test_training_does_not_start_from_weights_of_another_network(trained, phantom_dir, models):
    said = train(phantom_dir, models, "--size", "B", "--kernel_size", 5, "--init_weights", trained / "model.pt")
    assert "model.pt holds MedNeXt S, kernel 3, 1 channel(s), 4 classes, but the network is MedNeXt B, kernel 5" in said


@pytest.mark.parametrize("command", ["evaluating", "inference"])
def test_weights_of_another_network_are_named(command, phantom_dir, tmp_path):
    weights = tmp_path / "model.pt"
    torch.save(create_mednext_v1(1, 3, "S", deep_supervision=True).state_dict(), weights)
    common = ("--dataset_dir", phantom_dir, "--model_file", weights, "--output_dir", tmp_path)
    if command == "evaluating":
        done = bundle("evaluating", *overlays("train", "evaluate"), *common, fails=True)
    else:
        done = bundle("--config_file", "configs/inference.json", *common, fails=True)
    assert "Traceback" not in done.stderr
    assert "3 classes, but the network is MedNeXt S, kernel 3, 1 channel(s), 4 classes" in done.stderr


def test_inference_without_weights_says_what_to_do(tmp_path):
    done = bundle(
        "--config_file", "configs/inference.json", "--ckpt_dir", tmp_path, "--output_dir", tmp_path, fails=True
    )
    assert "Traceback" not in done.stderr
    assert "model.pt not found; train first" in done.stderr


def test_weights_are_not_scored_on_data_of_other_labels(trained, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir, tmp_path / "data")
    describe(tmp_path / "data", labels={"0": "background", "1": "middle", "2": "low", "3": "high"})
    done = bundle(
        "evaluating", *overlays("train", "evaluate"), "--dataset_dir", tmp_path / "data", "--ckpt_dir", trained,
        "--output_dir", tmp_path, fails=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert (
        "the weights were trained for the labels ['background', 'low', 'middle', 'high'], the data set has"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("inference", ("--tta", "no"), "tta is 'no'; expected True or False"),
        ("inference", ("--overlap", 50), "overlap is 50; expected a part of the window"),
        ("inference", ("--device", "mps:9"), "device is 'mps:9'; expected one of cpu"),
        ("inference", ("--disable_progress_bar", "True"), "--disable_progress_bar is no setting"),
        ("inference", ("--dataset_dir", 2024), "2024 does not exist"),
        ("planning", ("--spacing", "mean"), "spacing is 'mean'; expected three positive lengths .* median or mixed"),
        ("checking", ("--dataset_dir", 2024), "dataset_dir 2024 does not exist"),
        ("fetching", ("--tsk", 4), "--tsk is no setting; did you mean --task"),
        ("fetching", ("--task", 4), "task is '4'; expected one of Task"),
    ],
)
def test_every_command_checks_its_settings(command, arguments, message, tmp_path):
    config = {"inference": "inference", "fetching": "fetch"}.get(command, "plan")
    said = () if command == "fetching" else ("--output_dir", tmp_path)
    name = () if command == "inference" else (command,)
    done = bundle(*name, "--config_file", f"configs/{config}.json", *said, *arguments, fails=True)
    assert "Traceback" not in done.stderr
    assert re.search(f"error: .*{message}", done.stderr)


class TestSplits:
    """A fold without cases on one side."""

    @pytest.fixture
    def data(self, phantom_dir, tmp_path) -> Path:
        shutil.copytree(phantom_dir, tmp_path / "data")
        return tmp_path / "data"

    def split(self, data: Path, train: list[int], val: list[int]) -> None:
        fold = {part: [f"phantom_0{n}" for n in numbers] for part, numbers in (("train", train), ("val", val))}
        (data / "splits_final.json").write_text(json.dumps([fold]))

    def test_without_held_out_cases_the_last_weights_are_kept_and_it_is_said(self, data, tmp_path):
        self.split(data, [0, 1, 2, 3, 4], [])
        common = ("--dataset_dir", data, "--ckpt_dir", tmp_path, "--output_dir", tmp_path, *TINY)
        done = bundle("training", *overlays("train"), *common, "--iterations", 1, "--epochs", 2)
        assert "no case is held out: nothing is validated, and the last weights are kept" in done.stdout + done.stderr
        kept = torch.load(tmp_path / "model.pt", weights_only=True)
        last = torch.load(tmp_path / "training/checkpoint.pt", weights_only=False)["model"]
        assert all(torch.equal(kept[name], last[name]) for name in last)
        assert json.loads((tmp_path / "model.json").read_text())["epoch"] == 2
        done = bundle("evaluating", *overlays("train", "evaluate"), *common, fails=True)
        assert "Traceback" not in done.stderr
        assert "splits_final.json holds out no case in fold 0; give another --fold, or --fold all." in done.stderr

    def test_without_training_cases_nothing_starts(self, data, models):
        self.split(data, [], [0, 1, 2, 3, 4])
        assert "splits_final.json trains fold 0 on no case" in train(data, models)
