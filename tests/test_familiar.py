import csv
import json

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED, bundle, save

from scripts.data import cases, channel_names, training_cases
from scripts.familiar import Familiarity, learn, unfamiliar
from scripts.labels import read as read_labels

RANGES = {
    "spacing x (mm)": [1.0, 1.5],
    "extent x (mm)": [40.0, 60.0],
    "contrast of channel 0 (std / mean)": [0.4, 0.6],
    "volume of label 1 (ml)": [1.0, 3.0],
}


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("spacing x (mm)", [0.8, 1.87], [0.79, 1.9]),
        ("extent x (mm)", [32.0, 75.0], [31.9, 75.1]),
        ("contrast of channel 0 (std / mean)", [0.301, 0.699], [0.29, 0.71, -0.5]),
        ("volume of label 1 (ml)", [0.5, 6.0], [0.0, 0.49, 6.1]),
    ],
)
def test_what_is_outside_the_range_of_training_and_its_margin_is_said(name, inside, outside):
    assert all(unfamiliar({name: value}, RANGES) == [] for value in inside)
    for value in outside:
        (said,) = unfamiliar({name: value}, RANGES)
        assert said == f"{name} is {value:.3g}, in training {RANGES[name][0]:.3g} to {RANGES[name][1]:.3g}"


def test_what_training_does_not_know_is_not_judged():
    assert unfamiliar({"extent q (mm)": 1e9}, RANGES) == []


@pytest.fixture(scope="module")
def ranges(phantom_dir, tmp_path_factory):
    """Of the cases that fold 0 trains on."""
    memory = str(tmp_path_factory.mktemp("memory") / "checked.json")
    return learn(training_cases(str(phantom_dir), 0), 1, read_labels(str(phantom_dir)).values, memory)


def test_ranges_hold_every_training_case(ranges):
    assert {name.split(" (")[0] for name in ranges} == {
        "spacing x", "spacing y", "spacing z", "extent x", "extent y", "extent z",
        "contrast of channel 0", "volume of label 1", "volume of label 2", "volume of label 3",
    }  # fmt: skip
    assert all(low <= high for low, high in ranges.values())


@pytest.fixture(scope="module")
def segmented(trained, phantom_dir, tmp_path_factory):
    """What the command printed, and the report by scan."""
    folder = tmp_path_factory.mktemp("scans")
    image = nib.load(cases(phantom_dir)[0]["image"])
    voxels = np.asanyarray(image.dataobj).astype(np.float32)
    for name, values in {
        "as_trained": voxels,
        "like_ct": voxels - 2 * voxels.max(),
        "larger": np.pad(voxels, ((0, 0), (0, 0), (0, 2 * voxels.shape[2])), mode="edge"),
    }.items():
        save(folder / f"{name}.nii.gz", values, image.affine)
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", folder, "--ckpt_dir", trained,
        "--output_dir", folder / "masks", "--num_workers", 0, "--amp", False,
    )  # fmt: skip
    with open(folder / "masks/report.csv", newline="") as file:
        return done.stdout + done.stderr, {row["scan"]: row for row in csv.DictReader(file)}


class TestInference:
    """Through the command line, with the weights of a short training."""

    def test_training_leaves_the_ranges_of_its_cases(self, trained, ranges):
        assert json.loads((trained / "model.json").read_text())["familiar"] == ranges

    def test_a_scan_as_in_training_has_its_measures_in_the_report(self, segmented):
        row = segmented[1]["as_trained.nii.gz"]
        assert float(row["extent x (mm)"]) > 0
        assert "extent" not in row["unlike the training cases"]
        assert "contrast" not in row["unlike the training cases"]

    @pytest.mark.parametrize(
        ("scan", "measure"), [("like_ct.nii.gz", "contrast of channel 0"), ("larger.nii.gz", "extent")]
    )
    def test_an_unlike_scan_is_in_the_report_and_said_aloud(self, segmented, scan, measure):
        printed, report = segmented
        assert measure in report[scan]["unlike the training cases"]
        assert f"{scan} is unlike the scans this network was trained on, do not trust its mask unseen: " in printed
        assert measure in printed.split(scan)[1]


def test_volumes_are_those_of_the_mask_in_millilitres(tmp_path):
    spacing = np.diag([2.0, 1.0, 0.5, 1.0])
    path = save(tmp_path / "scan.nii.gz", np.ones((10, 10, 10), np.float32), spacing)
    mask = np.zeros((10, 10, 10))
    mask[:5] = 7
    row = Familiarity({"volume of label 7 (ml)": [1.1, 1.2]}, str(tmp_path), [0, 7]).row([str(path)], mask)
    assert row["volume of label 7 (ml)"] == 0.5
    assert row["extent x (mm)"] == 20.0
    assert row["unlike the training cases"] == "volume of label 7 (ml) is 0.5, in training 1.1 to 1.2"


@pytest.mark.skipif(not (SHARED / "Task04_Hippocampus").is_dir(), reason="needs the real hippocampus scans")
def test_real_scans_of_one_data_set_are_alike_and_another_s_are_not(tmp_path):
    def learned(name):
        folder = str(SHARED / name)
        labels = read_labels(folder)
        channels = len(channel_names(folder))
        return learn(cases(folder), channels, labels.values, str(tmp_path / f"{name}.json"), labels.ignore)

    hippocampus, brains = learned("Task04_Hippocampus"), learned("Dataset902_FetalBrain")
    image = {name: limits[0] for name, limits in hippocampus.items()}
    assert unfamiliar(image, hippocampus) == []
    other = {name: limits[1] for name, limits in brains.items()}
    assert any("extent" in said for said in unfamiliar(other, hippocampus))
