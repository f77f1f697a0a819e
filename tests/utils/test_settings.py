"""What a configuration begins with: old names are accepted, from every side, and every value is read by its kind."""

from __future__ import annotations

import json
import logging
import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser

from scripts.utils.errors import UserError
from scripts.utils.settings import RENAMED, give, prepare
from scripts.utils.settings_table import SETTINGS, kind_of

VALUES = {  # of settings that were renamed
    "upkern_from": "k3.pt",
    "keep": "last",
    "scored": {"organ": [1]},
    "tiles": "monai",
    "skip_heads": True,
    "freeze": "encoder",
    "layer_decay": 0.5,
    "warmup_epochs": 3,
    "dim": "2d",
    "deep_supervision": False,
    "batch_dice": True,
    "rotate_range": [0.0, 0.0, 1.0],
    "planned_for": {"cases": 3},
    "recipe": {"name": "CT"},
}


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    caplog.set_level(logging.WARNING, "mednext")
    return caplog


def parser(*names: str, **given) -> ConfigParser:
    made = ConfigParser()
    made.read_config([str(ROOT / f"configs/{name}.json") for name in names or ("train",)])
    give(made, given)
    return made


def prepared(*names: str, **given) -> ConfigParser:
    made = parser(*names, **given)
    prepare(made)
    return made


@pytest.mark.parametrize("old", sorted(set(RENAMED) - {"memory"}))
def test_a_renamed_setting_is_moved_and_said(old, said):
    patch = {"patch_size": [32, 32, 1], "mirror_axes": [0, 1]} if old == "dim" else {}
    config = prepared(**{old: VALUES[old]}, **patch)
    assert config[RENAMED[old]] == VALUES[old]
    assert old not in config
    assert said.messages == [f"--{old} is called --{RENAMED[old]} now; the old name is understood until version 0.8."]


def test_every_new_name_is_there():
    plan = json.loads((ROOT / "configs/plan.json").read_text())
    assert all(now in parser() or now in plan for now in RENAMED.values())
    assert not any(old in parser() for old in RENAMED)


def test_a_configuration_without_old_names_stays_as_it_is(said):
    config = parser(size="B")
    before = json.dumps(config.config)
    prepare(config)
    assert json.dumps(config.config) == before
    assert said.messages == []


def test_an_expression_finds_its_own_configuration(said):
    config = ConfigParser(
        {
            "imports": ["$import scripts.utils.settings as settings"],
            "upkern_from": "k3.pt",
            "init_weights": None,
            "seen": "$@init_weights",
            "initialize": ["$settings.prepare()", "$@seen"],
        }
    )
    assert config.get_parsed_content("initialize")[1] == "k3.pt"
    assert len(said.messages) == 1


def test_what_belongs_to_the_weights_is_set_where_they_are_read(said):
    config = ConfigParser()
    config.read_config(str(ROOT / "configs/inference.json"))
    config.update({"spacing": [2.0, 2.0, 2.0]})
    prepare(config)
    assert config["model#spacing"] == [2.0, 2.0, 2.0]
    assert said.messages == ["--spacing is called --model#spacing now; the old name is understood until version 0.8."]


def test_outside_of_a_configuration_nothing_happens():
    prepare()


def test_a_step_before_is_not_taken_twice_nor_lost(said):
    config = ConfigParser(
        {
            "imports": ["$import scripts.utils.settings as settings"],
            "tta": "false",
            "count": "$[]",
            "initialize": ["$@count.append(1) or len(@count)", "$settings.prepare()", "$@tta"],
        }
    )
    assert config.get_parsed_content("initialize") == [1, None, False]


