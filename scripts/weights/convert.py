"""Weights from one implementation to another: `python -m scripts convert_weights --source FILE --target NEW_FILE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import check_writable
from .architecture import Architecture, build, describe, shapes
from .checkpoints import HEADS, State, check_fits, read_weights, save_checkpoint, save_weights, to_mic_dkfz, to_monai
from .model_settings import read_model_settings, settings_file

FORMATS = {"mednext": "this bundle", "mic-dkfz": "MIC-DKFZ/MedNeXt", "monai": "MONAI"}
EXPORT: dict[str, Callable[[State], dict]] = {"mednext": dict, "mic-dkfz": to_mic_dkfz, "monai": to_monai}
COARSE_HEADS = tuple(f"{HEADS}{level}." for level in range(1, 5))
KEPT = (  # settings beside the target that are not about its earlier weights
    "labels",
    "label_values",
    "regions",
    "regions_class_order",
    "eval_classes",
    "crop_to_nonzero",
    "intensity",
    "spacing",
    "patch_size",
    "mirror_axes",
)


def convert_weights(
    source: str,
    target: str,
    to: str = "mednext",
    size: str | None = None,
    kernel_size: int | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    deep_supervision: bool | None = None,
) -> None:
    """Recognise weights, say what they are, check them, and write them in another implementation's names.

    Args:
        source: a file of this bundle, of MIC-DKFZ/MedNeXt (`*.model`) or of MONAI's MedNeXt.
        target: what to write; never overwritten. For this bundle its settings are written beside it, as `*.json`.
        to: "mednext" (this bundle), "mic-dkfz" or "monai".
        size: row of the table of sizes that the weights must have; so with the next three. What is not given is taken
            from the settings beside `target`, where there are any, and from the weights else.
        kernel_size: depthwise kernel.
        in_channels: channels of the image.
        out_channels: labels with background.
        deep_supervision: false leaves the four coarser heads out; true asks for them.

    Raises:
        UserError: the file cannot be read, is no MedNeXt, or not the one that was asked for.
    """
    _check_target(to, target)
    check_writable(Path(target).parent)
    weights = read_weights(source)
    state, found = weights.state, recognise(weights.state, source)
    print(f"{source}: {found}; names of {FORMATS[weights.format]}")
    print(
        "not told by a file, taken as published: norm over space, residual blocks"
        + ", GRN by sum" * ("v2" in found.layouts)
    )

    earlier = read_model_settings(target) if to == "mednext" else {}
    wanted = {
        "size": size,
        "kernel_size": kernel_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "deep_supervision": deep_supervision,
    }
    wanted = {key: earlier.get(key) if value is None else value for key, value in wanted.items()}
    if wanted["deep_supervision"] is False and found.deep_supervision:
        state = {key: value for key, value in state.items() if not key.startswith(COARSE_HEADS)}
        found = found._replace(deep_supervision=False)
        print("left out: the heads of the four coarser resolutions")
    _check_wanted(found, wanted, len(earlier.get("labels", ())), source)
    _check_other_side(found, to, source)

    if to == "mednext" and found.size:
        kept = {key: earlier[key] for key in KEPT if key in earlier}
        save_weights(dict(state), target, kept | _settings(found) | {"converted_from": Path(source).name})
        print(f"wrote {target}")
        print(f"wrote {settings_file(target)}: spacing and patch are as published, unless you add others")
    else:
        if settings_file(target).is_file():  # a SHA-256 in there is that of other weights
            save_weights(EXPORT[to](state), target, read_model_settings(target))
        else:
            save_checkpoint(EXPORT[to](state), target)
        print(f"wrote {target}")
        if to == "mednext":
            print(f"no row of the table of sizes: build it with MedNeXt(**{found.arguments()})")


def _check_target(to: str, target: str) -> None:
    if to not in FORMATS:
        raise UserError(f"to is {to!r}; expected one of {', '.join(FORMATS)}.")
    if Path(target).exists():
        raise UserError(f"{target} exists and is not overwritten; move it, or give another --target.")
    if Path(target).suffix == ".json":
        raise UserError(f"{target} is the name of a settings file; give the weights another ending, for example .pt.")


def recognise(state: State, source: str) -> Architecture:
    """Say what network weights belong to; `source` names them in the message.

    Raises:
        UserError: no MedNeXt, or none that can be built.
    """
    found = Architecture.of(shapes(state))
    if found is None:
        raise UserError(f"{source} holds {describe(shapes(state))}.")
    try:
        network = build(found)
    except ValueError as e:  # for example an even kernel
        raise UserError(f"{source} holds no MedNeXt that can be built: {e}") from e
    check_fits(state, network, source)
    return found


def _settings(found: Architecture) -> dict[str, Any]:
    """Return the settings of `configs/train.json` that the shapes of the weights decide."""
    return {
        "size": found.size or "of its own",
        "kernel_size": found.kernel_size,
        "in_channels": found.in_channels,
        "out_channels": found.n_classes,
        "deep_supervision": found.deep_supervision,
    }


def _check_wanted(found: Architecture, wanted: Mapping[str, Any], labels: int, source: str) -> None:
    """Raise UserError where the weights differ from the settings asked for, or from the number of labels if known."""
    has = _settings(found)
    wrong = [f"{key} {has[key]} instead of {value}" for key, value in wanted.items() if value not in (None, has[key])]
    if labels and labels != found.n_classes:
        wrong.append(f"{found.n_classes} classes for {labels} labels")
    if wrong:
        raise UserError(f"{source} holds {found}: {', '.join(wrong)}; give other weights or other settings.")


def _check_other_side(found: Architecture, to: str, source: str) -> None:
    if to == "mic-dkfz" and "paper" not in found.layouts:
        raise UserError(f"{source} holds {found}, which MIC-DKFZ/MedNeXt cannot build: its down blocks are others.")
    if to == "monai" and ("monai" not in found.layouts or found.kernel_size is None):
        raise UserError(
            f"{source} holds {found}, which MONAI's MedNeXt cannot build: that has one kernel for all blocks, and down"
            " blocks without GRN that take the expansion ratio of the stage before them; of the paper's it fits S."
        )
