"""Weights of any MedNeXt: what a file holds, the names that others give the same tensors, whether they fit a network.

Files come from this bundle, from MIC-DKFZ/MedNeXt (nnU-Net v1's `*.model`), from MONAI's own MedNeXt, bare or inside a
training checkpoint. Inside the bundle there is one set of names, that of `mednext.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..utils.errors import UserError
from ..utils.files import is_intact, sha256, write_whole
from .architecture import Shapes, describe, explain, shapes
from .model_settings import SHA256, check_sha256, write_model_settings

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")  # torch.compile, torch's checkpoint wrapper
HEADS = "out_"  # prefix of the heads, all that a new set of classes changes

MONAI_MODULES = {  # ours -> monai.networks.nets.MedNeXt; stem, bottleneck and out_0 have the same name
    **{f"enc_block_{i}": f"enc_stages.{i}" for i in range(4)},
    **{f"down_{i}": f"down_blocks.{i}" for i in range(4)},
    **{f"up_{i}": f"up_blocks.{3 - i}" for i in range(4)},
    **{f"dec_block_{i}": f"dec_stages.{3 - i}" for i in range(4)},
    **{f"out_{i}": f"out_blocks.{4 - i}" for i in range(1, 5)},
}
MONAI_PARAMETERS = {"grn_beta": "global_resp_beta", "grn_gamma": "global_resp_gamma"}

State = dict[str, torch.Tensor]


class MedNeXtWeights(NamedTuple):
    """A state dict with our names, and the `format` that tells whose names it had: "mednext", "mic-dkfz" or "monai"."""

    state: State
    format: str


def load_checkpoint(path: str | Path) -> dict:
    """Load the dictionary in a file onto the CPU; only tensors, plain values and numpy scalars are accepted.

    Raises:
        UserError: the file is missing, damaged, of another kind, or would have to run code to be read.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the file of weights in it.")
    if not Path(path).is_file():
        raise UserError(f"{path} not found; train first, or name another weights file.")
    if _is_archive(path) and not is_intact(path):
        raise UserError(f"{path} is not a readable weights file (its own checksums differ); copy or train it again.")
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.serialization.safe_globals(_numpy_scalars()))
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises pickle, zip, runtime and end-of-file errors here
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        if foreign and foreign[1].startswith("numpy") and not _numpy_scalars():
            raise UserError(f"{path} holds numpy's numbers beside the weights; to read it, pip install numpy") from e
        if foreign:
            raise UserError(
                f"{path} holds a {foreign[1]} object, and reading that could run code of the file's choice; save the"
                " weights alone, torch.save(network.state_dict(), ..), where they come from."
            ) from e
        if "TorchScript" in str(e):
            raise UserError(f"{path} is a TorchScript program; give the weights that it was made from.") from e
        raise UserError(
            f"{path} is not a readable weights file (torch.load: {type(e).__name__}); copy or train it again."
        ) from e
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a state dict.")
    return dict(content)


def _is_archive(path: str | Path) -> bool:
    with open(path, "rb") as stream:  # as torch.load tells it from what torch wrote before 1.6
        return stream.read(4) == b"PK\x03\x04"


def _numpy_scalars() -> list:
    """Return the numpy types that nnU-Net v1 writes beside the weights, in its loss curves."""
    try:
        import numpy as np
    except ImportError:  # the network needs torch alone; such a file is then refused
        return []
    scalar = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "bool")]
    return [*names, np.dtype, *kinds]


def save_checkpoint(content: dict, path: str | Path) -> None:
    """Write a file of weights, whole or not at all."""
    write_whole(path, lambda partial: torch.save(content, partial))


def save_weights(content: dict, path: str | Path, settings: dict) -> None:
    """Write a file of weights with its settings and its SHA-256 beside it.

    The settings appear first, and name the weights that are about to be replaced as well: whoever is stopped between
    the two files leaves weights that load.
    """
    before = [sha256(path)] if Path(path).is_file() else []

    def write(partial: Path) -> None:
        torch.save(content, partial)
        write_model_settings(path, settings | dict(zip(SHA256, [sha256(partial), *before], strict=False)))

    write_whole(path, write)


def read_weights(path: str | Path) -> MedNeXtWeights:
    """Read the weights in a file, bare or inside a training checkpoint, and give them our names.

    Raises:
        UserError: as from `load_checkpoint`, `check_sha256` and `translate`, or the file holds several networks.
    """
    content = load_checkpoint(path)
    check_sha256(path)
    nested = {key: part for key, part in content.items() if isinstance(part, Mapping) and _stems(part)}
    if len(nested) > 1:
        raise UserError(f"{path} holds several networks, {', '.join(map(str, nested))}; save the one you want alone.")
    return translate(next(iter(nested.values()), content), path)


def _stems(state: Mapping) -> list[str]:
    return [key for key in map(str, state) if key == "stem.weight" or key.endswith(".stem.weight")]


