"""Settings by their names: those that were renamed or moved are accepted for one release, with a sentence."""

from __future__ import annotations

import logging
import re
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

SPECIAL = re.compile(r"[\\$@%#]|^_|:(?=:)")  # what MONAI evaluates, looks up or takes for its own in a config
ESCAPED = re.compile(r"\\x([0-9a-f]{2})")

RENAMED = {  # names of 0.6 -> where the value stands now; gone with 0.8
    "upkern_from": "init_weights",
    "keep": "checkpoint_selection",
    "scored": "model#eval_classes",
    "memory": "fingerprint_file",
    "tiles": "window_scheme",
    "skip_heads": "fine_tuning#skip_heads",
    "freeze": "fine_tuning#freeze",
    "layer_decay": "fine_tuning#layer_decay",
    "warmup_epochs": "fine_tuning#warmup_epochs",
    "dim": "model#dim",
    "deep_supervision": "model#deep_supervision",
    "batch_dice": "train#batch_dice",
    "rotate_range": "train#rotate_range",
    "planned_for": "checks#planned_for",
    "recipe": "checks#recipe",
}

OF_THE_WEIGHTS = (  # read from model.json by inference and scoring
    "size",
    "kernel_size",
    "in_channels",
    "out_channels",
    "label_values",
    "regions_class_order",
    "spacing",
    "intensity",
    "crop_to_nonzero",
)

logger = logging.getLogger("mednext")


def plain_text(text: str) -> str:
    r"""Spell text of a data set so that MONAI leaves it alone in a config: `$` becomes `\x24`, and so on.

    `read_text` reads it again. Ordinary text stays as it is.
    """
    return SPECIAL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def read_text(text: str) -> str:
    """Read what `plain_text` spelled."""
    return ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


def is_old_name(name: str) -> bool:
    """Say whether a setting had this name in the release before, or is read from beside the weights now."""
    return name in RENAMED or name in OF_THE_WEIGHTS


def accept_old_names(config: ConfigParser | None = None) -> None:
    """Move the values of settings that were given by their names of the release before to where they stand now.

    It stands first among the steps that a configuration begins with, before anything that it could change is made.

    Args:
        config: the configuration; by default the one whose expression calls this function, which MONAI does not hand
            to expressions.
    """
    config = config or _calling_config()
    content = config.get() if config is not None else None
    if config is None or not isinstance(content, dict):
        return
    old = {name: now for name, now in RENAMED.items() if name in content and now.split("#")[0] in content}
    if "model#weights" in config:
        old |= {name: f"model#{name}" for name in OF_THE_WEIGHTS if content.get(name) is not None}
    for name, now in old.items():
        logger.warning("--%s is called --%s now; the old name is understood until version 0.8.", name, now)
        config[now] = content.pop(name)
    if old:
        config.parse(reset=True)  # what was resolved before may depend on them


def _calling_config() -> ConfigParser | None:
    from monai.bundle import ConfigParser

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), ConfigParser):
            return owner
        frame = frame.f_back
    return None
