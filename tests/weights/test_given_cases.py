"""Cases that are given as lists: the weights say what a data set would, and nothing that the host sets is touched."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT
from monai.bundle import ConfigParser

from scripts.data.datasets import GivenCases
from scripts.utils.errors import UserError
from scripts.utils.settings import give
from scripts.weights.given_cases import describe
from scripts.weights.model_settings import ModelSettings

CASES = [{"image": "/d/a.nii.gz", "label": "/l/a.nii.gz"}]
WEIGHTS = {
    "in_channels": 2, "channels": ["T1", "T2"], "out_channels": 2, "labels": ["background", "a"],
    "label_values": [0, 3],
    "patch_size": [32, 48, 32], "spacing": [2.0, 2.0, 2.0], "intensity": ["zscore", "none"], "iterations": 7,
    "size": "B", "eval_classes": {"x": [3]}, "crop_to_nonzero": True, "deep_supervision": False,
}  # fmt: skip


def config(folder, *overlays: str, **values) -> ConfigParser:
    """Read a configuration as a host does, with weights in `folder`."""
    (folder / "model.json").write_text(json.dumps(WEIGHTS))
    made = ConfigParser()
    made.read_config([str(ROOT / f"configs/{name}.json") for name in ("train", *overlays)])
    give(made, {"ckpt_dir": str(folder), **{name.replace("__", "#"): value for name, value in values.items()}})
    made.parse()
    return made


def test_labels_patch_and_length_are_those_of_the_weights(tmp_path):
    made = config(tmp_path, train__dataset__data=CASES, validate__dataset__data=[])
    assert describe(made)
    made.parse(reset=True)
    data = made.get_parsed_content("data")
    assert (data.channels, data.labels.names, data.labels.values) == (["T1", "T2"], ["background", "a"], [0, 3])
    model = made.get_parsed_content("model")
    for name in ("patch_size", "spacing", "intensity", "iterations", "size", "eval_classes", "deep_supervision"):
        assert getattr(model, name) == WEIGHTS[name], name
    assert (model.in_channels, model.out_channels, model.fold, made["iterations"]) == (2, 2, "all", 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patch_size", [64, 64, 64]),
        ("iterations", 3),
        ("spacing", [1.5, 1.5, 1.5]),
        ("model__deep_supervision", True),
        ("fold", 2),
    ],
)
def test_what_the_host_sets_counts_more(name, value, tmp_path):
    made = config(tmp_path, train__dataset__data=CASES, **{name: value})
    describe(made)
    wanted = WEIGHTS["deep_supervision"] if name == "model__deep_supervision" else value
    assert made[name.replace("__", "#")] == wanted  # True is the default, and cannot be told from it


@pytest.mark.parametrize(
    "values",
    [{}, {"dataset_dir": "/data"}, {"dataset_dir": "/data", "train__dataset__data": CASES}, {"data": "$my_data"}],
    ids=["nothing", "a data set", "cases beside a data set", "an object"],
)
def test_where_a_data_set_is_named_nothing_changes(values, tmp_path):
    made = config(tmp_path, **values)
    before = json.dumps(made.get())
    assert not describe(made)
    assert json.dumps(made.get()) == before


def test_a_list_that_is_not_given_is_empty(tmp_path):
    made = config(tmp_path, train__dataset__data="$[dict(image='/d/a.nii.gz', label='/l/a.nii.gz')]")
    describe(made)
    assert made["validate#dataset#data"] == []


def test_scoring_takes_the_weights_that_it_scores(tmp_path):
    made = config(tmp_path, "evaluate", validate__dataset__data=CASES)
    assert describe(made)
    made.parse(reset=True)
    assert made.get_parsed_content("data").labels.values == [0, 3]
    assert made["size"] is None  # still that of the weights


def test_without_anything_beside_the_weights_it_says_what_to_give(tmp_path):
    made = config(tmp_path, train__dataset__data=CASES)
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match=r"model.json not found, and train#dataset#data .*give --dataset_dir, or in"):
        describe(made)


def test_channels_that_nobody_named_have_numbers():
    assert GivenCases(ModelSettings(in_channels=2)).channels == ["channel 0", "channel 1"]
