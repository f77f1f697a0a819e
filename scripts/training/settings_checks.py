"""Checks of settings that would waste a night, one function a check; what they find is a UserError with the fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..data.datasets import Dataset
from ..mednext import KERNEL_SIZES, SIZES
from ..utils.errors import UserError
from ..utils.settings import RENAMED, read_text
from ..weights.model_settings import ModelSettings

PLANNING = "python -m monai.bundle run planning --config_file configs/plan.json --dataset_dir FOLDER"


class Given(NamedTuple):
    """Holds what the checks look at.

    Args:
        data: the data set.
        model: the settings of the network and its grid.
        switches: what is on or off, by name.
        planned_for: what a plan overlay says it was made for, see planning/planner.py; None without a plan.
        recipe: "name", "channels", "labels", "label_values", "needs_plan" of a published data set's overlay, or None.
    """

    data: Dataset
    model: ModelSettings
    switches: Mapping[str, object]
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
        written = found if given.planned_for is None else given.planned_for.get(name, found)
        planned = [read_text(entry) if isinstance(entry, str) else entry for entry in written]
        if given.planned_for is not None and planned != found:
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
                " with their labels, or correct dataset.json."
            )


def check_switches(given: Given) -> None:
    """Refuse what is neither True nor False: the command line reads "false" as a text, which counts as on."""
    for name, value in given.switches.items():
        if not isinstance(value, bool):
            name = RENAMED.get(name, name)
            raise UserError(f"{name} is {value!r}; expected True or False: give --{name} False, with a capital letter.")


def check_network(given: Given) -> None:
    """Refuse a size, kernel or dimension that no network has."""
    model = given.model
    if model.size not in SIZES:
        raise UserError(f"size is {model.size!r}; expected one of {', '.join(SIZES)}: give --size S, for example.")
    if model.kernel_size not in KERNEL_SIZES:
        raise UserError(f"kernel_size is {model.kernel_size!r}; expected one of {', '.join(map(str, KERNEL_SIZES))}.")
    if model.dim not in ("2d", "3d"):
        raise UserError(f"dim is {model.dim!r}; expected 2d or 3d.")


def check_patch_size(given: Given) -> None:
    """Refuse a patch that the network cannot halve four times."""
    patch, flat = list(given.model.patch_size), given.model.dim == "2d"
    sides = patch[:2] if flat else patch
    right = len(patch) == 3 and (not flat or patch[2] == 1)
    if not right or min(sides) < 16 or max(sides) <= 16 or any(n % 16 for n in sides):
        wanted = "two multiples of 16 voxels and 1" if flat else "three multiples of 16 voxels"
        example = "[512,512,1]" if flat else "[48,64,48]"
        raise UserError(
            f'patch_size is {patch}; expected {wanted} with at least one over 16, for example --patch_size "{example}".'
        )


def check_spacing(given: Given) -> None:
    """Refuse a grid without a volume."""
    spacing = list(given.model.spacing)
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UserError(f"spacing is {spacing} mm; expected three positive lengths, for example [1.0, 1.0, 1.0].")


CHECKS: tuple[Callable[[Given], None], ...] = (
    check_plan,
    check_recipe,
    check_labels,
    check_switches,
    check_network,
    check_patch_size,
    check_spacing,
)


def check_settings(
    data: Dataset,
    model: ModelSettings,
    switches: Mapping[str, object],
    planned_for: Mapping | None = None,
    recipe: Mapping | None = None,
) -> None:
    """Run all checks; see `Given` for the arguments.

    Raises:
        UserError: the first thing that is wrong.
    """
    for check in CHECKS:
        check(Given(data, model, switches, planned_for, recipe))
