"""The ensemble: several networks as one, whose probabilities are the mean of theirs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..mednext import MedNeXt
from ..utils.errors import UserError
from ..weights import checkpoints
from ..weights import model_settings as settings
from ..weights.architecture import Architecture, shapes

GRID = (  # what decides the voxels that a network sees and what its channels mean
    "labels",
    "label_values",
    "regions",
    "regions_class_order",
    "in_channels",
    "spacing",
    "intensity",
    "crop_to_nonzero",
    "patch_size",
)


class Ensemble(nn.Module):
    """Networks as one: logits whose probabilities are the mean of the members', as nnU-Net v1 averages folds.

    Since it gives logits, whatever takes a network takes an ensemble. They are computed from logarithms, so that no
    probability becomes 0.

    Args:
        members: map images to logits (N, classes, *space).
        activation: function that turns logits into probabilities: "softmax" or, for regions, "sigmoid".
    """

    def __init__(self, members: Sequence[nn.Module], activation: str) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([member(x).to(x.dtype) for member in self.members])
        if self.activation == "softmax":
            return logits.log_softmax(dim=2).logsumexp(dim=0)
        return F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)


def first(files: str | Sequence[str]) -> str | None:
    """Return the first weights file of the setting `ensemble`, or None where it is empty."""
    return next(iter(expand(files)), None)


def expand(files: str | Sequence[str]) -> list[str]:
    """List the weights files that the setting `ensemble` names, each once.

    Args:
        files: a path, a pattern such as `models/fold_*/model.pt`, or a list of them.

    Raises:
        UserError: a pattern that no file has.
    """
    found: dict[Path, str] = {}
    for pattern in [files] if isinstance(files, str) else files:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob(pattern))
        if not matches:
            raise UserError(f"no file is called {pattern}, which ensemble names; give weights files or a pattern.")
        for match in matches:
            found.setdefault(Path(match).resolve(), match)
    return list(found.values())


def join(
    network: nn.Module,
    weights: str,
    ensemble: str | Sequence[str],
    activation: str,
    fold: int | str | None = None,
) -> nn.Module:
    """Join `network` and those of further weights to an Ensemble, on its device; without further weights return it.

    A member of the same shapes is built like `network`; the size and kernel of another are read off its weights.

    Args:
        network: the member that `weights` belong to; they are loaded elsewhere.
        weights: its file, which may be among those of `ensemble`.
        ensemble: see `expand`.
        activation: as in Ensemble.
        fold: fold of the cases that are scored, which no member may have been trained on; None or "all" where
            other cases are segmented.

    Raises:
        UserError: members of other labels, grids or folds, or files that are no weights of this bundle.
    """
    others = [file for file in expand(ensemble) if Path(file).resolve() != Path(weights).resolve()]
    for file in (weights, *others):
        check_fold(file, fold)
    if not others:
        return network
    for file in others:
        check_alike(file, weights)
    return Ensemble([network, *(member(file, network) for file in others)], activation)


def check_alike(file: str, weights: str) -> None:
    """Check that the settings beside two weights files agree in all of GRID that both name.

    Raises:
        UserError: they do not.
    """
    one, other = settings.read(file), settings.read(weights)
    for name in GRID:
        if name in one and name in other and one[name] != other[name]:
            raise UserError(
                f"{file} and {weights} cannot be averaged: {name} is {one[name]} in the first's settings and"
                f" {other[name]} in the second's; give an ensemble of one data set and plan."
            )


def check_fold(file: str, fold: int | str | None) -> None:
    """Check that the settings beside a weights file do not name another fold than the one that is scored.

    Raises:
        UserError: they do.
    """
    own = settings.read(file).get("fold", fold)
    if fold not in (None, "all") and own != fold:
        raise UserError(
            f"{file} was trained on fold {own}, so it has seen cases of fold {fold}, which is scored; leave it out, or"
            " score cases that no member has seen with --dataset_dir and --fold all."
        )


def member(file: str, network: nn.Module) -> nn.Module:
    """Build the network that a weights file belongs to, with its weights, on the device of `network`.

    Raises:
        UserError: the file holds no weights, or those of a network with other channels or classes.
    """

    def ends(a: Architecture) -> tuple:
        return a.in_channels, a.n_classes, a.dim

    state = checkpoints.load(file)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    own, wanted = (Architecture.of(shapes(found)) for found in (tensors, network.state_dict()))
    if own and wanted and own != wanted and own.layouts and ends(own) == ends(wanted):  # another size, the same task
        built: nn.Module = MedNeXt(**own.arguments())
    else:
        built = copy.deepcopy(network)
    checkpoints.check(file, built)
    built.load_state_dict(state)
    return built.to(next(network.parameters()).device)
