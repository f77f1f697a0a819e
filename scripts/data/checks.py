"""Turns away what would waste a night: settings and single files. One function a check.

What makes a training impossible is a UserError that names the file, both values and the fix; what a person should look
at in the data set as a whole is in review.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import nibabel as nib
import numpy as np

from ..mednext import KERNEL_SIZES, SIZES
from ..utils.errors import UserError

AFFINE_TOLERANCE = 1e-3  # in rotation and spacing: what tools leave behind when they rewrite a header
ORIGIN_TOLERANCE = 0.1  # of the smallest spacing

logger = logging.getLogger("mednext")


def check_settings(
    size: str,
    kernel_size: int,
    dim: str,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    switches: Mapping[str, object],
    channels: Sequence[str],
    labels: Sequence[str],
    label_values: Sequence[int],
    regions: Mapping[str, Sequence[int]] | None = None,
    trained: Mapping[str, object] | None = None,
    planned_for: Mapping[str, object] | None = None,
    recipe: Mapping[str, object] | None = None,
) -> None:
    """The control panel's own values.

    Args:
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        dim: "2d" or "3d".
        patch_size: voxels; in 2D one along the last axis.
        spacing: mm.
        switches: what is on or off, by name.
        channels: names of the data set's channels.
        labels: names of the network's channels, see labels.py.
        label_values: values in its label files.
        regions: the values of each region, or None.
        trained: what the weights that are scored were trained with, see settings.py.
        planned_for: what a plan overlay says it was made for, see plan.py.
        recipe: "name", "channels", "labels", "label_values" and "needs_plan" of a published data set's overlay.

    Raises:
        UserError: a value that no network or grid can have; weights, a plan or a recipe of other labels or channels; a
            recipe without the plan that it needs.
    """
    planning = "python -m monai.bundle run planning --config_file configs/plan.json --dataset_dir FOLDER"
    described = {"channels": list(channels), "labels": list(labels), "label_values": list(label_values)}
    for name, found in described.items():
        if planned_for and name in planned_for and list(planned_for[name]) != found:
            raise UserError(
                f"the plan is for the {name} {list(planned_for[name])}, the data set has {found}; plan this data set:"
                f" {planning}"
            )
        if recipe and list(recipe[name]) != found:
            raise UserError(
                f"the recipe {recipe['name']} is for the {name} {list(recipe[name])}, the data set has {found};"
                " write dataset.json as docs/how-to/datasets.md says, or leave the recipe out."
            )
    for name, found in {**described, "regions": regions}.items() if trained and trained["labels"] else ():
        if trained.get(name, found) != found:
            raise UserError(
                f"the weights were trained for the {name} {trained[name]}, the data set has {found}; score them on data"
                " with their labels, or correct dataset.json."
            )
    if recipe and recipe["needs_plan"] and planned_for is None:
        raise UserError(
            f"the recipe {recipe['name']} takes its intensities from a plan; make one ({planning}) and give"
            " --config_file \"['configs/train.json','plan.json','RECIPE']\"."
        )
    for name, value in switches.items():
        if not isinstance(value, bool):  # the command line reads "false" as a text, which counts as on
            raise UserError(f"{name} is {value!r}; expected True or False: give --{name} False, with a capital letter.")
    if size not in SIZES:
        raise UserError(f"size is {size!r}; expected one of {', '.join(SIZES)}: give --size S, for example.")
    if kernel_size not in KERNEL_SIZES:
        raise UserError(f"kernel_size is {kernel_size!r}; expected one of {', '.join(map(str, KERNEL_SIZES))}.")
    if dim not in ("2d", "3d"):
        raise UserError(f"dim is {dim!r}; expected 2d or 3d.")
    sides, flat = (patch_size[:2], patch_size[2:] == [1]) if dim == "2d" else (patch_size, True)
    if not flat or len(patch_size) != 3 or min(sides) < 16 or max(sides) <= 16 or any(n % 16 for n in sides):
        wanted = "two multiples of 16 voxels and 1" if dim == "2d" else "three multiples of 16 voxels"
        example = "[512,512,1]" if dim == "2d" else "[48,64,48]"
        raise UserError(
            f"patch_size is {list(patch_size)}; expected {wanted} with at least one over 16, for example --patch_size"
            f' "{example}".'
        )
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise UserError(f"spacing is {list(spacing)} mm; expected three positive lengths, for example [1.0, 1.0, 1.0].")


def check_image(path: str, voxels: np.ndarray) -> None:
    """One image file's voxels: finite, and those of a scan or of several channels."""
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        raise UserError(
            f"{path} has {int((~np.isfinite(voxels)).sum())} NaN or infinite voxels; expected finite intensities:"
            " repair the file."
        )
    if voxels.ndim not in (3, 4):
        raise UserError(f"{path} has the shape {voxels.shape}; expected a 3D scan, or 4D with the channels last.")


