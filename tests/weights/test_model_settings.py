"""Settings lie beside the weights that were trained with them."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from scripts.utils.errors import UserError
from scripts.weights.model_settings import RENAMED, read_model_settings, settings_file, write_model_settings


def test_what_was_written_is_read_and_the_rest_is_the_default(tmp_path):
    weights = tmp_path / "new" / "model.pt"
    assert settings_file(weights) == tmp_path / "new" / "model.json"
    assert read_model_settings(weights, size="S") == {"size": "S"}
    write_model_settings(weights, {"size": "B", "spacing": [1.0, 1.0, 2.0]})
    expected = {"size": "B", "kernel_size": 3, "spacing": [1.0, 1.0, 2.0]}
    assert read_model_settings(weights, size="S", kernel_size=3) == expected
    assert [path.name for path in weights.parent.iterdir()] == ["model.json"]


def test_settings_of_an_earlier_version_get_their_names_of_today(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"size": "S", "scored": {"tumor": [1]}, "familiar": {"a": [0, 1]}}))
    expected = {"size": "S", "eval_classes": {"tumor": [1]}, "training_ranges": {"a": [0, 1]}}
    assert read_model_settings(tmp_path / "model.pt", eval_classes=None) == expected


def test_the_shipped_settings_are_read_with_the_names_of_today():
    assert not RENAMED.keys() & read_model_settings(ROOT / "models" / "model.pt").keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"model.json is not valid JSON .*; restore it or delete it"),
        ("[1]", "model.json holds a list; expected settings by name: restore or delete it"),
    ],
    ids=["damaged", "a list"],
)
def test_what_is_no_file_of_settings_is_said(text, message, tmp_path):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_model_settings(tmp_path / "model.pt")
