"""What was decided together with a set of weights: a JSON file beside them, with the names of the settings.

`models/model.pt` has `models/model.json`, which training writes and inference, scoring and resuming read, so that a
network is never built with other sizes, spacing or labels than those it was trained with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import write_whole

BUNDLE_ROOT = str(Path(__file__).resolve().parents[2])
RENAMED = {"scored": "eval_classes", "familiar": "training_ranges"}  # names in files of 0.6 -> now


@dataclass(frozen=True)
class ModelSettings:
    """Holds what belongs to a set of weights; where nothing is written beside them, the values are these.

    Args:
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        dim: "2d" or "3d".
        deep_supervision: whether the coarse heads are there.
        in_channels: of the image.
        out_channels: of the network.
        labels: names of the network's channels, see data/labels.py; so with the next three.
        label_values: values of the labels in the files.
        regions: of each region, the values that belong to it.
        regions_class_order: the value that each region is written as.
        eval_classes: what is scored, name -> values.
        crop_to_nonzero: whether scans are cropped first.
        intensity: see preprocessing/intensity.py.
        spacing: of the network's grid in mm.
        patch_size: of training and of the sliding window in voxels.
        mirror_axes: along which training mirrored.
        training_ranges: of the training cases, see planning/training_ranges.py.
        fold: that was held out.
    """

    size: str = "S"
    kernel_size: int = 3
    dim: str = "3d"
    deep_supervision: bool = True
    in_channels: int = 1
    out_channels: int = 4
    labels: list[str] | None = None
    label_values: list[int] | None = None
    regions: dict[str, list[int]] | None = None
    regions_class_order: list[int] | None = None
    eval_classes: dict[str, list[int]] | None = None
    crop_to_nonzero: bool = False
    intensity: str | dict | list = "zscore"
    spacing: tuple[float, ...] | list[float] = (1.0, 1.0, 1.0)
    patch_size: tuple[int, ...] | list[int] = (128, 128, 128)
    mirror_axes: tuple[int, ...] | list[int] = (0, 1, 2)
    training_ranges: dict[str, list[float]] | None = None
    fold: int | str = 0

    def as_dict(self) -> dict:
        """Return what is written beside the weights."""
        return asdict(self)


def settings_file(weights: str | Path) -> Path:
    """Name the file of the settings: `models/model.pt` -> `models/model.json`."""
    return Path(weights).with_suffix(".json")


def read_model_settings(weights: str | Path) -> dict:
    """Read what is written beside `weights`, by its present names; nothing where there is no such file.

    Raises:
        UserError: the file is not JSON, or not a dictionary.
    """
    path = settings_file(weights)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON ({e}); restore it or delete it to use the defaults.") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected settings by name: restore or delete it.")
    return {RENAMED.get(name, name): value for name, value in content.items()}


def load_model_settings(weights: str | Path, **overrides) -> ModelSettings:
    """Read the settings beside `weights`, with the defaults of `ModelSettings` for what is not written there.

    Args:
        weights: the file of weights.
        overrides: values that count more than what is written.

    Raises:
        UserError: as `read_model_settings`.
    """
    found = {**read_model_settings(weights), **overrides}
    known = {field.name for field in fields(ModelSettings)}
    return ModelSettings(**{name: value for name, value in found.items() if name in known})


def write_model_settings(weights: str | Path, settings: dict) -> None:
    """Write `settings` beside `weights`, whole or not at all."""
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(settings_file(weights), lambda partial: partial.write_text(text))
