"""A data set in, the control panel's constants out: an overlay for `train.json`, with the reason of every value.

The rules are nnU-Net's where it has one (fingerprint, intensity schemes, median spacing, batch Dice), on MedNeXt's own
choice of 1 mm and 128 voxels; figures from its sources are named where they stand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..benchmarks.memory import kept_bytes
from ..data.datasets import channel_names
from ..data.labels import index_names
from ..data.labels import read as read_labels
from ..mednext import create_mednext
from ..utils.errors import UserError
from .figures import fingerprint_page
from .fingerprint import QUANTILES, survey_folder

PATCH = 128  # voxels, as published
STEP = 16  # what the network halves four times
MASK_BELOW = 0.75  # nnU-Net normalises within the non-zero voxels where cropping leaves less than this of the volume
ANISOTROPY = 3.0  # nnU-Net's bound between one thick axis and a grid that is nearly isotropic
TWO_STAGES = 4.0  # patches in the median case from which on nnU-Net adds a low resolution, and uses batch Dice
OPTIMIZER_BYTES = 16  # a float32 parameter with its gradient and AdamW's two moments
MARGIN = 1.2  # of what is kept for the backward pass: what a layer needs while it computes


def fingerprint(records: Sequence[dict]) -> dict:
    """nnU-Net's `dataset_fingerprint.json`: spacings, shapes after cropping, foreground intensities of each channel.

    Every case counts alike, as there; percentiles come from each case's quantiles (see survey.py).
    """
    channels = len(records[0]["foreground"])
    return {
        "spacings": [record["spacing"] for record in records],
        "shapes_after_crop": [record["cropped"] for record in records],
        "foreground_intensity_properties_per_channel": {
            str(c): _pooled([r["foreground"][c] for r in records if r["foreground"][c]]) for c in range(channels)
        },
        "median_relative_size_after_cropping": float(
            np.median([np.prod(record["cropped"]) / np.prod(record["shape"]) for record in records])
        ),
    }


def _pooled(found: Sequence[dict]) -> dict | None:
    if not found:
        return None
    means, deviations = (np.array([f[name] for f in found]) for name in ("mean", "std"))
    quantiles = np.array([f["quantiles"] for f in found])
    values = np.quantile(quantiles, np.linspace(0, 1, 2001))  # where to look at the mean of the cases' distributions
    share = np.mean([np.interp(values, q, QUANTILES) for q in quantiles], axis=0)
    low, median, high = np.interp([0.005, 0.5, 0.995], share, values)
    return {
        "mean": float(means.mean()),
        "median": float(median),
        "std": float(np.sqrt((deviations**2 + means**2).mean() - means.mean() ** 2)),
        "min": min(f["min"] for f in found),
        "max": max(f["max"] for f in found),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }


def target_spacing(records: Sequence[dict]) -> list[float]:
    """nnU-Net's: the median spacing; where one axis is over three times the others and has a third of their voxels, its
    tenth percentile, so that thick slices do not set the grid."""
    spacings, shapes = (np.array([record[name] for record in records]) for name in ("spacing", "cropped"))
    spacing, shape = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != worst]
    if spacing[worst] > ANISOTROPY * spacing[others].max() and shape[worst] * ANISOTROPY < shape[others].min():
        spacing[worst] = max(np.percentile(spacings[:, worst], 10), spacing[others].max())
    return [round(float(s), 4) for s in spacing]


def patch_size(shape: Sequence[float], spacing: Sequence[float]) -> list[int]:
    """128 voxels an axis, more on fine and fewer on coarse axes of an anisotropic grid; no more than the median case.

    Args:
        shape: voxels of the median case on the target grid.
        spacing: mm.
    """
    aspect = np.prod(spacing) ** (1 / 3) / np.array(spacing)
    wanted = np.maximum(np.round(PATCH * aspect / STEP), 1) * STEP
    found = np.minimum(wanted, np.ceil(np.array(shape) / STEP) * STEP)
    if found.max() < 2 * STEP:  # the coarsest level needs two voxels on one axis
        found[int(np.argmax(shape))] = 2 * STEP
    return [int(n) for n in found]


def intensity(names: Sequence[str], found: dict) -> str | list:
    """Each channel's scheme by its name, as in nnU-Net v2: CT, noNorm, rescale_to_0_1, rgb_to_0_1, else z-score."""
    masked = found["median_relative_size_after_cropping"] < MASK_BELOW
    schemes = []
    for channel, name in enumerate(names):
        values = found["foreground_intensity_properties_per_channel"][str(channel)]
        scheme = {"nonorm": "none", "rescale_to_0_1": "rescale_to_0_1", "rgb_to_0_1": "rgb_to_0_1"}.get(name.lower())
        if name.lower() == "ct" and values:
            clip = [round(values[name], 4) for name in ("percentile_00_5", "percentile_99_5")]
            scheme = {"clip": clip, "mean": round(values["mean"], 4), "std": round(values["std"], 4)}
        schemes.append(scheme or ("zscore_nonzero" if masked else "zscore"))
    return schemes[0] if all(scheme == schemes[0] for scheme in schemes) else schemes