@pytest.mark.parametrize(
    ("names", "given", "now"),
    [
        (["inference"], {"tta": "false"}, {"tta": False}),
        (["inference"], {"tta": "True"}, {"tta": True}),
        (["inference"], {"compile": "FALSE", "amp": "true"}, {"compile": False, "amp": True}),
        (["train"], {"resume": " false "}, {"resume": False}),
        (["train"], {"resume": "auto"}, {"resume": "auto"}),
        (["train", "evaluate"], {"save_predictions": "False"}, {"save_predictions": False}),
        (["train"], {"fine_tuning#skip_heads": "true"}, {"fine_tuning#skip_heads": True}),
        (["train"], {"dataset_dir": 2024, "ckpt_dir": 7, "cache_dir": True}, {"dataset_dir": "2024", "ckpt_dir": "7"}),
        (["plan"], {"dataset_dir": 2024, "output_dir": 7, "output": 3}, {"dataset_dir": "2024", "output": "3"}),
        (["fetch"], {"folder": 2024, "hash_val": 123}, {"folder": "2024", "hash_val": "123"}),
        (["inference"], {"output_dir": ROOT, "model_file": 5}, {"output_dir": str(ROOT), "model_file": "5"}),
        (["inference"], {"ensemble": [1, "b.pt"]}, {"ensemble": ["1", "b.pt"]}),
        (["train"], {"epochs": "20", "iterations": 1e3}, {"epochs": 20, "iterations": 1000}),
        (["train"], {"patch_size": "[48,64,48]"}, {"patch_size": [48, 64, 48]}),
        (["train"], {"patch_size": (96, 96, 96)}, {"patch_size": [96, 96, 96]}),
        (["train"], {"spacing": np.array([1.0, 1.0, 2.0])}, {"spacing": [1.0, 1.0, 2.0]}),
        (["train"], {"fold": "all"}, {"fold": "all"}),
        (["train"], {"fold": "3"}, {"fold": 3}),
        (["train"], {"init_weights": "null", "fine_tuning#freeze": "none"}, {"init_weights": None}),
        (["train"], {"learning_rate": "$0.5 / 100"}, {"learning_rate": "$0.5 / 100"}),
        (["train"], {"iterations": "$'3'"}, {"iterations": 3}),
        (["plan"], {"spacing": "median"}, {"spacing": "median"}),
        (["inference"], {"model#spacing": [1, 1, 2], "model#intensity": "none"}, {"model#spacing": [1, 1, 2]}),
        (["inference"], {"device": "CPU"}, {"device": "cpu"}),
        (["inference"], {"device": torch.device("cpu")}, {"device": torch.device("cpu")}),
    ],
)  # fmt: skip
def test_values_become_what_they_are_meant_to_be(names, given, now):
    config = prepared(*names, **given)
    for name, value in now.items():
        assert (config[name], type(config[name])) == (value, type(value))


NONSENSE = {
    "tta": ["no", 1, 0, "", "falsch", [True], 0.0],
    "amp": ["cuda", 2],
    "overlap": [50, 1, 1.0, -0.1, "half", True, float("nan"), [0.5]],
    "patch_size": [32, "32", [32, 32], [16, 16, 16], [40, 32, 32], [32.5, 32, 32], [0, 32, 32], [-16, 32, 32], "big"],
    "spacing": ["mean", 1, [1, 1], [1, 1, 0], [1, 1, -1], [1, 1, float("inf")], ["a", 1, 1], [True, 1, 1], {}],
    "epochs": [0, -1, 1.5, "many", True, [3]],
    "iterations": [0, "0"],
    "batch_size": [0, 0.5],
    "val_interval": [0, -3],
    "learning_rate": [0, -1e-3, 1e39, float("nan"), float("inf"), "fast"],
    "num_workers": [-1, 0.5, "auto"],
    "fold": [-1, "every", 0.5, [0]],
    "seed": [-1, "random", 0.5, 2**64],
    "mirror_axes": [0, [3], [0, 0], [-1], "xy"],
    "cpu_precision": ["float16", 16],
    "checkpoint_selection": ["first", True],
    "window_scheme": ["gaussian", 1],
    "size": ["XL", "s", 1, "B "],
    "kernel_size": [4, 3.5, "three", True, [3]],
    "intensity": ["ct", {"clip": [1, 0], "mean": 0, "std": 1}, {"clip": [0, 1]}, ["zscore", "?"], 1],
    "crop_to_nonzero": ["yes", 1],
    "dataset_dir": ["", ["a", "b"], None],
    "device": ["mps:9", "cuda:77", "gpu", "", True, 9, "cpu:1", "cpu cpu"],
    "fine_tuning#freeze": ["decoder", True, 1],
    "fine_tuning#layer_decay": [0, 1.1, "slow"],
    "fine_tuning#warmup_epochs": [-1, 0.5],
    "train#rotate_range": [30, [30, 30, 30], [-1, 0, 0], [0, 0]],
    "train#batch_dice": ["dice", 3],
    "train#rare_label_share": [1, -0.1, "often"],
    "model#dim": ["1d", 3, True],
    "model#eval_classes": [[1], {}, {"a": []}, {"a": ["b"]}, "tumor", {"a": [-1]}],
    "checks#planned_for": ["CT", 3],
    "network_def#checkpoint_style": ["all", ["block"], 1],
    "resume": [None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_what_a_setting_cannot_be_is_refused_in_one_sentence(name, value):
    with pytest.raises(UserError, match=f"^{name} is .*; expected .*") as told:
        prepared(**{name: value})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["train", "evaluate"], {"nsd_tolerance_mm": 0}),
        (["train", "pool"], {"nsd_tolerance_mm": "far"}),
        (["train", "evaluate"], {"overlap": 1}),
        (["train", "evaluate"], {"model#kernel_size": 4}),
        (["train", "evaluate"], {"ensemble": [["a"]]}),
        (["inference"], {"model#spacing": [1, 1, -1]}),
        (["inference"], {"model#out_channels": 0}),
        (["inference"], {"postprocessing_file": ["none"]}),
        (["plan"], {"spacing": "mean"}),
        (["plan"], {"memory_gb": 0}),
        (["plan"], {"memory_gb": "much"}),
        (["plan"], {"size": "XL"}),
        (["fetch"], {"hash_type": "crc"}),
        (["fetch"], {"task": ["a"]}),
        (["train"], {"learning_rate": "$-0.5"}),
        (["train"], {"epochs": "@overlap"}),
        (["inference"], {"device": "$torch.device('cuda:77')"}),
        (["inference"], {"patch_size": [32, 32, 1]}),
        (["train"], {"patch_size": [32, 32, 1]}),
        (["train", "recipes/2d"], {"patch_size": [32, 32, 32]}),
        (["train", "recipes/2d"], {"mirror_axes": [0, 1, 2]}),
    ],
)
def test_every_command_checks_its_settings(names, given, shipped):
    more = {"model_file": str(shipped / "model.pt")} if names == ["inference"] else {}
    with pytest.raises(UserError, match=" is .*; expected "):
        prepared(*names, **given, **more)


