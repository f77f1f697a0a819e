"""A data set in, settings out: an overlay for `train.json` of plain constants, with the reason of every value.

The rules are nnU-Net's where it has one (fingerprint, intensity schemes, median spacing, batch Dice), on MedNeXt's own
choice of 1 mm and 128 voxels; figures from its sources are named where they stand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.datasets import Dataset
from ..data.grid import record_faults
from ..data.statistics import rounded
from ..utils.errors import UserError, told
from ..utils.files import check_writable, write_text
from ..utils.settings import plain_text
from .costs import alternatives, compare_grids, measure_speed
from .figures import draw_fingerprint
from .fingerprint import dataset_fingerprint
from .fingerprint_file import fingerprint_cases
from .memory import Network, largest_batch
from .spacing import PATCH, PUBLISHED, median_shape, recommended_spacing, target_patch_size, training_grid
from .traits import rotate_range, traits

MASK_BELOW = 0.75  # nnU-Net normalises within the non-zero voxels where cropping leaves less than this of the volume
BY_NAME = {"nonorm": "none", "rescale_to_0_1": "rescale_to_0_1", "rgb_to_0_1": "rgb_to_0_1"}  # of channels
ESTIMATE = "times are estimates for {}, from one small step, without reading data; memory is counted for it"
TWO_STAGES = 4.0  # patches in the median case from which on nnU-Net adds a low resolution, and uses batch Dice


def intensity_schemes(names: Sequence[str], found: dict) -> str | dict | list:
    """Choose each channel's scheme by its name, as nnU-Net v2: CT, noNorm, rescale_to_0_1, rgb_to_0_1, else z-score.

    Args:
        names: of the channels.
        found: see `dataset_fingerprint`.

    Returns:
        One scheme a channel, see preprocessing/intensity.py, or a single one where all are equal.
    """
    masked = found["median_relative_size_after_cropping"] < MASK_BELOW
    schemes: list[str | dict] = []
    for channel, name in enumerate(names):
        values = found["foreground_intensity_properties_per_channel"][str(channel)]
        scheme: str | dict | None = BY_NAME.get(name.lower())
        if name.lower() == "ct" and values:
            clip = [rounded(values[name]) for name in ("percentile_00_5", "percentile_99_5")]
            scheme = {"clip": clip, "mean": rounded(values["mean"]), "std": rounded(values["std"])}
        schemes.append(scheme or ("zscore_nonzero" if masked else "zscore"))
    return schemes[0] if all(scheme == schemes[0] for scheme in schemes) else schemes


def plan_training(
    data: Dataset,
    records: Sequence[dict],
    spacing: str | Sequence[float] = (1.0, 1.0, 1.0),
    size: str = "S",
    kernel_size: int = 3,
    memory_gb: float | None = None,
) -> dict:
    """Return the overlay: settings with their values, and for what they were planned and why.

    Args:
        data: the data set.
        records: its fingerprint, unusable cases left out.
        spacing: of the grid in mm, or "median" or "mixed", see spacing.py.
        size: row of the table of sizes, for the batch alone.
        kernel_size: depthwise kernel, for the batch alone.
        memory_gb: what a training step may take; None leaves batch 2 as published.
    """
    found = dataset_fingerprint(records)
    grid = training_grid(records, spacing)
    shape = median_shape(records, grid)
    patch = target_patch_size(shape, grid)
    settings, reasons = traits(records, data.labels.names, data.labels.index_names)
    patches_in_case = float(np.prod(shape) / np.prod(patch))
    batch, style = 2, None
    if memory_gb is not None:
        network = Network(len(data.channels), len(data.labels.names), size, kernel_size)
        batch, style = largest_batch(patch, network, memory_gb)
    relative = found["median_relative_size_after_cropping"]
    because = {
        "spacing": _why_spacing(records, spacing),
        "crop_to_nonzero": f"if any case has empty borders; the median keeps {100 * relative:.0f} %",
        "intensity": f"channel names {', '.join(data.channels)}; within non-zero voxels if cropping keeps under 75 %",
        "patch_size": f"{PATCH} voxels; the median case has {[round(float(n)) for n in shape]} on this grid",
        "batch_size": "as published" if memory_gb is None else f"what fits {memory_gb} GB in float32",
        "batch_dice": f"nnU-Net's rule, from 4 patches a case on; the median has {patches_in_case:.1f}",
        "rotate_range": "30 degrees; where voxels are over 3 times as thick half a turn, about that axis alone",
        **reasons,
    }
    overlay = {
        "checks#planned_for": {
            "cases": len(records),
            "channels": [plain_text(name) for name in data.channels],  # read by training/settings_checks.py
            "labels": [plain_text(name) for name in data.labels.names],
            "label_values": data.labels.values,
            "because": {name: plain_text(reason) for name, reason in because.items()},
        },
        "crop_to_nonzero": any(record["cropped"] != record["shape"] for record in records),
        "intensity": intensity_schemes(data.channels, found),
        "spacing": grid,
        "patch_size": patch,
        "batch_size": batch,
        "train#batch_dice": patches_in_case >= TWO_STAGES,
        "train#rotate_range": rotate_range(grid),
        **settings,
    }
    if memory_gb is not None:
        overlay["network_def#checkpoint_style"] = style
    return overlay


def _why_spacing(records: Sequence[dict], spacing: str | Sequence[float]) -> str:
    names = {"median": "nnU-Net's median rule", "mixed": "the median; where slices are few, 1 mm or the plane's edge"}
    given = "1 mm as published" if list(spacing) == list(PUBLISHED) else "as asked for"
    advice, reason = recommended_spacing(records)
    said = f"--spacing {advice}" if advice else "1 mm"
    return f"{names.get(str(spacing), given)}; recommended: {said}, since {reason}"


def write_plan(
    dataset_dir: str,
    output: str,
    fingerprint_file: str,
    spacing: str | Sequence[float] = (1.0, 1.0, 1.0),
    size: str = "S",
    kernel_size: int = 3,
    memory_gb: float | None = None,
) -> None:
    """Read every case that is not known yet, and writes the overlay, `fingerprint.json` and `fingerprint.png`.

    Args:
        dataset_dir: a Decathlon or nnU-Net v2 folder.
        output: the overlay to write; the fingerprint lies beside it.
        fingerprint_file: JSON file that remembers what was read.
        spacing: see `plan_training`; so with what follows.
        size: see `plan_training`.
        kernel_size: see `plan_training`.
        memory_gb: see `plan_training`.

    Raises:
        UserError: `output` is there and says something else, no case can be read, or one cannot be on the grid.
    """
    path = Path(output)
    check_writable(path.parent)
    data = Dataset(dataset_dir)
    records = fingerprint_cases(data.cases, len(data.channels), data.labels, fingerprint_file)
    usable = [record for record in records if "error" not in record]
    for record in records:
        if "error" in record:
            print(f"left out: {record['error']}")
    if not usable:
        raise UserError(f"none of the {len(records)} cases of {dataset_dir} can be read; run checking and mend them.")
    if faults := record_faults(usable, training_grid(usable, spacing)):
        raise UserError(told([fault for _, fault in faults], len(usable)))
    overlay = plan_training(data, usable, spacing, size, kernel_size, memory_gb)
    text = json.dumps(overlay, indent=4) + "\n"
    if path.exists() and (path.is_dir() or path.read_bytes() != text.encode()):
        raise UserError(f"{path} exists and is another plan; move it, or give another --output.")
    found = dataset_fingerprint(usable)
    write_text(path.with_name("fingerprint.json"), json.dumps(found, indent=4) + "\n")
    names = data.labels.index_names
    draw_fingerprint(usable, names, data.channels, overlay["spacing"], path.with_name("fingerprint.png"))
    write_text(path, text)
    planned = {key.split("#")[-1]: value for key, value in overlay.items() if not key.endswith("planned_for")}
    print(f"{len(usable)} cases: " + ", ".join(f"{key} {value}" for key, value in planned.items()))
    print(f"wrote {path}, fingerprint.json and fingerprint.png beside it")
    grid, network = overlay["spacing"], Network(len(data.channels), len(data.labels.names), size, kernel_size)
    speed = measure_speed(network)
    print(f"grids ({ESTIMATE.format(speed.where)}):", *compare_grids(usable, network, grid, speed), sep="\n  ")
    print("spacing:", overlay["checks#planned_for"]["because"]["spacing"])
    if others := alternatives(usable, grid, dataset_dir, output, overlay.get("mirror_axes", [0, 1, 2])):
        print("beside it:", *others, sep="\n  ")
