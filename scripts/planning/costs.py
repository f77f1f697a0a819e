"""What each grid costs: voxels, share of a case that a patch sees, memory and time of training and prediction."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch

from ..data.grid import record_faults
from ..kernels.precision import CpuPrecision
from ..utils.device import amp_kwargs, set_cpu_defaults
from .memory import Network, cpu_step_bytes, step_bytes
from .spacing import ANISOTROPY, BY_NAME, PUBLISHED, STEP, count, median_shape, target_patch_size

ITERATIONS, BATCH = 250, 2  # of an epoch, as published
OVERLAP = 0.5  # of the windows of a prediction
MEASURED = 48  # voxels along each edge of the patch that is timed
IN_PLANE = 512  # voxels of a patch in 2D, as published


class Speed(NamedTuple):
    """Seconds for a million voxels, of a training step and of a prediction, and where they were measured."""

    train: float
    predict: float
    where: str


def measure_speed(network: Network) -> Speed:
    """Time one small patch here, after one to warm up; the loss, the optimizer and the data are left out."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    set_cpu_defaults(device)
    model = network.build().to(device)
    image = torch.zeros(1, network.channels, *[MEASURED] * 3, device=device)
    precision = CpuPrecision("auto")

    def autocast() -> AbstractContextManager:
        return torch.autocast("cuda", **amp_kwargs(device)) if image.is_cuda else precision.autocast(device)

    def seconds(train: bool) -> float:
        model.train(train)
        start = time.perf_counter()
        with torch.set_grad_enabled(train), autocast():
            outputs = model(image)
        if train:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        if image.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / MEASURED**3 * 1e6

    train, predict = (min(seconds(mode) for _ in range(2)) for mode in (True, False))
    return Speed(train, predict, f"this {'GPU' if image.is_cuda else 'CPU'}")


def compare_grids(records: Sequence[dict], network: Network, grid: Sequence[float], speed: Speed) -> list[str]:
    """Describe the planned grid and those that are worth a thought, a line each; equal ones share theirs.

    Args:
        records: fingerprints of the usable cases.
        network: what is trained.
        grid: that is planned, in mm.
        speed: see `measure_speed`.
    """
    named = {"planned": list(grid), "1 mm": list(PUBLISHED), **{name: rule(records) for name, rule in BY_NAME.items()}}
    bytes_of = step_bytes if torch.cuda.is_available() else cpu_step_bytes
    lines = []
    for edges in dict.fromkeys(map(tuple, named.values())):
        shape = median_shape(records, edges)
        names = ", ".join(name for name, other in named.items() if tuple(other) == edges)
        start = f"{names}: {_by(edges)} mm, median case {_by(np.round(shape))}, {count(np.prod(shape))} voxels"
        if record_faults(records, edges):
            lines.append(f"{start}: too few or too many for the network")
            continue
        patch = target_patch_size(shape, edges)
        seen = np.prod(np.minimum(patch, shape)) / np.prod(shape)
        windows = math.prod(
            math.ceil(max(n - r, 0) / (r * (1 - OVERLAP))) + 1 for n, r in zip(np.round(shape), patch, strict=True)
        )
        million = math.prod(patch) / 1e6
        lines.append(
            f"{start}; patch {_by(patch)} sees {100 * seen:.0f} % of it;"
            f" {bytes_of(patch, network, BATCH) / 1e9:.1f} GB a step of {BATCH} patches,"
            f" {_duration(ITERATIONS * BATCH * million * speed.train)} an epoch,"
            f" {_duration(windows * million * speed.predict)} a scan"
        )
    return lines


def alternatives(
    records: Sequence[dict],
    grid: Sequence[float],
    dataset_dir: str,
    output: str,
    mirror_axes: Sequence[int] = (0, 1, 2),
) -> list[str]:
    """List what to train beside the plan, each by its commands: the other grids, and 2D where slices are thick.

    Args:
        records: fingerprints of the usable cases.
        grid: that is planned, in mm.
        dataset_dir: for the commands.
        output: the plan.
        mirror_axes: that are planned.
    """

    def planning(name: str) -> str:
        other = f"{output.removesuffix('.json')}_{name}.json"
        options = f"--dataset_dir {shlex.quote(dataset_dir)} --spacing {name} --output {shlex.quote(other)}"
        return f"python -m monai.bundle run planning --config_file configs/plan.json {options}"

    grids = {tuple(rule(records)): name for name, rule in reversed(BY_NAME.items())}  # of twins the first name
    lines = [planning(name) for edges, name in grids.items() if list(edges) != list(grid)]
    median = BY_NAME["median"](records)
    if median[2] > ANISOTROPY * max(median[:2]):
        height, width = (int(min(IN_PLANE, math.ceil(n / STEP) * STEP)) for n in median_shape(records, median)[:2])
        files = ["configs/train.json", f"{output.removesuffix('.json')}_median.json", "configs/recipes/2d.json"]
        listed = str(files).replace("', '", "','")
        listed = f'"{listed}"' if shlex.quote(output) == output else shlex.quote(listed)
        axes = ",".join(str(axis) for axis in mirror_axes if axis < 2)
        lines.append(
            f"python -m monai.bundle run training --config_file {listed} --dataset_dir {shlex.quote(dataset_dir)}"
            f' --patch_size "[{height},{width},1]" --mirror_axes "[{axes}]"'
        )
    return lines


def _by(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s"
