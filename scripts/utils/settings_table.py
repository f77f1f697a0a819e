"""The one table of all settings: what each may be, in words for the user and as a function that reads it.

A reading function returns the value as it is used and raises a ValueError or a TypeError for what cannot be. It also
takes what a command line or a hand-written file makes of a value: texts of numbers, lists and switches, and numbers
that are names of folders.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .device import devices_here
from .errors import UserError

SIZES = ("S", "B", "M", "L", "v2-B", "v2-W", "monai-B", "monai-M", "monai-L")  # rows of mednext.SIZES
KERNEL_SIZES = (3, 5, 7)
SCHEMES = ("zscore", "zscore_nonzero", "rescale_to_0_1", "rgb_to_0_1", "none")  # of preprocessing/intensity.py
FORMATS = ("nii.gz", "nrrd", "mha", "png", "dicom_seg")  # of masks, data/images.MASK_ENDINGS
STYLES = ("expansion", "block", "outside_block")
MANY = 2**15  # channels: as many values as labels have
TURN = 6.2832  # radians
FAULTS = (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError)


class Kind(NamedTuple):
    """What a setting may be: in `words`, behind "expected", and by `read`."""

    words: str
    read: Callable[[Any], Any]

    def of(self, value: object, name: str, fix: str = "") -> Any:
        """Read the value of the setting `name`.

        Raises:
            UserError: it is none of this kind; `fix` says what to do.
        """
        try:
            return self.read(value)
        except FAULTS:
            raise self.refusal(value, name, fix) from None

    def refusal(self, value: object, name: str, fix: str = "") -> UserError:
        """Make the sentence for a value that is none of this kind."""
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:97]}..."
        return UserError(f"{name} is {shown}; expected {self.words}{fix and '; '}{fix}.")


def _require(right: bool) -> None:
    if not right:
        raise ValueError


def _plain(value: Any) -> Any:
    """Make Python's values of their texts and of NumPy's."""
    if isinstance(value, str):
        return ast.literal_eval(value.strip())
    return value.tolist() if type(value).__module__ == "numpy" else value


def _switch(value: Any) -> bool:
    value = value.strip().lower() if isinstance(value, str) else _plain(value)
    _require(value in ("true", "false") or isinstance(value, bool))
    return value in ("true", True)


def _number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[Any], float]:
    """Read finite numbers from `low` to `high`; these two are excluded with `above` and `below`."""

    def read(value: Any) -> float:
        found = _plain(value)
        _require(isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found))
        _require(low < found if above else low <= found)
        _require(found < high if below else found <= high)
        return found

    return read


def _whole(low: float, high: float = math.inf) -> Callable[[Any], int]:
    """Read integers from `low` to `high`."""

    def read(value: Any) -> int:
        found = _number(low, high)(value)
        _require(found == int(found))
        return int(found)

    return read


def _one_of(*values: Any) -> Callable[[Any], Any]:
    """Read one of `values`; a text that is written as a number is taken for it."""

    def read(value: Any) -> Any:
        for found in values:
            if type(value) is type(found) and value == found:
                return found
        found = _plain(value)
        _require(not isinstance(found, bool) and found in values)
        return int(found) if isinstance(found, float) else found

    return read


def _several(read_one: Callable[[Any], Any], count: int | None = None, distinct: bool = False) -> Callable:
    """Read lists of `count` values, or of any number."""

    def read(value: Any) -> list:
        found = _plain(value)
        _require(isinstance(found, list | tuple) and count in (None, len(found)))
        read_all = [read_one(entry) for entry in found]
        _require(not distinct or len(set(read_all)) == len(read_all))
        return read_all

    return read


def _either(*reads: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Read what the first of `reads` that can do so makes of a value."""

    def read(value: Any) -> Any:
        for one in reads[:-1]:
            try:
                return one(value)
            except FAULTS:
                continue
        return reads[-1](value)

    return read