def check_label(path: str, label: nib.Nifti1Image, voxels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """A label file's stored voxels against the values that dataset.json names; returns each one's place in `values`."""
    stored = np.unique(np.concatenate([np.unique(plane) for plane in voxels]))  # whole volumes would be sorted in int64
    found = stored * label.dataobj.slope + label.dataobj.inter
    unexpected = (
        [v for v in found if not (abs(v - round(v)) < 1e-3 and round(v) in values)]
        if np.isfinite(found).all()
        else found
    )
    closed = list(values) == list(range(len(values)))
    if len(unexpected):
        shown = ", ".join(f"{v:g}" for v in unexpected[:5])
        named = f"0 to {len(values) - 1}" if closed else ", ".join(map(str, values))
        raise UserError(
            f"{path} has the label value {shown}; dataset.json names {named}: correct the file or dataset.json."
        )
    plain = (label.dataobj.slope, label.dataobj.inter) == (1.0, 0.0) and np.issubdtype(voxels.dtype, np.integer)
    integers = voxels if plain else np.rint(voxels * label.dataobj.slope + label.dataobj.inter).astype(np.int16)
    if closed:
        return integers
    index = np.zeros(values[-1] + 1, np.int16)
    index[list(values)] = np.arange(len(values))
    return index[integers]


def check_same_grid(path: str, one: nib.Nifti1Image, other_path: str, other: nib.Nifti1Image) -> None:
    """Two files of one case: the same voxels at the same place."""
    if one.shape[:3] != other.shape[:3]:
        raise UserError(
            f"{path} has {one.shape[:3]} voxels but {other_path} has {other.shape[:3]}; export them on one grid."
        )
    difference = np.abs(one.affine - other.affine)
    spacing = min(other.header.get_zooms()[:3])
    if difference[:3, :3].max() > AFFINE_TOLERANCE or difference[:3, 3].max() > ORIGIN_TOLERANCE * spacing:
        raise UserError(
            f"{path} lies elsewhere than {other_path}: affine {np.round(one.affine[:3], 4).tolist()} against"
            f" {np.round(other.affine[:3], 4).tolist()}; export them on one grid or copy the right header."
        )


def warn_of_small_scans(records: Sequence[dict], patch_size: Sequence[int], spacing: Sequence[float]) -> None:
    """Says how much of the training patch is padding where that is most of it."""
    extents = [np.multiply(record["shape"], record["spacing"]) for record in records]
    voxels = np.array(extents) / np.array(spacing)
    share = np.prod(np.minimum(voxels, patch_size), axis=1) / np.prod(patch_size)
    if len(share) and np.median(share) < 0.5:
        logger.warning(
            "scans fill only %.0f %% of the %s patch (median extent %s voxels at %s mm); the rest is padding:"
            ' consider a smaller --patch_size, for example "%s".',
            100 * np.median(share),
            list(patch_size),
            np.median(voxels, axis=0).round().astype(int).tolist(),
            list(spacing),
            (np.maximum(np.ceil(np.median(voxels, axis=0) / 16), 1).astype(int) * 16).tolist(),
        )
