"""What was decided together with a set of weights: a JSON file beside them, with the names of the settings.

`models/model.pt` has `models/model.json`, which training writes and inference, scoring and resuming read, so that a
network is never built with other sizes, spacing or labels than those it was trained with. It also holds the SHA-256 of
the weights that it belongs to, which is compared wherever they are loaded.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import sha256, write_text
from ..utils.settings_table import MODEL

BUNDLE_ROOT = str(Path(__file__).resolve().parents[2])
RENAMED = {"scored": "eval_classes", "familiar": "training_ranges"}  # names in files of 0.6 -> now
SHA256 = ("sha256", "sha256_before")  # of the weights beside the file, and of those that they replaced

logger = logging.getLogger("mednext")


@dataclass(frozen=True)
class ModelSettings:
    """Holds what belongs to a set of weights; where nothing is written beside them, the values are these.

    Args:
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        dim: "2d" or "3d".
        deep_supervision: whether the coarse heads are there.
        in_channels: of the image.
        channels: names of the image's channels; None where nobody wrote them down.
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
        iterations: of an epoch of the training, and with how many patches each; None where nobody wrote them down.
        batch_size: see there.
        training_ranges: of the training cases, see planning/training_ranges.py.
        fold: that was held out.
    """

    size: str = "S"
    kernel_size: int = 3
    dim: str = "3d"
    deep_supervision: bool = True
    in_channels: int = 1
    channels: list[str] | None = None
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
    iterations: int | None = None
    batch_size: int | None = None
    training_ranges: dict[str, list[float]] | None = None
    fold: int | str = 0

    def as_dict(self) -> dict:
        """Return what is written beside the weights."""
        return asdict(self)


def settings_file(weights: str | Path) -> Path:
    """Name the file of the settings: `models/model.pt` -> `models/model.json`."""
    return Path(weights).with_suffix(".json")


def read_model_settings(weights: str | Path) -> dict:
    """Read the settings written beside `weights`, by their present names; nothing where there is no such file.

    Raises:
        UserError: the file is not JSON, or not a dictionary.
    """
    return {RENAMED.get(name, name): value for name, value in _written(weights).items() if name not in SHA256}


def _written(weights: str | Path) -> dict:
    path = settings_file(weights)
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # no JSON, no UTF-8, or lists in lists without an end
        raise UserError(f"{path} is not valid JSON ({e}); restore it or delete it to use the defaults.") from e
    except OSError as e:
        raise UserError(
            f"{path} cannot be read ({e.strerror or e}); restore it or delete it to use the defaults."
        ) from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected settings by name: restore or delete it.")
    return content


def check_sha256(weights: str | Path, silent: bool = False) -> None:
    """Compare a file of weights with the SHA-256 beside it; where none is written, say so once unless `silent`.

    The file is read before its settings, which name new weights before these appear (see `save_weights`): a training
    that goes on meanwhile is no mismatch.

    Raises:
        UserError: the file is another one than the settings were written with.
    """
    found, written = sha256(weights), _written(weights)
    expected = [written[name] for name in SHA256 if name in written]
    if not expected and not silent:
        _say_unknown(str(weights))
    if expected and found not in expected:
        path = settings_file(weights)
        raise UserError(
            f"{weights} has the SHA-256 {found}, but {path} was written for {expected[0]}: it is damaged, or others"
            " took its place. Download or copy both files again, or train again; if these weights are right, give them"
            f" their own settings or delete {' and '.join(SHA256)} there."
        )


@functools.cache
def _say_unknown(weights: str) -> None:
    logger.info(
        "%s has no SHA-256 in %s: whether it is as it was written is not known.", weights, settings_file(weights)
    )


def load_model_settings(weights: str | Path, **overrides) -> ModelSettings:
    """Read the settings beside `weights`, with the defaults of `ModelSettings` for what is not written there.

    Weights that are there have to be those that the settings belong to: who builds a network by them may load the
    weights by other means than this bundle's, as MONAI's exports do.

    Args:
        weights: the file of weights.
        overrides: values that count more than what is written.

    Raises:
        UserError: as `read_model_settings` and `check_sha256`; a value that its setting cannot have, or that
            contradicts another; an override that is none of the settings.
    """
    if Path(weights).is_file():
        check_sha256(weights, silent=True)
    path, known = settings_file(weights), {field.name for field in fields(ModelSettings)}
    written = {name: value for name, value in read_model_settings(weights).items() if name in known}
    found = {
        name: _read(name, value, f"{path}: {name}", "correct or restore the file") for name, value in written.items()
    }
    if wrong := next(_contradictions(ModelSettings(**found), found), None):
        raise UserError(f"{path}: {wrong}; correct or restore the file.")
    for name, value in overrides.items():
        if name not in known:
            near = get_close_matches(name, known, n=1) or sorted(known)
            raise UserError(f"model#{name} is no setting of weights; did you mean {' or '.join(near)}?")
        if value is not None:
            found[name] = _read(name, value, f"model#{name}")
    return ModelSettings(**found)


def _read(name: str, value: object, called: str, fix: str = "") -> Any:
    """Read a value by the table of settings; that of a file, which comes with a `fix`, has to have the right type."""
    found = MODEL[name].of(value, called, fix)
    if fix and found != value:
        raise MODEL[name].refusal(value, called, fix)
    return found


def _contradictions(model: ModelSettings, written: Container[str]) -> Iterator[str]:
    """Say what cannot be true at once, of the settings that are written down."""
    if model.labels is not None and len(model.labels) != model.out_channels:
        yield f"labels has {len(model.labels)} names, out_channels is {model.out_channels}"
    if model.channels is not None and len(model.channels) != model.in_channels:
        yield f"channels has {len(model.channels)} names, in_channels is {model.in_channels}"
    values = model.label_values
    if values is not None and (values != sorted(set(values)) or values[:1] != [0] or len(values) < 2):
        yield f"label_values is {values}; expected 0 and at least one more, ascending"
    if (model.regions is None) != (model.regions_class_order is None):
        yield "regions and regions_class_order belong together; one of them is missing"
    if model.regions is None and values is not None and len(values) != model.out_channels:
        yield f"label_values has {len(values)} values, out_channels is {model.out_channels}"
    if (
        model.regions is not None
        and not len(model.regions) == len(model.regions_class_order or ()) == model.out_channels
    ):
        yield f"regions has {len(model.regions)} names, out_channels is {model.out_channels}"
    groups = [*(model.regions or {}).values(), *(model.eval_classes or {}).values(), model.regions_class_order or []]
    if values is not None and (foreign := {value for group in groups for value in group} - set(values)):
        yield f"regions or eval_classes name the label value {min(foreign)}, which label_values has not"
    if isinstance(model.intensity, list) and len(model.intensity) != model.in_channels:
        yield f"intensity has {len(model.intensity)} schemes, in_channels is {model.in_channels}"
    if "patch_size" in written and (model.dim == "2d") != (model.patch_size[2] == 1):
        yield f"patch_size is {list(model.patch_size)}, dim is {model.dim}"


def write_model_settings(weights: str | Path, settings: dict) -> None:
    """Write `settings` beside `weights`, whole or not at all."""
    text = json.dumps(settings, indent=2) + "\n"
    write_text(settings_file(weights), text)
