"""Turns away what would waste a night: every file of a training run is read once before it starts.

One function a check; each raises a UserError that names the file, both values and the fix.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from .data import image_files, workers
from .errors import UserError
from .mednext import KERNEL_SIZES, SIZES
from .nifti import read

AFFINE_TOLERANCE = 1e-3  # in rotation and spacing: what tools leave behind when they rewrite a header
ORIGIN_TOLERANCE = 0.1  # of the smallest spacing

logger = logging.getLogger("mednext")


def check_settings(
    size: str, kernel_size: int, patch_size: Sequence[int], spacing: Sequence[float], switches: Mapping[str, object]
) -> None:
    """The control panel's own values; `switches` are those that are on or off, by name.

    Raises:
        UserError: a value that no network or grid can have.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):  # the command line reads "false" as a text, which counts as on
            raise UserError(f"{name} is {value!r}; expected True or False: give --{name} False, with a capital letter.")
    if size not in SIZES:
        raise UserError(f"size is {size!r}; expected one of {', '.join(SIZES)}: give --size S, for example.")
    if kernel_size not in KERNEL_SIZES:
        raise UserError(f"kernel_size is {kernel_size!r}; expected one of {', '.join(map(str, KERNEL_SIZES))}.")
    if len(patch_size) != 3 or min(patch_size) < 16 or max(patch_size) <= 16 or any(n % 16 for n in patch_size):
        raise UserError(
            f"patch_size is {list(patch_size)}; expected three multiples of 16 voxels with at least one over 16,"
            ' for example --patch_size "[48,64,48]".'
        )
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise UserError(f"spacing is {list(spacing)} mm; expected three positive lengths, for example [1.0, 1.0, 1.0].")


def check_image(paths: Sequence[str], channels: int) -> nib.Nifti1Image:
    """One case's image files: readable, finite, on one grid, with the expected channels. Returns the first."""
    first, total = None, 0
    for path in paths:
        image, voxels = read(path)
        if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
            raise UserError(
                f"{path} has {int((~np.isfinite(voxels)).sum())} NaN or infinite voxels; expected finite intensities:"
                " repair the file."
            )
        if voxels.ndim not in (3, 4):
            raise UserError(f"{path} has the shape {voxels.shape}; expected a 3D scan, or 4D with the channels last.")
        first = first or image
        _check_same_grid(path, image, paths[0], first)
        total += voxels.shape[3] if voxels.ndim == 4 else 1
    if total != channels:
        raise UserError(
            f"{paths[0]} and its case have {total} channels; dataset.json names {channels}: correct either."
        )
    return first


def check_label(path: str, image_path: str, image: nib.Nifti1Image, classes: int) -> None:
    """A label file against its image and the labels that dataset.json names."""
    label, voxels = read(path)
    _check_same_grid(path, label, image_path, image)
    slope, intercept = label.dataobj.slope, label.dataobj.inter
    found = np.unique(voxels) * slope + intercept
    unexpected = (
        [v for v in found if not (abs(v - round(v)) < 1e-3 and 0 <= round(v) < classes)]
        if np.isfinite(found).all()
        else found
    )
    if len(unexpected):
        shown = ", ".join(f"{v:g}" for v in unexpected[:5])
        raise UserError(
            f"{path} has the label value {shown}; dataset.json names 0 to {classes - 1}:"
            " correct the file or dataset.json."
        )


def _check_same_grid(path: str, one: nib.Nifti1Image, other_path: str, other: nib.Nifti1Image) -> None:
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


def check_case(case: dict, channels: int, classes: int) -> tuple[int, ...]:
    """All checks of one case; returns its extent in mm and leaves nothing in memory."""
    paths = image_files(case)
    image = check_image(paths, channels)
    check_label(case["label"], paths[0], image, classes)
    return tuple(round(n * s) for n, s in zip(image.shape[:3], image.header.get_zooms()[:3], strict=True))


def check_cases(
    items: Sequence[dict], channels: int, classes: int, patch_size: Sequence[int], spacing: Sequence[float], memory: str
) -> None:
    """Reads every file of `items`, except those that passed before and have not changed since.

    Args:
        items: cases with "image" and "label".
        channels: image channels that dataset.json names.
        classes: labels that dataset.json names, background included.
        patch_size: training patch in voxels; scans smaller than it are padded, which a warning mentions.
        spacing: training grid in mm.
        memory: JSON file that remembers what passed, by size and modification time.

    Raises:
        UserError: one sentence for each bad case.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        _check_cases(items, channels, classes, patch_size, spacing, Path(memory))
    if dist.is_initialized():
        dist.barrier()


def _check_cases(items, channels, classes, patch_size, spacing, memory) -> None:
    remembered = json.loads(memory.read_text()) if memory.is_file() else {}
    signatures = {case["label"]: _signature(case, channels, classes) for case in items}
    pending = [
        case for case in items if remembered.get(case["label"], {}).get("signature") != signatures[case["label"]]
    ]

    def attempt(case: dict) -> tuple[dict, tuple[int, ...] | UserError]:
        try:
            return case, check_case(case, channels, classes)
        except UserError as e:
            return case, e

    faults = []
    with ThreadPoolExecutor(workers() + 1) as pool:
        for case, result in tqdm(pool.map(attempt, pending), total=len(pending), desc="checking", disable=not pending):
            if isinstance(result, UserError):
                faults.append(str(result))
            else:
                remembered[case["label"]] = {"signature": signatures[case["label"]], "extent_mm": result}
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(remembered))
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(f"{len(faults)} of {len(items)} cases cannot be used:\n  " + "\n  ".join(faults))
    _warn_of_small_scans([remembered[case["label"]]["extent_mm"] for case in items], patch_size, spacing)


def _signature(case: dict, channels: int, classes: int) -> list:
    states = [(p, Path(p).stat()) for p in (*image_files(case), case["label"]) if Path(p).exists()]
    return [channels, classes, *([p, s.st_size, s.st_mtime_ns] for p, s in states)]


def _warn_of_small_scans(
    extents: Sequence[Sequence[float]], patch_size: Sequence[int], spacing: Sequence[float]
) -> None:
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
