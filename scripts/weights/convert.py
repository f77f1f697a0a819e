"""Weights from one implementation to another, `--source FILE --target models/model.pt`."""

from __future__ import annotations

from pathlib import Path

from ..utils.errors import UserError
from . import checkpoints
from . import model_settings as settings
from .architecture import Architecture, build, describe, shapes

FORMATS = {"mednext": "this bundle", "mic-dkfz": "MIC-DKFZ/MedNeXt", "monai": "MONAI"}
EXPORT = {"mednext": dict, "mic-dkfz": checkpoints.to_mic_dkfz, "monai": checkpoints.to_monai}
COARSE_HEADS = tuple(f"{checkpoints.HEADS}{level}." for level in range(1, 5))
KEPT = (
    "labels",
    "label_values",
    "regions",
    "regions_class_order",
    "scored",
    "crop_to_nonzero",
    "intensity",
    "spacing",
    "patch_size",
    "mirror_axes",
)  # settings beside the target that are not about its earlier weights


def convert(
    source: str,
    target: str,
    to: str = "mednext",
    size: str | None = None,
    kernel_size: int | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    deep_supervision: bool | None = None,
) -> None:
    """Recognises weights, says what they are, checks them, and writes them in another implementation's names.

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
    if to not in FORMATS:
        raise UserError(f"to is {to!r}; expected one of {', '.join(FORMATS)}.")
    if Path(target).exists():
        raise UserError(f"{target} exists and is not overwritten; move it, or give another --target.")
    if Path(target).suffix == ".json":
        raise UserError(f"{target} is the name of a settings file; give the weights another ending, for example .pt.")
    weights = checkpoints.read_weights(source)
    state, found = weights.state, _recognise(weights.state, source)
    print(f"{source}: {found}; names of {FORMATS[weights.format]}")
    print(
        "not told by a file, taken as published: norm over space, residual blocks"
        + ", GRN by sum" * ("v2" in found.layouts)
    )

    earlier = settings.read_model_settings(target) if to == "mednext" else {}
    asked = {
        "size": size,
        "kernel_size": kernel_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "deep_supervision": deep_supervision,
    }
    asked = {key: earlier.get(key) if value is None else value for key, value in asked.items()}
    if asked["deep_supervision"] is False and found.deep_supervision:
        state = {key: value for key, value in state.items() if not key.startswith(COARSE_HEADS)}
        found = found._replace(deep_supervision=False)
        print("left out: the heads of the four coarser resolutions")
    has = {
        "size": found.size or "of its own",
        "kernel_size": found.kernel_size,
        "in_channels": found.in_channels,
        "out_channels": found.n_classes,
        "deep_supervision": found.deep_supervision,
    }
    wrong = [f"{key} {has[key]} instead of {value}" for key, value in asked.items() if value not in (None, has[key])]
    labels = len(earlier.get("labels", ())) or found.n_classes
    wrong += [f"{found.n_classes} classes for {labels} labels"] * (labels != found.n_classes)
    if wrong:
        raise UserError(f"{source} holds {found}: {', '.join(wrong)}; give other weights or other settings.")
    _check_other_side(found, to, source)

    try:
        checkpoints.save_checkpoint(EXPORT[to](state), target)
        print(f"wrote {target}")
        if to == "mednext" and found.size:
            settings.write_model_settings(
                target, {k: earlier[k] for k in KEPT if k in earlier} | has | {"converted_from": Path(source).name}
            )
            print(f"wrote {settings.settings_file(target)}: spacing and patch are as published, unless you add others")
        elif to == "mednext":
            print(f"no row of the table of sizes: build it with MedNeXt(**{found.arguments()})")
    except OSError as e:
        raise UserError(f"{target} cannot be written ({e.strerror}); give another --target.") from e


def _recognise(state: checkpoints.State, source: str) -> Architecture:
    found = Architecture.of(shapes(state))
    try:
        network = build(found) if found else None
    except ValueError as e:  # for example an even kernel
        raise UserError(f"{source} holds no MedNeXt that can be built: {e}") from e
    if network is None:
        raise UserError(f"{source} holds {describe(shapes(state))}.")
    checkpoints.check_fits(state, network, source)
    return found


def _check_other_side(found: Architecture, to: str, source: str) -> None:
    if to == "mic-dkfz" and "paper" not in found.layouts:
        raise UserError(f"{source} holds {found}, which MIC-DKFZ/MedNeXt cannot build: its down blocks are others.")
    if to == "monai" and ("monai" not in found.layouts or found.kernel_size is None):
        raise UserError(
            f"{source} holds {found}, which MONAI's MedNeXt cannot build: that has one kernel for all blocks, and down"
            " blocks without GRN that take the expansion ratio of the stage before them; of the paper's it fits S."
        )
