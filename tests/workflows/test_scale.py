"""Microscopy in nanometres plans, trains and segments; on a grid of another scale every command refuses it."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY, bundle, overlays

NM = 1e-6  # mm


@pytest.fixture(scope="module")
def microscopy(phantom_dir, tmp_path_factory):
    """Copy the phantom with voxels of about 4.6 nm."""
    folder = tmp_path_factory.mktemp("em") / "data"
    shutil.copytree(phantom_dir, folder)
    for path in folder.glob("*/*.nii.gz"):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[:3] *= 4.6 * NM
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)
    return folder


@pytest.fixture(scope="module")
def planned(microscopy, tmp_path_factory):
    out = tmp_path_factory.mktemp("em") / "out"
    common = ("--dataset_dir", microscopy, "--output_dir", out)
    bundle(
        "planning", "--config_file", "configs/plan.json", *common, "--output", out / "plan.json", "--spacing", "median"
    )
    return out, common


def test_the_plan_keeps_every_digit_of_a_nanometre(planned):
    plan = json.loads((planned[0] / "plan.json").read_text())
    assert all(3 * NM < edge < 20 * NM for edge in plan["spacing"])
    assert plan["spacing"] == [float(f"{edge:.6g}") for edge in plan["spacing"]]
    assert plan["patch_size"] == [48, 48, 32] or min(plan["patch_size"]) >= 16
    assert "nan" not in json.dumps(plan)


def test_a_training_by_the_plan_and_its_weights_work(planned, microscopy):
    out, common = planned
    bundle("checking", "--config_file", "configs/plan.json", *common, "--spacing", "median")
    bundle(
        "training", "--config_file", f"['configs/train.json','{out}/plan.json']", *common, "--ckpt_dir", out,
        "--epochs", 1, *TINY,
    )  # fmt: skip
    ranges = json.loads((out / "model.json").read_text())["training_ranges"]
    assert 0 < ranges["spacing x (mm)"][0] < 20 * NM
    scan = microscopy / "imagesTs/phantom_05.nii.gz"
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", scan, "--ckpt_dir", out, "--output_dir", out
    )
    assert "spacing" not in done.stdout.split("unlike")[-1]
    mask, image = nib.load(out / "phantom_05_seg.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, rtol=1e-5)


def test_checking_planning_and_training_at_1_mm_refuse_it(planned, microscopy, tmp_path):
    common = ("--dataset_dir", microscopy, "--output_dir", tmp_path)
    check = bundle("checking", "--config_file", "configs/plan.json", *common, fails=True)
    plan = bundle(
        "planning", "--config_file", "configs/plan.json", *common, "--output", tmp_path / "plan.json", fails=True
    )
    train = bundle("training", *overlays("train"), *common, "--ckpt_dir", tmp_path / "models", *TINY, fails=True)
    assert not (tmp_path / "plan.json").exists()
    assert check.stdout.count("are under 16 along every axis, too few for the network") == 5
    for done in (plan, train):
        assert "Traceback" not in done.stderr
        assert "5 of 5 cases cannot be used:" in done.stderr
        assert "nm): the " in done.stderr
        assert "--spacing median in planning" in done.stderr


@pytest.mark.parametrize(
    ("scale", "reason"), [(4.6 * NM, "are under 16 along every axis"), (1e3, "GB of memory, of which")]
)
def test_inference_refuses_a_scan_of_another_scale_and_goes_on(scale, reason, trained, phantom_dir, tmp_path):
    (tmp_path / "scans").mkdir()
    scan = phantom_dir / "imagesTs/phantom_05.nii.gz"
    shutil.copy(scan, tmp_path / "scans/right.nii.gz")
    image = nib.load(scan)
    nib.save(
        nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([scale] * 3 + [1]) @ image.affine),
        tmp_path / "scans/wrong.nii.gz",
    )
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", tmp_path / "scans", "--ckpt_dir", trained,
        "--output_dir", tmp_path, fails=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "1 of 2 scans could not be segmented" in done.stderr
    assert "wrong.nii.gz has 44 x " in done.stderr
    assert reason in done.stderr
    assert (tmp_path / "right_seg.nii.gz").is_file()