def translate(state: Mapping[str, torch.Tensor], source: str | Path) -> MedNeXtWeights:
    """Give the tensors of any MedNeXt's state dict our names.

    Prefixes that wrappers put before every name, whatever they are, and the original's `dummy_tensor` are removed.

    Args:
        state: the tensors by their foreign names.
        source: names `state` in messages.

    Raises:
        UserError: it holds no or several MedNeXts, something that is no tensor, or two tensors of one name.
    """
    entries, state = len(state), {WRAPPERS.sub("", str(key)): value for key, value in state.items()}
    stems = _stems(state)
    if len(stems) != 1:
        found = f"{len(stems)} networks ({', '.join(stems)})" if stems else "no MedNeXt"
        keys = "" if stems else f": its first names are {', '.join(list(state)[:3]) or 'none'}"
        raise UserError(f"{source} holds {found}{keys}; expected the state dict of one MedNeXt.")
    prefix = stems[0].removesuffix("stem.weight")
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    if others := [key for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"{source} holds {', '.join(others)} among its weights; expected tensors alone.")
    if len(state) != entries:
        raise UserError(f"{source} holds {entries} tensors under {len(state)} names without their prefixes.")
    check_finite(state, source)
    if "dummy_tensor" in state:
        return MedNeXtWeights({key: value for key, value in state.items() if key != "dummy_tensor"}, "mic-dkfz")
    if any(key.startswith("enc_stages.") for key in state):
        modules = {theirs: ours for ours, theirs in MONAI_MODULES.items()}
        parameters = {theirs: ours for ours, theirs in MONAI_PARAMETERS.items()}
        return MedNeXtWeights({_renamed(key, modules, parameters): value for key, value in state.items()}, "monai")
    return MedNeXtWeights(state, "mednext")


def to_mic_dkfz(state: State) -> dict:
    """Make nnU-Net v1's dictionary, its curves empty, which the original loads strictly to predict or to train on."""
    return {
        "epoch": 0,
        "state_dict": {**state, "dummy_tensor": torch.ones(1)},
        "optimizer_state_dict": None,
        "lr_scheduler_state_dict": None,
        "plot_stuff": ([], [], [], []),
        "best_stuff": (None, None, None),
    }


def to_monai(state: State) -> dict:
    """Make the state dict that monai.networks.nets.MedNeXt loads strictly."""
    return {_renamed(key, MONAI_MODULES, MONAI_PARAMETERS): value for key, value in state.items()}


def _renamed(key: str, modules: Mapping[str, str], parameters: Mapping[str, str]) -> str:
    module = next((name for name in modules if key.startswith(f"{name}.")), None)
    if module is not None:
        key = modules[module] + key.removeprefix(module)
    start, _, last = key.rpartition(".")
    return f"{start}.{parameters[last]}" if last in parameters else key


def not_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """Name the first tensor that holds NaN or infinity; one on the meta device holds nothing."""
    return next((name for name, value in state.items() if not (value.is_meta or torch.isfinite(value).all())), None)


def check_finite(state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Check that all weights are numbers; `source` names them in the message.

    Raises:
        UserError: some are NaN or infinite, which a training that diverged leaves.
    """
    if name := not_finite(state):
        raise UserError(
            f"{source} holds NaN or infinity in {name}; expected finite weights: take those of an earlier checkpoint,"
            " or train again with a smaller --learning_rate."
        )


def check_weights(path: str | Path, network: nn.Module) -> None:
    """Check that a file is whole, and a plain state dict with the names and shapes of `network`, a MedNeXt or not.

    Raises:
        UserError: it is not; for weights of another implementation the message has the command that converts them.
    """
    content = load_checkpoint(path)
    check_sha256(path)
    plain = all(isinstance(value, torch.Tensor) for value in content.values())
    if plain:
        check_finite(content, path)
    if plain and not differences(shapes(content), shapes(network.state_dict())):
        return
    weights = read_weights(path)
    if weights.state.keys() != content.keys():
        raise UserError(
            f"{path} is not a plain state dict of this bundle; convert it first:"
            f" python -m scripts convert_weights --source {path} --target models/NAME.pt"
        )
    check_fits(weights.state, network, path)


def check_fits(state: Mapping[str, torch.Tensor], network: nn.Module, source: str | Path) -> None:
    """Check that `state` has the names and shapes of `network`; `source` names it in the message.

    Raises:
        UserError: they differ; the message says which two networks these are, and lists the tensors.
    """
    found, wanted = shapes(state), shapes(network.state_dict())
    if different := differences(found, wanted):
        raise mismatch(source, found, wanted, different)


def mismatch(source: str | Path, found: Shapes, wanted: Shapes, different: str) -> UserError:
    """Make the error for weights of another network than the one they are for; `different` lists the tensors."""
    said, asked, reason = describe(found), describe(wanted), explain(found, wanted)
    if said == asked and not reason:
        return UserError(f"{source} is not a whole {said}. Tensors {different}. Copy or save it again.")
    return UserError(
        f"{source} holds {said}, but the network is {asked}. {reason}Tensors {different}."
        " Give weights of that network, or the size, kernel and data of these weights."
    )


def differences(found: Shapes, wanted: Shapes) -> str:
    """List the names without a partner on the other side, whole modules as `module.*`, and six of another shape.

    The text is empty where both sides have the same names and shapes.
    """
    others = [
        f"{k} ({list(found[k])} instead of {list(wanted[k])})" for k in found if k in wanted and found[k] != wanted[k]
    ]
    parts = {
        "that only the file has": _named([k for k in found if k not in wanted], found),
        "that the file lacks": _named([k for k in wanted if k not in found], wanted),
        "of another shape": others[:6] + [f"and {len(others) - 6} more"] * (len(others) > 6),
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _named(keys: list[str], among: Iterable[str]) -> list[str]:
    def module(key: str) -> str:  # down_0.conv1.weight -> down_0, bottleneck.1.grn_beta -> bottleneck.1
        found = re.match(r"[^.]*(\.\d+(?=\.))?", key)
        assert found is not None  # the pattern matches the empty text, too
        return found[0]

    names: list[str] = []
    for name, group in groupby(sorted(keys, key=module), key=module):
        members = list(group)
        whole = len(members) > 1 and len(members) == sum(module(key) == name for key in among)
        names += [f"{name}.* ({len(members)})"] if whole else members
    return names