def batch(patch: Sequence[int], channels: int, classes: int, size: str, kernel_size: int, gigabytes: float) -> tuple:
    """(patches in a step, checkpoint_style) that fit `gigabytes`, 2 at least as published if recomputing makes room.

    Counted in float32 without computing anything; under autocast less is needed.

    Raises:
        UserError: two patches do not fit even with all blocks computed again.
    """
    styles = (None, "expansion", "block")
    for style in styles:
        with torch.device("meta"):
            network = create_mednext(
                channels, classes, size, kernel_size, deep_supervision=True, checkpoint_style=style
            )
            one = MARGIN * kept_bytes(network, torch.empty(1, channels, *patch))
        fixed = OPTIMIZER_BYTES * sum(p.numel() for p in network.parameters())
        if (fits := int((gigabytes * 1e9 - fixed) // one)) >= 2:
            return fits, style
    raise UserError(
        f"memory_gb is {gigabytes}; MedNeXt {size} needs {(fixed + 2 * one) / 1e9:.1f} GB for two patches of"
        f" {list(patch)} even with every block computed again: give more, a smaller --size, or a coarser --spacing."
    )


def plan(
    dataset_dir: str,
    records: Sequence[dict],
    spacing: str | Sequence[float] = (1.0, 1.0, 1.0),
    size: str = "S",
    kernel_size: int = 3,
    memory_gb: float | None = None,
) -> dict:
    """The overlay: control-panel names with their values, and `planned_for` with what they are for and why.

    Args:
        dataset_dir: the data set.
        records: its survey, errors left out.
        spacing: of the grid in mm, or "median" for nnU-Net's rule.
        size: row of the table of sizes, for the batch alone.
        kernel_size: depthwise kernel, for the batch alone.
        memory_gb: what a training step may take; None leaves batch 2 as published.
    """
    names, labels, found = channel_names(dataset_dir), read_labels(dataset_dir), fingerprint(records)
    grid = target_spacing(records) if spacing == "median" else [float(s) for s in spacing]
    shape = np.median([np.multiply(r["cropped"], r["spacing"]) / grid for r in records], axis=0)
    patch = patch_size(shape, grid)
    shrinks = any(record["cropped"] != record["shape"] for record in records)
    thick = int(np.argmax(grid)) if max(grid) > ANISOTROPY * min(grid) else None
    size_in_patches = float(np.prod(shape) / np.prod(patch))
    patches, style = (
        (2, "published")
        if memory_gb is None
        else batch(patch, len(names), len(labels.names), size, kernel_size, memory_gb)
    )
    relative = found["median_relative_size_after_cropping"]
    overlay = {
        "planned_for": {
            "cases": len(records),
            "channels": names,
            "labels": labels.names,
            "label_values": labels.values,
            "because": {
                "spacing": "nnU-Net's median rule" if spacing == "median" else "1 mm as published, or as asked for",
                "crop_to_nonzero": f"if any case has empty borders; the median keeps {100 * relative:.0f} %",
                "intensity": f"channel names {', '.join(names)}; within non-zero voxels if cropping keeps under 75 %",
                "patch_size": f"{PATCH} voxels; the median case has {[round(float(n)) for n in shape]} on this grid",
                "batch_size": "as published" if memory_gb is None else f"what fits {memory_gb} GB in float32",
                "batch_dice": f"nnU-Net's rule, from 4 patches a case on; the median has {size_in_patches:.1f}",
                "rotate_range": "30 degrees; about the thick axis alone where voxels are over 3 times as thick",
            },
        },
        "crop_to_nonzero": shrinks,
        "intensity": intensity(names, found),
        "spacing": grid,
        "patch_size": patch,
        "batch_size": patches,
        "batch_dice": size_in_patches >= TWO_STAGES,
        "rotate_range": [0.5236 if thick in (None, axis) else 0.0 for axis in range(3)],
    }
    if style != "published":
        overlay["network_def#checkpoint_style"] = style
    return overlay


def planning(
    dataset_dir: str,
    output: str,
    memory: str,
    spacing=(1.0, 1.0, 1.0),
    size: str = "S",
    kernel_size: int = 3,
    memory_gb=None,
) -> None:
    """Reads every case that is not known yet, and writes the overlay, `fingerprint.json` and `fingerprint.png`.

    Args:
        dataset_dir: a Decathlon or nnU-Net v2 folder.
        output: the overlay to write; the fingerprint lies beside it.
        memory: JSON file that remembers what was read, see survey.py.
        spacing: see `plan`; so with what follows.
        size: see `plan`.
        kernel_size: see `plan`.
        memory_gb: see `plan`.

    Raises:
        UserError: `output` is there and says something else, or no case can be read.
    """
    labels = index_names(read_labels(dataset_dir))
    records = survey_folder(dataset_dir, memory)
    usable = [record for record in records if "error" not in record]
    for record in records:
        if "error" in record:
            print(f"left out: {record['error']}")
    if not usable:
        raise UserError(f"none of the {len(records)} cases of {dataset_dir} can be read; run checking and mend them.")
    overlay = plan(dataset_dir, usable, spacing, size, kernel_size, memory_gb)
    path = Path(output)
    text = json.dumps(overlay, indent=4) + "\n"
    if path.exists() and path.read_text() != text:
        raise UserError(f"{path} exists and is another plan; move it, or give another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = fingerprint(usable)
    path.with_name("fingerprint.json").write_text(json.dumps(found, indent=4) + "\n")
    fingerprint_page(usable, labels, overlay["spacing"], path.with_name("fingerprint.png"))
    print(
        f"{len(usable)} cases: " + ", ".join(f"{key} {value}" for key, value in overlay.items() if key != "planned_for")
    )
    print(f"wrote {path}, fingerprint.json and fingerprint.png beside it")
