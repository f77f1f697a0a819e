"""Cases that a host gives as a list, without a data set: their labels and channels are those of the weights at hand.

MONAI Label, federated clients and workflows in Python set `train#dataset#data` and `validate#dataset#data` and know of
no `dataset_dir`. What a list of files does not say then comes from what is written beside the weights that the training
goes on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from ..utils.settings_names import ABSENT, find, shipped
from .model_settings import BUNDLE_ROOT, read_model_settings, settings_file

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

LISTS = ("train#dataset#data", "validate#dataset#data")
OF_THE_WEIGHTS = (  # settings of a training that those of the weights take the place of, where the host sets none
    *("size", "kernel_size", "spacing", "patch_size", "intensity", "crop_to_nonzero", "mirror_axes"),
    *("iterations", "batch_size", "model#dim", "model#deep_supervision", "model#eval_classes"),
)


def describe(config: ConfigParser) -> bool:
    """Let the weights say what the data set would, where cases are given as lists and no data set is named.

    Args:
        config: a configuration of training or scoring, before anything of it is made.

    Returns:
        Whether anything was changed.

    Raises:
        UserError: nothing is written beside the weights.
    """
    content: Any = config.get()
    defaults = shipped(content)
    given = [name for name in LISTS if _changed(content, defaults, name)]
    if not given or any(_changed(content, defaults, name) for name in ("dataset_dir", "data")):
        return False
    for name in LISTS:  # a list that is not given is empty: there is no data set to take it from
        if name not in given:
            config[name] = []
    scoring = find(content, "model#weights") is not ABSENT
    weights = Path(config.get_parsed_content("model_file") if scoring else _beside(config)).absolute()
    if not settings_file(weights).is_file():
        raise UserError(
            f"{settings_file(weights)} not found, and {given[0]} gives cases without a data set, so that nothing says"
            " what their labels are; give --dataset_dir, or in --ckpt_dir weights with their model.json."
        )
    settings = {"_target_": "scripts.weights.model_settings.load_model_settings", "weights": str(weights)}
    config["data"] = {"_target_": "scripts.data.datasets.GivenCases", "settings": settings}
    config["dataset_dir"] = BUNDLE_ROOT  # of a report; the phantom is not to be made
    if not scoring:
        _take(config, defaults, read_model_settings(weights))
    return True


def _beside(config: ConfigParser) -> str:
    return f"{config.get_parsed_content('ckpt_dir')}/model.pt"


def _changed(content: Mapping, defaults: Mapping, name: str) -> bool:
    value, default = (
        found.replace("#", "::") if isinstance(found, str) else found
        for found in (find(content, name), find(defaults, name))
    )
    return value is not ABSENT and value != default


def _take(config: ConfigParser, defaults: Mapping, written: Mapping[str, Any]) -> None:
    """Set what the weights were trained with where the host leaves the default."""
    content: Any = config.get()
    for name in OF_THE_WEIGHTS:
        value = written.get(name.split("#")[-1])
        if value is not None and not _changed(content, defaults, name):
            config[name] = value
    if not _changed(content, defaults, "fold"):
        config["fold"] = "all"  # none of a data set's folds is held out