def _nothing(value: Any) -> None:
    """Read None, and the texts that JSON and Python have for it."""
    _require(value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")))


def _text(value: Any) -> str:
    """Read texts; numbers become text again, as a folder 2024 that was typed on the command line."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    _require(isinstance(found, str | int | float) and found != "")
    return str(found)


def _uid(value: Any) -> str:
    _require(isinstance(value, str) and set(value) <= set("0123456789.") and value != "")
    return value


def _name(value: Any) -> str:
    _require(isinstance(value, str) and value != "")
    return value


def _dictionary(value: Any) -> Mapping:
    found = _plain(value)
    _require(isinstance(found, Mapping))
    return found


def _groups(value: Any) -> dict[str, list[int]]:
    found = _dictionary(value)
    _require(len(found) > 0 and all(len(group) for group in found.values()))
    return {_text(name): _several(_whole(0, MANY))(group) for name, group in found.items()}


def _ranges(value: Any) -> dict[str, list[float]]:
    found = {_name(name): _several(_number(-math.inf), 2)(pair) for name, pair in _dictionary(value).items()}
    _require(all(low <= high for low, high in found.values()))
    return found


def _patch(value: Any) -> list[int]:
    found = _several(_whole(1, MANY), 3)(value)
    sides = found[:2] if found[2] == 1 else found
    _require(max(sides) > 16 and not any(side % 16 for side in sides))
    return found


def _scheme(value: Any) -> str | Mapping:
    if isinstance(value, str) and value in SCHEMES:
        return value
    found = _dictionary(value)
    _require(sorted(found) == ["clip", "mean", "std"])
    low, high = _several(_number(-math.inf), 2)(found["clip"])
    _require(low < high)
    return {"clip": [low, high], "mean": _number(-math.inf)(found["mean"]), "std": _number(0)(found["std"])}


def _style(value: Any) -> str | None:
    return _either(_nothing, _one_of(*STYLES))(value)


def _device(value: Any) -> Any:
    here = devices_here()
    name = f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else str(value).strip().lower()
    _require(name in here or f"{name}:0" in here or name == "cpu:0")
    return name if isinstance(value, int | str) else value


def _listed(values: tuple) -> str:
    return f"one of {', '.join(map(str, values))}"


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or None", _either(_nothing, kind.read))


switch = Kind("True or False", _switch)
count = Kind("an integer from 1 on", _whole(1))
channels = Kind(f"an integer from 1 to {MANY}", _whole(1, MANY))
from_zero = Kind("an integer from 0 on", _whole(0))
positive = Kind("a finite number above 0", _number(0, above=True))
path = Kind("the name of a file or folder", _text)
files = Kind(
    "a weights file, a pattern, or a list of them, for example \"['a.pt','b.pt']\"", _either(_several(_text), _text)
)
text = Kind("a text", _text)
size = Kind(f"{_listed(SIZES)}, for example S", _one_of(*SIZES))
kernel_size = Kind(_listed(KERNEL_SIZES), _one_of(*KERNEL_SIZES))
dimension = Kind("2d or 3d", _one_of("2d", "3d"))
three_lengths = _several(_number(0, above=True), 3)
spacing = Kind('three positive lengths in mm, for example "[1.0,1.0,1.0]"', three_lengths)
patch_size = Kind(
    'three multiples of 16 voxels with at least one over 16, for example "[48,64,48]"; in 2D two and 1, "[512,512,1]"',
    _patch,
)
axes = Kind(
    'some of the axes 0, 1, 2 in a list, each once, for example "[0,1]"; [] for none',
    _several(_whole(0, 2), distinct=True),
)
groups = Kind("names with lists of label values, for example \"{'tumor':[1,4]}\"", _groups)
values = Kind("a list of label values", _several(_whole(0, MANY)))
overlap = Kind("a part of the window, from 0 to below 1, for example 0.5", _number(0, 1, below=True))
fold = Kind("the number of a fold, from 0 on, or all", _either(_one_of("all"), _whole(0)))
described = _optional(Kind("a dictionary, as a plan or a recipe has it", _dictionary))

MODEL = {  # what is written beside weights, see weights/model_settings.py
    "size": size,
    "kernel_size": kernel_size,
    "dim": dimension,
    "deep_supervision": switch,
    "in_channels": channels,
    "channels": _optional(Kind("a list of names", _several(_either(_name, _one_of(""))))),
    "out_channels": channels,
    "labels": _optional(Kind("a list of names", _several(_name, distinct=True))),
    "label_values": _optional(values),
    "regions": _optional(groups),
    "regions_class_order": _optional(values),
    "eval_classes": _optional(groups),
    "crop_to_nonzero": switch,
    "intensity": Kind(
        f"{_listed(SCHEMES)}, a dictionary of clip, mean and std, or a list with one of these for each channel",
        _either(_scheme, _several(_scheme)),
    ),
    "spacing": spacing,
    "patch_size": patch_size,
    "mirror_axes": axes,
    "iterations": _optional(count),
    "batch_size": _optional(count),
    "training_ranges": _optional(Kind("names with their lowest and highest values", _ranges)),
    "fold": fold,
}

SETTINGS = {  # of all commands, as docs/reference/settings.md lists them
    **{f"model#{name}": kind for name, kind in MODEL.items()},
    **{name: MODEL[name] for name in ("size", "kernel_size", "spacing", "patch_size", "intensity", "crop_to_nonzero")},
    **{name: MODEL[name] for name in ("mirror_axes", "fold")},
    **dict.fromkeys(("bundle_root", "dataset_dir", "ckpt_dir", "output_dir", "cache_dir", "model_file"), path),
    **dict.fromkeys(("output", "folder", "fingerprint_file", "checks#fingerprint#fingerprint_file"), path),
    **dict.fromkeys(("init_weights", "postprocessing_file"), _optional(path)),
    **dict.fromkeys(("skip_existing", "fast", "tta", "amp", "compile", "preview", "save_probabilities"), switch),
    **dict.fromkeys(("save_predictions", "lesion_scores", "train#batch_dice"), switch),
    **dict.fromkeys(("epochs", "iterations", "batch_size", "val_interval"), count),
    "resume": Kind("True, False or auto", _either(_one_of("auto"), _switch)),
    "ensemble": files,
    "seed": Kind("an integer from 0 on, below 2^63", _whole(0, 2**63 - 1)),
    "patience_minutes": positive,
    "learning_rate": Kind("a finite number above 0, at most 1e30", _number(0, 1e30, above=True)),  # float32's end
    "nsd_tolerance_mm": positive,
    "memory_gb": _optional(positive),
    **dict.fromkeys(("overlap", "displayable_configs#overlap"), overlap),
    **dict.fromkeys(("displayable_configs#tta", "displayable_configs#keep_largest"), switch),
    "num_workers": from_zero,
    "checkpoint_selection": Kind("best or last", _one_of("best", "last")),
    "window_scheme": Kind("nnunet or monai", _one_of("nnunet", "monai")),
    "cpu_precision": Kind("float32, bfloat16 or auto", _one_of("float32", "bfloat16", "auto")),
    "output_format": _optional(Kind(_listed(FORMATS), _one_of(*FORMATS))),
    "output_file": _optional(path),
    "series": _optional(Kind("the UID of a DICOM series", _uid)),
    "device": Kind("", _device),  # which there are is said when it is asked for
    **{f"coarse#{name}": MODEL[name] for name in ("spacing", "patch_size")},
    "coarse#epochs": count,
    "fine_tuning#skip_heads": switch,
    "fine_tuning#freeze": _optional(Kind("encoder", _one_of("encoder"))),
    "fine_tuning#layer_decay": Kind("a number over 0 and up to 1, for example 0.8", _number(0, 1, above=True)),
    "fine_tuning#warmup_epochs": from_zero,
    "train#rotate_range": Kind(
        'three angles in radians, from 0 to a whole turn, for example "[0.5236,0.5236,0.5236]"',
        _several(_number(0, TURN), 3),
    ),
    "train#rare_label_share": Kind("a share, from 0 to below 1, for example 0.1", _number(0, 1, below=True)),
    "checks#planned_for": described,
    "checks#recipe": described,
    "network_def#checkpoint_style": _optional(
        Kind(f"{_listed(STYLES)}, or a list of five", _either(_one_of(*STYLES), _several(_style, 5)))
    ),
    "task": text,
    "url": _optional(text),
    "hash_val": _optional(text),
    "hash_type": Kind("md5, sha1, sha256 or sha512", _one_of("md5", "sha1", "sha256", "sha512")),
}  # fmt: skip

PLANNING = {  # where planning takes more than the other commands do
    "spacing": Kind(f"{spacing.words}, median or mixed", _either(_one_of("median", "mixed"), three_lengths)),
}


def kind_of(name: str, planning: bool = False) -> Kind:
    """Look up what the setting `name` may be, in planning or for all other commands."""
    if name == "device":
        return Kind(f"one of {', '.join(devices_here())}, which this computer has", _device)
    return PLANNING.get(name, SETTINGS[name]) if planning else SETTINGS[name]
