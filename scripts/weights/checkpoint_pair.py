"""The two last checkpoints of a training, of different epochs; the newest good one is what a training goes on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..utils.errors import UserError
from ..utils.files import write_whole
from .checkpoints import check_finite, load_checkpoint

NAMES = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and the one before it
NEEDED = {
    "model": dict,
    "optimizer": dict,
    "lr_scheduler": dict,
    "scaler": dict,
    "epoch": int,
    "best_metric": float,
    "best_epoch": int,
}

logger = logging.getLogger("mednext")


class Checkpoint(NamedTuple):
    """A checkpoint: its file, and what it holds."""

    path: Path
    state: dict[str, Any]


def save_newest(folder: Path, state: dict[str, Any], same_epoch: bool) -> None:
    """Write the newest checkpoint in `folder`.

    Args:
        folder: of the pair.
        state: what it holds.
        same_epoch: whether it takes the place of the newest one, which becomes the one before otherwise.
    """
    newest_file, before = (folder / name for name in NAMES)

    def write(partial: Path) -> None:
        torch.save(state, partial)
        if not same_epoch and newest_file.exists():
            newest_file.replace(before)

    write_whole(newest_file, write)


def newest(folder: Path) -> Checkpoint | None:
    """Read the newest whole and finite checkpoint in `folder`; None where there is no file of one.

    Raises:
        UserError: there are some, and all are damaged or hold numbers that are not finite.
    """
    faults: list[UserError] = []
    for path in (folder / name for name in NAMES if (folder / name).is_file()):
        try:
            state = load_checkpoint(path)
            if lacking := sorted(name for name, kind in NEEDED.items() if not isinstance(state.get(name), kind)):
                raise UserError(f"{path} is no checkpoint of a training: it lacks {', '.join(lacking)}.")
            if others := [name for name, value in state["model"].items() if not isinstance(value, torch.Tensor)]:
                raise UserError(f"{path} is no checkpoint of a training: {others[0]} of its model is no tensor.")
            check_finite(state["model"], path)
        except UserError as e:
            faults.append(e)
            continue
        if faults:
            logger.warning("%s; taking %s, after epoch %d.", str(faults[0]).rstrip("."), path, state["epoch"])
        return Checkpoint(path, state)
    if faults:
        raise faults[0]
    return None


def has_checkpoint(folder: Path) -> bool:
    """Say whether there is a checkpoint in `folder`, good or not."""
    return any((folder / name).is_file() for name in NAMES)


def last_set_aside(folder: Path) -> Path | None:
    """Find the newest of the runs that were set aside in `folder` and have a checkpoint."""
    return max((run for run in folder.glob("previous/*") if has_checkpoint(run / "training")), default=None)
