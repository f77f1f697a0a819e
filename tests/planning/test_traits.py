"""Traits of a data set that change sampling and augmentation, and only where they are there."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import TINY, bundle

from planning.test_planner import record
from scripts.data.datasets import Dataset
from scripts.planning.planner import plan_training
from scripts.planning.traits import paired_labels, rare_labels, rotate_range, traits


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Left-Putamen", "Right-Putamen"),
        ("kidney_left", "kidney_right"),
        ("kidney_l", "kidney_r"),
        ("Kidney (L)", "Kidney (R)"),
        ("ctx-lh-insula", "ctx-rh-insula"),
        ("LungL", "LungR"),
        ("LKidney", "RKidney"),
        ("leftlung", "rightlung"),
        ("LEFT EYE", "RIGHT EYE"),
        ("femur.Lt", "femur.Rt"),
        ("rib_left_1", "rib_right_1"),
        ("l", "r"),
    ],
)
def test_labels_with_sides_are_known_by_their_names(left, right):
    assert paired_labels(["background", right, "liver", left]) == [(left, right)]


@pytest.mark.parametrize(
    "names",
    [
        ["left atrium", "liver"],  # one side alone
        ["LV", "RV", "MYO"],
        ["L1", "R1"],  # vertebrae
        ["ACL", "ACR"],
        ["tumor", "tumol"],
        ["Anterior", "Posterior"],
        ["rib_left_1", "rib_right_2"],
        ["", "  "],
    ],
)
def test_other_labels_have_no_sides(names):
    assert paired_labels(["background", *names]) == []


def test_every_pair_counts():
    names = [f"{side}-Region{i}" for side in ("Left", "Right") for i in range(71)]
    settings, because = traits([{"labels": [9] * 143}], ["background", *names], ["background", *names])
    assert settings == {"mirror_axes": [1, 2]}
    assert because["mirror_axes"].startswith(
        "labels that differ in their side alone, by their names (Left-Region0, Right-Region0; pairs: 71): "
    )


def test_rare_labels_are_those_of_under_a_tenth_of_the_cases():
    records = [{"labels": [9, 9, int(n == 0), int(n < 2), 0]} for n in range(20)]
    assert rare_labels(records, ["background", "liver", "cyst", "tumour", "absent"]) == ["cyst"]
    settings, because = traits(records, ["background"], ["background", "liver", "cyst", "tumour", "absent"])
    assert settings == {"train#rare_label_share": 0.1}
    assert because["rare_label_share"].startswith("under 10 % of the cases have cyst: ")


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((1.0, 1.0, 1.0), [0.5236] * 3),
        ((1.0, 1.0, 3.0), [0.5236] * 3),  # up to nnU-Net's bound
        ((0.5, 0.5, 3.0), [0.0, 0.0, 3.1416]),
        ((4.0, 0.6, 0.6), [3.1416, 0.0, 0.0]),
    ],
)
def test_thick_voxels_turn_in_their_plane_alone(grid, expected):
    assert rotate_range(grid) == expected


def test_a_plan_with_sides_trains_and_its_weights_keep_the_axes(phantom_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"0": "background", "1": "lung_left", "2": "lung_right", "3": "heart"}
    (folder / "dataset.json").write_text(json.dumps(description))
    overlay = plan_training(Dataset(folder), [record()])
    assert overlay["mirror_axes"] == [1, 2]
    assert "lung_left, lung_right" in overlay["checks#planned_for"]["because"]["mirror_axes"]
    (tmp_path / "plan.json").write_text(json.dumps({**overlay, "train#rare_label_share": 0.1}))
    bundle(
        "training", "--config_file", f"['configs/train.json','{tmp_path}/plan.json']", "--dataset_dir", folder,
        "--ckpt_dir", tmp_path, "--output_dir", tmp_path, "--epochs", 1, *TINY,
    )  # fmt: skip
    assert json.loads((tmp_path / "model.json").read_text())["mirror_axes"] == [1, 2]
