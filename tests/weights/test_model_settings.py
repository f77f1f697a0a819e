"""What is written beside weights is read back, by the names of this release and of the one before."""

from __future__ import annotations

import json

import pytest

from scripts.utils.errors import UserError
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
