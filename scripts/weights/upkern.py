"""UpKern: a network with large kernels starts from one trained with small kernels (Roy et al. 2023).

Every tensor is copied; those whose space differs, the depthwise kernels, are interpolated linearly onto the larger one,
as in MIC-DKFZ/MedNeXt's `upkern_load_weights`. Which is which is decided by shape. With equal kernels it is a plain
start from pretrained weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.errors import UserError
from .architecture import shapes
from .checkpoints import HEADS, differences, mismatch, read_weights, translate
from .model_settings import read_model_settings

logger = logging.getLogger("mednext")

LINEAR = {4: "bilinear", 5: "trilinear"}  # by the number of axes of a convolution's weight


class Report(NamedTuple):
    """Names of the tensors that were copied, resized (with both shapes) and left as they were."""

    copied: list[str]
    resized: dict[str, tuple[torch.Size, torch.Size]]
    skipped: list[str]

    def __str__(self) -> str:
        kernels = sorted({f"{a[-1]} to {b[-1]}" for a, b in self.resized.values()})
        resized = f"{len(self.resized)} resized from kernel {', '.join(kernels)}" if kernels else "none resized"
        skipped = f", {len(self.skipped)} left as they were ({', '.join(self.skipped)})" if self.skipped else ""
        return f"{len(self.copied)} tensors copied, {resized}{skipped}"


def transfer(
    network: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path, skip: str | Iterable[str] = ()
) -> Report:
    """Load `state` (our names) into `network`, resizing kernels; the network is untouched where anything does not fit.

    Args:
        network: what is to start from it.
        state: the weights of the other network.
        source: names `state` in messages.
        skip: prefixes of names that keep the network's own values, for example "out_" for new classes.

    Raises:
        UserError: a tensor on either side has no partner, or one that differs in more than its kernel; or nothing has a
            name that starts with an entry of `skip`.
    """
    own, resized, copied = network.state_dict(), {}, []
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if unknown := [prefix for prefix in skip if not prefix or not any(key.startswith(prefix) for key in own)]:
        raise UserError(f"no tensor's name starts with {unknown[0]!r}, which is to be skipped.")
    skipped = [key for key in own if key.startswith(skip)]
    fitted = {key: value for key, value in state.items() if not key.startswith(skip)}
    for key, value in fitted.items():
        if key not in own or value.shape == own[key].shape:
            copied.append(key)
        elif value.shape[:2] == own[key].shape[:2] and value.dim() == own[key].dim() and value.dim() in LINEAR:
            resized[key] = (value.shape, own[key].shape)
            fitted[key] = F.interpolate(value, size=own[key].shape[2:], mode=LINEAR[value.dim()])
    wanted = {key: value.shape for key, value in own.items() if key not in skipped}
    if different := differences(shapes(fitted), wanted):
        raise mismatch(source, shapes(state), shapes(own), different)
    network.load_state_dict({**fitted, **{key: own[key] for key in skipped}})
    return Report(copied, resized, skipped)


def start_from(
    network: nn.Module,
    path: str | Path | None,
    skip_heads: bool = False,
    resume: bool = False,
    fold: int | str | None = None,
) -> None:
    """Start `network` from the weights in a file, whoever wrote it; the setting `init_weights` comes here.

    Args:
        network: what is to start from it.
        path: the file; with None nothing happens.
        skip_heads: keep the network's own heads, for other classes.
        resume: nothing happens, since the checkpoint of the run that goes on has all weights.
        fold: the fold that is held out now; a file whose settings name another one is warned of.

    Raises:
        UserError: the file cannot be read or does not fit, or `skip_heads` without a file.
    """
    if skip_heads and path is None:
        raise UserError("skip_heads is True without init_weights; give the weights to start from: --init_weights FILE.")
    if path is None or resume:
        return
    report = transfer(network, read_weights(path).state, path, (HEADS,) if skip_heads else ())
    logger.info("starting from %s: %s", path, report)
    theirs = read_model_settings(path).get("fold")
    if None not in (theirs, fold) and theirs != fold:
        logger.warning(
            "%s was trained on fold %s, this is fold %s: if they are folds of one data set, it has seen the cases that"
            " are held out here; start from the weights of the same fold.", path, theirs, fold,
        )  # fmt: skip


def upkern_load_weights(network: nn.Module, pretrained_net: nn.Module, skip: str | Iterable[str] = ()) -> nn.Module:
    """Return `network` with the weights of `pretrained_net`, a network of smaller kernels, as the original's function.

    Where the two do not have the same names, `pretrained_net` is taken for a MedNeXt of any of the known forms. Other
    than in the original, a tensor without a partner is an error, unless its name starts with an entry of `skip`.

    Raises:
        UserError: the two do not fit; `network` is untouched then.
    """
    source, state = "the pretrained network", pretrained_net.state_dict()
    if state.keys() != network.state_dict().keys():
        state = translate(state, source).state
    report = transfer(network, state, source, skip)
    logger.info("UpKern: %s", report)
    return network
