"""The settings that a set of weights was trained with: a JSON file beside them, with the names of `configs/train.json`.

`models/model.pt` has `models/model.json`, which training writes and inference, scoring and resuming read, so that a
network is never built with other sizes, spacing or labels than those it was trained with.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import write_whole

BUNDLE_ROOT = str(Path(__file__).resolve().parents[2])
RENAMED = {"scored": "eval_classes", "familiar": "training_ranges"}  # names in files of 0.6.0 -> names since 0.7.0


def settings_file(weights: str | Path) -> Path:
    """Name the file of settings beside a file of weights: `models/model.json` for `models/model.pt`."""
    return Path(weights).with_suffix(".json")


def read_model_settings(weights: str | Path, **defaults) -> dict:
    """Read the settings beside a file of weights; `defaults` stand in for what is not written there.

    Settings of 0.6.0 get their names of today.

    Raises:
        UserError: the file is not JSON, or not a dictionary.
    """
    path = settings_file(weights)
    if not path.is_file():
        return defaults
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON ({e}); restore it or delete it to use the defaults.") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected settings by name: restore or delete it.")
    return {**defaults, **{RENAMED.get(name, name): value for name, value in content.items()}}


def write_model_settings(weights: str | Path, settings: dict) -> None:
    """Write `settings` beside a file of weights, whole or not at all."""
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(settings_file(weights), lambda partial: partial.write_text(text))
