"""What is written beside weights is read back, by the names of this release and of the one before."""

from __future__ import annotations

import json
import random

import pytest

from scripts.utils.errors import UserError
from scripts.utils.settings_table import MODEL
from scripts.weights.model_settings import (
    ModelSettings,
    load_model_settings,
    read_model_settings,
    settings_file,
    write_model_settings,
)


def test_settings_come_back_as_they_were(tmp_path):
    made = ModelSettings(size="B", spacing=[1.0, 1.0, 2.0], eval_classes={"organ": [1]}, fold="all")
    write_model_settings(tmp_path / "model.pt", made.as_dict() | {"epoch": 3})
    assert load_model_settings(tmp_path / "model.pt").as_dict() == {
        **made.as_dict(), "patch_size": [128] * 3, "mirror_axes": [0, 1, 2]
    }  # fmt: skip
    assert read_model_settings(tmp_path / "model.pt")["epoch"] == 3


def test_files_of_the_release_before_are_understood(tmp_path):
    old = {"size": "L", "scored": {"core": [1, 4]}, "familiar": {"spacing x (mm)": [1.0, 2.0]}, "dice": 0.9}
    settings_file(tmp_path / "model.pt").write_text(json.dumps(old))
    found = load_model_settings(tmp_path / "model.pt")
    assert (found.size, found.eval_classes, found.training_ranges) == ("L", {"core": [1, 4]}, old["familiar"])


def test_the_shipped_settings_are_read(shipped):
    found = load_model_settings(shipped / "model.pt")
    assert (found.labels, found.in_channels) == (["background", "Anterior", "Posterior"], 1)
    assert found.training_ranges


def test_without_a_file_the_values_are_those_of_training(tmp_path):
    assert load_model_settings(tmp_path / "model.pt") == ModelSettings()


def test_what_is_given_counts_more_than_what_is_written(tmp_path):
    write_model_settings(tmp_path / "model.pt", {"out_channels": 3, "size": "B"})
    assert load_model_settings(tmp_path / "model.pt", out_channels=5) == ModelSettings(out_channels=5, size="B")


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds a list; expected settings")])
def test_a_damaged_file_is_named(text, message, tmp_path):
    settings_file(tmp_path / "model.pt").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model_settings(tmp_path / "model.pt")


RIGHT = {
    "size": "S", "kernel_size": 3, "dim": "3d", "deep_supervision": True, "in_channels": 2, "out_channels": 3,
    "channels": ["T1", "T2"], "iterations": 250, "batch_size": None,
    "labels": ["background", "a", "b"], "label_values": [0, 1, 4], "regions": None, "regions_class_order": None,
    "eval_classes": {"both": [1, 4]}, "crop_to_nonzero": False, "intensity": ["zscore", "none"],
    "spacing": [1.0, 1.0, 2.0], "patch_size": [32, 48, 32], "mirror_axes": [0, 1], "fold": 1,
    "training_ranges": {"spacing x (mm)": [1.0, 1.5]}, "epoch": 3, "dice": 0.9,
}  # fmt: skip
REGIONS = {
    "labels": ["whole", "core"], "out_channels": 2, "label_values": [0, 1, 2], "eval_classes": None,
    "regions": {"whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2],
}  # fmt: skip
WRONG = {
    "size": ["XL", 3, None, ["S"]],
    "kernel_size": [4, "3", 3.5, True, None],
    "dim": ["4d", 3],
    "deep_supervision": ["true", 1, None],
    "in_channels": [0, -1, 1.5, "1", 10**9, None],
    "channels": [["T1"], "T1", ["T1", 2]],
    "iterations": [0, "2", 1.5],
    "batch_size": [-1, [2]],
    "out_channels": [0, 4, 10**9, []],
    "labels": [["a"], ["a", "a", "b"], "abc", [0, 1, 2], {"a": 1}],
    "label_values": [[0, 1], [1, 2, 3], [0, 4, 1], [0, 1, 1], [0, 1, -4], "014"],
    "regions": [{"a": [1]}, [], {"a": "b"}],
    "regions_class_order": [[1, 4], "1"],
    "eval_classes": [{"a": [9]}, {"a": []}, [1], {}],
    "crop_to_nonzero": ["false", 0],
    "intensity": ["ct", ["zscore"], {"clip": [0, 1]}, None, {"clip": [0, 1], "mean": 0, "std": float("nan")}],
    "spacing": [-1, [1, 1], [1, 1, -1], [1, 1, float("nan")], [1, 1, float("inf")], [1, 1, "1"], "1,1,1", None],
    "patch_size": [32, [32, 32], [31, 32, 32], [32, 32, 0], [32, 32, 1], [16, 16, 16], ["32", 32, 32]],
    "mirror_axes": [3, [3], [0, 0], None, "0"],
    "fold": [-1, None, "first", 0.5],
    "training_ranges": [{"a": [2, 1]}, {"a": [1]}, {"a": [1, float("inf")]}, [1], {"a": "b"}],
}


def written(folder, **content):
    settings_file(folder / "model.pt").write_text(json.dumps(content))
    return load_model_settings(folder / "model.pt")


@pytest.mark.parametrize("more", [{}, REGIONS], ids=["labels", "regions"])
def test_right_settings_are_read(more, tmp_path):
    found = written(tmp_path, **(RIGHT | more)).as_dict()
    assert found == {name: value for name, value in (RIGHT | more).items() if name in found}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_with_the_file_and_its_name(name, value, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/model.json: .*; correct or restore the file.$") as told:
        written(tmp_path, **(RIGHT | {name: value}))
    assert name.split("_")[0] in str(told.value)


def test_an_override_that_is_no_setting_is_refused(tmp_path):
    with pytest.raises(UserError, match="model#spcing is no setting of weights; did you mean spacing[?]"):
        load_model_settings(tmp_path / "model.pt", spcing=[1, 1, 1])
    with pytest.raises(UserError, match="model#spacing is -1; expected three positive lengths"):
        load_model_settings(tmp_path / "model.pt", spacing=-1)


def damaged(rng: random.Random, content: dict) -> bytes:
    """Change one value, one place of it, or one byte."""
    odd = [None, True, -1, 0, 0.5, 1e30, float("nan"), "", "x", "3", [], [[]], {}, {"a": 1}, [None] * 3, 10**30]
    content, name = json.loads(json.dumps(content)), rng.choice(list(content))
    way = rng.randrange(4)
    if way == 0:
        content[name] = rng.choice(odd)
    elif way == 1 and isinstance(content[name], list) and content[name]:
        content[name][rng.randrange(len(content[name]))] = rng.choice(odd)
    elif way == 2 and isinstance(content[name], list):
        content[name] = content[name] * 2 if rng.random() < 0.5 else content[name][1:]
    text = bytearray(json.dumps(content).encode())
    if way == 3:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def test_damaged_files_end_in_one_sentence_or_in_settings_that_can_be(tmp_path):
    rng, refused = random.Random(0), 0
    for number in range(600):
        settings_file(tmp_path / "model.pt").write_bytes(damaged(rng, RIGHT | (REGIONS if number % 2 else {})))
        try:
            found = load_model_settings(tmp_path / "model.pt").as_dict()
        except UserError as e:
            assert "model.json" in str(e)  # noqa: PT017
            refused += 1
            continue
        for name, value in found.items():
            read = MODEL[name].of(value, name)
            assert read == (list(value) if isinstance(value, tuple) else value)
    assert refused > 250
