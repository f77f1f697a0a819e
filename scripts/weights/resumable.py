"""What a training run can go on from: its two last checkpoints, of which the newest good one counts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import UserError
from .checkpoints import check_finite, load_checkpoint

NAMES = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and the one before it
NEEDED = {"model", "optimizer", "lr_scheduler", "scaler", "epoch", "best_metric", "best_epoch"}

logger = logging.getLogger("mednext")


class Resumable(NamedTuple):
    """A checkpoint: its file, and what it holds."""

    path: Path
    state: dict[str, Any]


def newest(folder: Path) -> Resumable | None:
    """Read the newest whole and finite checkpoint in `folder`; None where there is no file of one.

    Raises:
        UserError: there are some, and all are damaged or hold numbers that are not finite.
    """
    faults: list[UserError] = []
    for path in (folder / name for name in NAMES if (folder / name).is_file()):
        try:
            state = load_checkpoint(path)
            if missing := sorted(NEEDED - set(state)):
                raise UserError(f"{path} is no checkpoint of a training: it lacks {', '.join(missing)}.")
            check_finite(state["model"], path)
        except UserError as e:
            faults.append(e)
            continue
        if faults:
            logger.warning("%s; taking %s, after epoch %d.", str(faults[0]).rstrip("."), path, state["epoch"])
        return Resumable(path, state)
    if faults:
        raise faults[0]
    return None


def set_aside(folder: Path) -> Path | None:
    """Find the newest of the runs that were set aside in `folder` whose checkpoint is there; return its folder."""
    kept = [path.parent for name in NAMES for path in folder.glob(f"previous/*/training/{name}")]
    return max(kept, default=None)