@pytest.mark.parametrize(
    ("typed", "value", "text"),
    [("1.50", 1.5, "1.50"), ("0x10", 16, "0x10"), ("1e3", 1000.0, "1e3"), ("2", 3, "3"), ("1_000", 1000, "1_000")],
)
@pytest.mark.parametrize("joined", [False, True])
def test_a_folder_is_called_as_it_was_typed(typed, value, text, joined, monkeypatch):
    options = [f"--output_dir={typed}"] if joined else ["--output_dir", typed]
    monkeypatch.setattr(sys, "argv", ["run", *options])
    assert prepared("inference", output_dir=value)["output_dir"] == text


def test_the_devices_that_there_are_are_named():
    with pytest.raises(UserError, match="device is 'mps:9'; expected one of cpu.*, which this computer has"):
        prepared("inference", device="mps:9")


def test_the_shipped_configurations_are_as_they_were_meant(said):
    for names in (["train"], ["train", "evaluate"], ["train", "pool"], ["inference"], ["plan"], ["fetch"]):
        config = parser(*names)
        before = json.dumps(config.config)
        prepare(config)
        assert json.dumps(config.config) == before
    for recipe in sorted((ROOT / "configs/recipes").glob("*.json")):
        prepared("train", f"recipes/{recipe.stem}")
    assert said.messages == []


def test_every_default_is_one_that_the_table_takes():
    for names in (["train"], ["train", "evaluate"], ["inference"], ["plan"], ["fetch"]):
        config = parser(*names)
        for name in SETTINGS:
            value = config.get(name)
            if value is not None and not isinstance(value, dict) and not str(value).startswith(("$", "@")):
                assert SETTINGS[name].of(value, name) == value


COMMANDS = (["train"], ["train", "evaluate"], ["train", "pool"], ["inference"], ["plan"], ["fetch"])
ODD = [
    None,
    True,
    -1,
    0,
    0.5,
    3,
    10**30,
    float("nan"),
    "",
    "x",
    "true",
    "3",
    [],
    [[]],
    [1, 2, 3],
    {},
    {"a": 1},
    (),
    b"",
]


def test_any_value_of_any_setting_is_read_or_refused_in_one_sentence(shipped):
    rng, refused = random.Random(0), 0
    for _ in range(600):
        names, name, value = rng.choice(COMMANDS), rng.choice(list(SETTINGS)), rng.choice(ODD)
        if rng.random() < 0.2:
            at = rng.randrange(len(name))
            name = name[:at] + rng.choice("aex_") + name[at:]
        config = ConfigParser()
        config.read_config([str(ROOT / f"configs/{file}.json") for file in names])
        try:
            give(
                config,
                {"model_file": str(shipped / "model.pt"), name: value} if "inference" in names else {name: value},
            )
            prepare(config)
        except UserError as e:
            assert "\n" not in str(e)  # noqa: PT017
            refused += 1
            continue
        if name in SETTINGS and config.get(name) is not None:  # a name of 0.6 has moved
            kind_of(name, planning="plan" in names).of(config[name], name)
    assert 300 < refused < 600
