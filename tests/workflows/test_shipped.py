"""The weights that come with the bundle."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, bundle, save

from scripts.data.datasets import Dataset
from scripts.weights import model_settings as settings

HIPPOCAMPUS = SHARED / "Task04_Hippocampus"


def test_they_are_what_their_checksums_say_and_fit_into_git(shipped):
    sums = dict(reversed(line.split()) for line in (shipped / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"model.pt", "model.json", "postprocessing.json"}
    for name, expected in sums.items():
        assert hashlib.sha256((shipped / name).read_bytes()).hexdigest() == expected
    assert json.loads((shipped / "model.json").read_text())["sha256"] == sums["model.pt"]
    assert (shipped / "model.pt").stat().st_size < 25e6
    assert all(isinstance(t, torch.Tensor) for t in torch.load(shipped / "model.pt", weights_only=True).values())


def test_metadata_describe_them(shipped):
    trained = settings.read_model_settings(shipped / "model.pt")
    output = json.loads((ROOT / "configs/metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert output["num_channels"] == trained["out_channels"] == 3
    assert list(output["channel_def"].values()) == trained["labels"]
    assert trained["training_ranges"]["extent x (mm)"][1] < 100


def test_the_bundle_s_network_has_them_from_any_working_directory(shipped, tmp_path):
    copy = tmp_path / "mednext"
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(shipped, copy / "models")
    code = """
import sys, torch, monai.bundle
sys.path.insert(0, sys.argv[1])
net = monai.bundle.load(name="mednext", bundle_dir=sys.argv[1] + "/..", workflow_type="inference")
weights = torch.load(sys.argv[1] + "/models/model.pt", weights_only=True)
print(type(net).__name__, all(torch.equal(net.state_dict()[k], v) for k, v in weights.items()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(copy)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "MedNeXt True", done.stderr[-2000:]


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="needs the real hippocampus scans")
def test_they_segment_held_out_hippocampi_padded_or_not_and_warn_of_nothing(shipped, tmp_path):
    fold = settings.read_model_settings(shipped / "model.pt")["fold"]
    held_out = Dataset(HIPPOCAMPUS).validation_cases(fold)[:3]
    (tmp_path / "scans").mkdir()
    for case, zeros in zip(held_out, (0, 0, 30), strict=True):
        scan = nib.load(case["image"])
        save(tmp_path / "scans" / f"{case['case']}.nii.gz", np.pad(np.asanyarray(scan.dataobj), zeros), scan.affine)
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", tmp_path / "scans", "--ckpt_dir", shipped,
        "--output_dir", tmp_path / "masks", "--num_workers", 0,
    )  # fmt: skip
    assert "unlike" not in done.stdout + done.stderr
    with open(tmp_path / "masks/report.csv", newline="") as file:
        assert [row["unlike the training cases"] for row in csv.DictReader(file)] == [""] * 3
    for case, zeros in zip(held_out, (0, 0, 30), strict=True):
        mask = np.asanyarray(nib.load(tmp_path / "masks" / f"{case['case']}_seg.nii.gz").dataobj)
        label = np.pad(np.asanyarray(nib.load(case["label"]).dataobj), zeros)
        for value in (1, 2):
            dice = 2 * ((mask == value) & (label == value)).sum() / ((mask == value).sum() + (label == value).sum())
            assert dice > 0.75


@pytest.mark.skipif(not (SHARED / "Dataset901_OpenMS").is_dir(), reason="needs the real brain scans")
def test_a_whole_brain_is_not_taken_for_a_cut_out(shipped, tmp_path):
    (tmp_path / "scans").mkdir()
    shutil.copy(next((SHARED / "Dataset901_OpenMS/imagesTr").glob("*_0001.nii.gz")), tmp_path / "scans/brain.nii.gz")
    done = bundle(  # coarse, to be quick: a scan is measured on its own grid
        "--config_file", "configs/inference.json", "--dataset_dir", tmp_path / "scans", "--ckpt_dir", shipped,
        "--output_dir", tmp_path / "masks", "--num_workers", 0, "--spacing", "[4,4,4]", "--overlap", 0,
    )  # fmt: skip
    assert "brain.nii.gz is unlike the scans this network was trained on, do not trust its mask unseen" in (
        done.stdout + done.stderr
    )
