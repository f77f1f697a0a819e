"""Checks of settings beside a data set, one function a check; what they find is a UserError with the fix.

What a setting may be by itself is said in utils/settings_table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..data.datasets import Dataset
from ..utils.errors import UserError
from ..utils.settings import read_text
from ..weights.model_settings import ModelSettings

PLANNING = "python -m monai.bundle run planning --config_file configs/plan.json --dataset_dir FOLDER"


class Given(NamedTuple):
    """Holds what the checks look at.

    Args:
        data: the data set.
        model: the settings of the network and its grid.
        planned_for: what a plan overlay says it was made for, see planning/planner.py; None without a plan.
        recipe: "name", "channels", "labels", "label_values", "needs_plan" of a published data set's overlay, or None.
    """

    data: Dataset
    model: ModelSettings
    planned_for: Mapping | None = None
    recipe: Mapping | None = None

    @property
    def described(self) -> dict[str, list]:
        """What dataset.json says, by the names that plans and recipes have for it."""
        labels = self.data.labels
        return {"channels": self.data.channels, "labels": labels.names, "label_values": labels.values}


def check_plan(given: Given) -> None:
    """Refuse a plan that was made for other channels or labels."""
    for name, found in given.described.items():
        if given.planned_for is None or name not in given.planned_for:
            continue
        planned = [read_text(entry) if isinstance(entry, str) else entry for entry in given.planned_for[name]]
        if planned != found:
            raise UserError(
                f"the plan is for the {name} {planned}, the data set has {found}; plan this data set: {PLANNING}"
            )


def check_recipe(given: Given) -> None:
    """Refuse a recipe for other channels or labels, and one without the plan that it needs."""
    if given.recipe is None:
        return
    name = given.recipe["name"]
    for key, found in given.described.items():
        if list(given.recipe[key]) != found:
            raise UserError(
                f"the recipe {name} is for the {key} {list(given.recipe[key])}, the data set has {found};"
                " write dataset.json as docs/how-to/datasets.md says, or leave the recipe out."
            )
    if given.recipe["needs_plan"] and given.planned_for is None:
        raise UserError(
            f"the recipe {name} takes its intensities from a plan; make one ({PLANNING}) and give"
            " --config_file \"['configs/train.json','plan.json','RECIPE']\"."
        )


def check_labels(given: Given) -> None:
    """Refuse data with other labels than those the weights were trained for, as far as these are written down."""
    labels = given.data.labels
    for name, found in {"labels": labels.names, "label_values": labels.values, "regions": labels.regions}.items():
        trained = getattr(given.model, name)
        if given.model.labels and trained != found:
            raise UserError(
                f"the weights were trained for the {name} {trained}, the data set has {found}; score them on data"
                " with their labels, give the --ckpt_dir of other weights, or correct dataset.json."
            )


CHECKS: tuple[Callable[[Given], None], ...] = (
    check_plan,
    check_recipe,
    check_labels,
)


def check_settings(
    data: Dataset,
    model: ModelSettings,
    planned_for: Mapping | None = None,
    recipe: Mapping | None = None,
) -> None:
    """Run all checks; see `Given` for the arguments.

    Raises:
        UserError: the first thing that is wrong.
    """
    for check in CHECKS:
        check(Given(data, model, planned_for, recipe))
