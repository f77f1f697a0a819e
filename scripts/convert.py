"""Weights from one implementation to another: `python -m scripts.convert --source FILE --target models/model.pt`."""

from __future__ import annotations

from pathlib import Path

from . import checkpoints, settings
from .architecture import Architecture, build, describe, shapes
from .errors import UserError, command

FORMATS = {"mednext": "this bundle", "mic-dkfz": "MIC-DKFZ/MedNeXt", "monai": "MONAI"}
EXPORT = {"mednext": dict, "mic-dkfz": checkpoints.to_mic_dkfz, "monai": checkpoints.to_monai}
COARSE_HEADS = tuple(f"{checkpoints.HEADS}{level}." for level in range(1, 5))


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
    weights = checkpoints.read(source)
    state, found = weights.state, Architecture.of(shapes(weights.state))
    if found is None or not found.layouts:
        raise UserError(
            f"{source} holds {describe(shapes(state))}, whose blocks follow none of the layouts paper, v2, monai."
        )
    checkpoints.compare(state, build(found), source)
    print(f"{source}: {found}; names of {FORMATS[weights.format]}")

    asked = {
        "size": size,
        "kernel_size": kernel_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "deep_supervision": deep_supervision,
    }
    earlier = settings.read(target) if to == "mednext" else {}
    wanted = {key: earlier.get(key) if value is None else value for key, value in asked.items()}
    if wanted["deep_supervision"] is False and found.deep_supervision:
        state = {key: value for key, value in state.items() if not key.startswith(COARSE_HEADS)}
        found = found._replace(deep_supervision=False)
        print("left out: the heads of the four coarser resolutions")
    has = {
        "size": found.size,
        "kernel_size": found.enc_kernel_size,
        "in_channels": found.in_channels,
        "out_channels": found.n_classes,
        "deep_supervision": found.deep_supervision,
    }
    wrong = [f"{key} {has[key]} instead of {value}" for key, value in wanted.items() if value not in (None, has[key])]
    if wrong:
        raise UserError(f"{source} holds {found}: {', '.join(wrong)}; give other weights or other settings.")

    if to == "mic-dkfz" and "paper" not in found.layouts:
        raise UserError(f"{source} holds {found}, which MIC-DKFZ/MedNeXt cannot build: its down blocks are others.")
    if to == "monai" and ("monai" not in found.layouts or found.enc_kernel_size != found.dec_kernel_size):
        raise UserError(
            f"{source} holds {found}, which MONAI's MedNeXt cannot build: that has one kernel for all blocks, and down"
            " blocks without GRN that take the expansion ratio of the stage before them; of the paper's it fits S."
        )
    checkpoints.save(EXPORT[to](state), target)
    print(f"wrote {target}")
    if to == "mednext" and found.size is None:
        print(f"no row of the table of sizes: build it with MedNeXt(**{found.arguments()})")
    elif to == "mednext":
        settings.write(target, {**earlier, **has, "converted_from": Path(source).name})
        print(
            f"wrote {settings.settings_file(target)}: spacing and patch are the published ones, unless you add others"
        )


if __name__ == "__main__":
    command(convert)
