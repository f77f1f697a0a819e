"""One command trains a coarse network and the network itself, and another one segments by both."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, bundle, overlays

from scripts.training.coarse import coarse_spacing
from scripts.utils.files import sha256


@pytest.fixture(scope="module")
def both(phantom_dir, tmp_path_factory):
    """Train as `trained` is, with a coarse network; return the `ckpt_dir`, in which `log` is what was printed."""
    folder = tmp_path_factory.mktemp("both")
    done = bundle(
        "training", *overlays("train", "fast"), "--dataset_dir", phantom_dir, "--ckpt_dir", folder / "models",
        "--output_dir", folder / "eval", "--epochs", 2, "--coarse#spacing", "[2.0,2.0,2.0]", *TINY,
    )  # fmt: skip
    (folder / "models" / "log").write_text(done.stdout)
    return folder / "models"


def test_the_network_is_the_one_that_is_trained_alone(both, trained):
    one, other = (torch.load(folder / "model.pt", weights_only=True) for folder in (both, trained))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_coarse_one_has_its_own_grid_and_length(both):
    one, other = (json.loads((folder / "model.json").read_text()) for folder in (both / "coarse", both))
    assert {name for name in other if one[name] != other[name]} == {"spacing", "epoch", "dice", "sha256"}
    assert (one["spacing"], one["epoch"]) == ([2.0] * 3, 1)
    log = (both / "log").read_text()
    assert log.index(f"first a coarse network, of a grid of 2 x 2 x 2 mm, into {both}/coarse") < log.index("epoch 1/1")
    assert log.index("epoch 1/1") < log.index(f"now the network itself, into {both}") < log.index("epoch 1/2")


def test_a_training_that_is_resumed_keeps_a_coarse_network_that_is_done(both, phantom_dir, tmp_path):
    before = sha256(both / "coarse/model.pt")
    done = bundle(
        "training", *overlays("train", "fast"), "--dataset_dir", phantom_dir, "--ckpt_dir", both, "--output_dir",
        tmp_path, "--epochs", 2, "--coarse#spacing", "[2.0,2.0,2.0]", "--resume", "auto", *TINY,
    )  # fmt: skip
    assert "resuming after epoch 1 of 1" in done.stdout
    assert "resuming after epoch 2 of 2" in done.stdout
    assert sha256(both / "coarse/model.pt") == before


def test_masks_say_which_part_of_the_scan_was_segmented(both, phantom_dir, tmp_path):
    scan = phantom_dir / "imagesTs/phantom_05.nii.gz"
    for name in ("fast", "again"):
        done = bundle(
            "inferring", "--config_file", "configs/inference.json", "--dataset_dir", scan, "--ckpt_dir", both,
            "--output_dir", tmp_path, "--fast", True, "--skip_existing", name == "again", "--num_workers", 2,
        )  # fmt: skip
    assert "1 of 1 scans have masks" in done.stdout
    record = json.loads((tmp_path / "masks.json").read_text())
    with open(tmp_path / "report.csv") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    for case, entry in record["masks"].items():
        assert rows[case]["segmented"] == entry["segmented"]
        assert " mm" in entry["segmented"] or entry["segmented"] == "all: the coarse network found nothing"
        mask = nib.load(tmp_path / f"{case}_seg.nii.gz")
        assert mask.shape == nib.load(scan).shape
        assert np.asarray(mask.dataobj).max() <= 3
    (maker,) = record["made_by"].values()
    assert maker["fast"] is True
    assert sorted(maker["weights"]) == [f"{both}/coarse/model.pt", f"{both}/model.pt"]
    refused = bundle(
        "inferring", "--config_file", "configs/inference.json", "--dataset_dir", scan, "--ckpt_dir", both,
        "--output_dir", tmp_path, "--skip_existing", True, fails=True,
    )  # fmt: skip
    assert "with fast true" in refused.stderr
    assert "with fast false" in refused.stderr


def test_without_coarse_weights_one_sentence_says_how_to_train_them(trained, phantom_dir, tmp_path):
    done = bundle(
        "inferring", "--config_file", "configs/inference.json", "--dataset_dir", phantom_dir, "--ckpt_dir", trained,
        "--output_dir", tmp_path, "--fast", True, fails=True,
    )  # fmt: skip
    assert f"error: {trained}/coarse/model.pt not found" in done.stderr
    assert "configs/fast.json" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--coarse#spacing", "[3.0,3.0,3.0]", "are under 16 along every axis"),
        ("--coarse#itertions", 9, "did you mean --iterations"),
    ],
)
def test_what_the_coarse_network_cannot_have_ends_the_command_before_anything_is_trained(
    option, value, said, phantom_dir, tmp_path
):
    done = bundle(
        "training", *overlays("train", "fast"), "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path,
        "--output_dir", tmp_path, "--epochs", 2, option, value, *TINY, fails=True,
    )  # fmt: skip
    assert "error: the coarse network, whose settings are --coarse#spacing and so on: " in done.stderr
    assert said in done.stderr
    assert "epoch 1/" not in done.stdout


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ([1.0, 1.0, 1.0], [3.0, 3.0, 3.0]),
        ([0.5, 0.5, 0.5], [1.5, 1.5, 1.5]),
        ([0.7, 0.7, 5.0], [2.1, 2.1, 5.0]),
        ([5.0, 1.0, 1.0], [5.0, 3.0, 3.0]),
        ([1.0, 1.0, 3.0], [3.0, 3.0, 3.0]),
        ([0.8, 0.8, 1.5], [2.4, 2.4, 2.4]),
    ],
)
def test_the_coarse_grid_has_a_third_of_the_finest_resolution(spacing, expected):
    assert coarse_spacing(spacing) == pytest.approx(expected)
