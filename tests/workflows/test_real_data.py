"""Real scans as their publishers store them train, score and infer from their folder, without editing a file."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED, bundle, overlays

from scripts.data.datasets import Dataset

DATASETS = {  # name: patch and spacing, to be quick; why it is here
    "Task04_Hippocampus": ("[32,48,32]", "[2,2,2]"),  # Decathlon layout, small scans, integer and float files
    "Dataset902_FetalBrain": ("[32,32,32]", "[3,3,3]"),  # nnU-Net v2 layout, thick oblique slices in three orientations
    "Dataset901_OpenMS": ("[48,48,48]", "[4,4,4]"),  # nnU-Net v2 layout, four channels, three cases
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_published_data_set_trains_scores_and_infers(name, tmp_path):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not part of the repository; put it at {folder} to run this")
    common = (
        "--dataset_dir",
        folder,
        "--ckpt_dir",
        tmp_path,
        "--output_dir",
        tmp_path,
        "--num_workers",
        0,
        "--overlap",
        0,
    )
    patch, spacing = DATASETS[name]
    bundle(  # held out: one case
        "training", *overlays("train"), *common, "--patch_size", patch, "--spacing", spacing,
        "--epochs", 1, "--iterations", 1,
        "--validate#dataset#data", "$@data.validation_cases(0)[:1]",
    )  # fmt: skip
    bundle(
        "evaluating", *overlays("train", "evaluate"), *common,
        "--validate#dataset#data", "$@data.validation_cases(0)[:1]",
    )  # fmt: skip
    data = Dataset(folder)
    case = data.validation_cases(0)[0]
    with open(tmp_path / "cases.csv") as file:
        assert [row["label"] for row in csv.DictReader(file)] == data.labels.names[1:]
    scan = case["image"] if isinstance(case["image"], str) else case["image"][0]
    bundle("--config_file", "configs/inference.json", *common[2:], "--dataset_dir", scan)
    scan, mask = nib.load(scan), nib.load(tmp_path / f"{case['case']}_seg.nii.gz")
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)  # float32 in the header
    scored = nib.load(tmp_path / "predictions" / f"{case['case']}_seg.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(scored.dataobj))
