"""The training of a coarse network beside another one, which finds for it where in a scan to look."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from monai.bundle import ConfigParser

from ..utils.errors import UserError, first_cause
from ..utils.settings import calling_config, give
from .stopping import leave

FACTOR = 3  # odd, so that the middles of coarse voxels are middles of fine ones, and what is measured there is the same

logger = logging.getLogger("mednext")


def coarse_spacing(spacing: Sequence[float]) -> list[float]:
    """Choose the spacing of the coarse grid: three times the finest edge, and where voxels are longer as they are."""
    return [max(edge, FACTOR * min(spacing)) for edge in spacing]


def train_coarse(settings: Mapping[str, object]) -> None:
    """Train the coarse network, by the configuration that calls this with other values of some settings.

    A training that goes on takes up the coarse one, too, or begins it where there is none.

    Args:
        settings: those values, by their names.

    Raises:
        UserError: what the training finds wrong with them.
    """
    parent = calling_config()
    assert parent is not None, "it stands in a configuration"
    config = ConfigParser(copy.deepcopy(parent.get()))
    give(config, {**settings, "resume": "auto" if parent.get_parsed_content("resume") else False})
    said = " x ".join(f"{edge:g}" for edge in config["spacing"])
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        logger.info("first a coarse network, of a grid of %s mm, into %s", said, config["ckpt_dir"])
    try:
        config.get_parsed_content("initialize")
        trainer = config.get_parsed_content("train#trainer")
        trainer.run()
    except Exception as e:  # which MONAI has wrapped
        if isinstance(cause := first_cause(e), UserError):
            raise UserError(f"the coarse network, whose settings are --coarse#spacing and so on: {cause}") from e
        raise
    leave(trainer)
    if first:
        logger.info("now the network itself, into %s", parent.get_parsed_content("ckpt_dir"))
