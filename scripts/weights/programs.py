"""A network with its weights as one file that other programs run without this bundle."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import Dim

from ..mednext import LEVELS, MedNeXt
from ..utils.errors import UserError
from ..utils.files import check_writable, write_whole
from ..utils.packages import require_package
from .checkpoints import read_weights
from .convert import recognise
from .model_settings import read_model_settings

SETTINGS = "model.json"  # what is known of the weights, by the name that it has beside them
INPUT, OUTPUT = "image", "pred"  # as in configs/metadata.json
STEP = 2**LEVELS


def export_network(source: str, target: str) -> None:
    """Write a network with its weights as a program: TorchScript (.ts), torch.export (.pt2) or ONNX (.onnx).

    Batch and spatial size are free: any size with a side over 16 voxels, for .pt2 multiples of 16 from 32 voxels on.
    The file holds the settings of the weights, too.

    Args:
        source: weights of any MedNeXt, for example `models/model.pt`.
        target: what to write, its ending says which kind; a file that is there is replaced.

    Raises:
        UserError: the weights cannot be read or are no MedNeXt, or `target` has another ending.
    """
    kind = Path(target).suffix
    if kind not in WRITERS:
        raise UserError(f"target is {target!r}; expected a name that ends with one of {', '.join(WRITERS)}.")
    check_writable(Path(target).parent)
    network = _network(source)
    settings = json.dumps(read_model_settings(source), ensure_ascii=False)
    write_whole(target, lambda partial: WRITERS[kind](network, settings, partial))
    print(f"wrote {target}")


def _network(source: str) -> MedNeXt:
    """Build the network that a file of weights belongs to, and load them."""
    state = read_weights(source).state
    network = MedNeXt(**recognise(state, source).arguments())
    network.load_state_dict(state)
    return network.eval()


def _torchscript(network: MedNeXt, settings: str, partial: Path) -> None:
    torch.jit.save(torch.jit.script(network), partial, _extra_files={SETTINGS: settings.encode()})


def _torch_export(network: MedNeXt, settings: str, partial: Path) -> None:
    free = {0: Dim("batch"), **{axis: STEP * Dim(f"side{axis}", min=2) for axis in range(2, network.axes + 2)}}
    program = torch.export.export(network, (_example(network),), dynamic_shapes=(free,))
    with open(partial, "wb") as buffer:
        torch.export.save(program, buffer, extra_files={SETTINGS: settings})


def _onnx(network: MedNeXt, settings: str, partial: Path) -> None:
    onnx = [require_package(name, "an ONNX program") for name in ("onnxscript", "onnx")][1]
    names = ("batch", "channels", *"xyz"[: network.axes])
    logging.getLogger("torch.onnx").setLevel("ERROR")  # or it says what other packages are not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of torch
        program = torch.onnx.export(
            network,
            (_example(network),),
            dynamo=True,
            dynamic_shapes=({axis: name for axis, name in enumerate(names) if name != "channels"},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, {SETTINGS: settings})
    onnx.save(model, partial)


def _example(network: MedNeXt) -> torch.Tensor:
    """Make an image whose batch and sides are not 1 or one step, which torch.export would take for fixed."""
    return torch.zeros(2, network.stem.in_channels, *[STEP * (axis + 2) for axis in range(network.axes)])


WRITERS: dict[str, Callable[[MedNeXt, str, Path], None]] = {".ts": _torchscript, ".pt2": _torch_export, ".onnx": _onnx}
