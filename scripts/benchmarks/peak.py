"""The most memory of a training step on a CPU beside what planning predicts: `python -m scripts benchmark_peak`."""

from __future__ import annotations

import gc
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from monai.losses import DeepSupervisionLoss

from ..planning.memory import Network, cpu_step_bytes
from ..training.losses import SegmentationLoss
from ..training.precision import AutocastInferer
from ..utils.device import give_memory_back, set_cpu_defaults
from ..utils.errors import UserError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(
    size: str = "S",
    kernel_size: int = 3,
    out_channels: int = 2,
    patch_size: Sequence[int] = (48, 48, 48),
    batch_size: int = 2,
    checkpoint_style: str | None = None,
    cpu_precision: str = "auto",
    steps: int = 3,
) -> None:
    """Print the most memory that this process had in training steps, by Linux, and the prediction.

    What was loaded and compiled before, in a step of another network, does not count.

    Args:
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        out_channels: labels with background.
        patch_size: voxels.
        batch_size: patches in a step.
        checkpoint_style: of the network.
        cpu_precision: as in training.
        steps: steps; the first lacks the moments of the optimizer.

    Raises:
        UserError: the system is not Linux.
    """
    if not RESET.exists():
        raise UserError(f"{platform.system()} does not tell the most memory of a process; measure on Linux.")
    set_cpu_defaults("cpu")
    inferer = AutocastInferer(cpu_precision)
    network = Network(1, out_channels, size, kernel_size)
    _train(Network(1, 2), None, inferer, (32, 32, 32), 1, 1)
    gc.collect()
    give_memory_back()
    RESET.write_text("5")  # the peak is what is held now
    before = _held("VmRSS")
    _train(network, checkpoint_style, inferer, patch_size, batch_size, steps)
    measured = _held("VmHWM") - before
    predicted = cpu_step_bytes(patch_size, network, batch_size, checkpoint_style, cpu_precision)
    print(
        f"{size} k{kernel_size}, {out_channels} classes, {batch_size} x {list(patch_size)}, {checkpoint_style},"
        f" {inferer.cpu_precision.name()}: measured {measured / 1e9:.3f} GB, predicted {predicted / 1e9:.3f} GB"
        f" ({100 * (predicted / measured - 1):+.0f} %)"
    )


def _train(
    network: Network, style: str | None, inferer: AutocastInferer, patch: Sequence[int], batch: int, steps: int
) -> None:
    model = network.build(style)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = DeepSupervisionLoss(cast(Any, SegmentationLoss()), weights=[0.2] * 5)
    image, label = torch.randn(batch, 1, *patch), torch.randint(network.classes, (batch, 1, *patch)).float()
    for _ in range(steps):
        loss(inferer(image, model), label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _held(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found, f"Linux tells {name}"
    return 1024 * int(found[1])
