"""What a training step takes of memory, counted without computing anything, or on a CPU on a small patch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from ..blocks import MedNeXtBlock
from ..kernels.precision import CpuPrecision
from ..mednext import MedNeXt, create_mednext
from ..utils.device import free_memory, total_memory
from ..utils.errors import UserError

RESTING_BYTES, GRADIENT_BYTES = 12, 4  # a float32 parameter with AdamW's two moments; its gradient, made in backward
MARGIN = 1.2  # of what is kept for the backward pass: what a layer needs while it computes
CPU_MARGIN = 1.45  # the same with a CPU's kernels, measured: docs/benchmarks/training-peak_2-core-cpu_2026-11-25.md
PROCESS = 1e9  # bytes of Python with its libraries, and of what a training holds besides its steps
SMALL = 32  # voxels along each edge of the patch that is computed on a CPU in order to count

logger = logging.getLogger("mednext")


class Network(NamedTuple):
    """What decides memory and time of a network besides the patch."""

    channels: int
    classes: int
    size: str = "S"
    kernel_size: int = 3

    def build(self, checkpoint_style: str | None = None) -> MedNeXt:
        """Make the network as it is trained."""
        return create_mednext(*self, deep_supervision=True, checkpoint_style=checkpoint_style)


def kept_bytes(network: nn.Module, image: torch.Tensor) -> int:
    """Count the bytes that the forward pass keeps for the backward pass, each storage once, parameters left out.

    The outputs and their gradient belong to it: training's loss keeps and makes nothing else of that size.

    Both may be on the meta device: then nothing is computed and the answer is the same.
    """
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later storage has its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(image)  # its graph holds what is counted
    of_loss = [2 * output.nbytes for output in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]
    return sum(storage.nbytes() for storage in kept.values()) + sum(of_loss)


def recomputed_bytes(network: MedNeXt, image: torch.Tensor) -> int:
    """Count the bytes that a block of the finest resolution keeps while it is computed again, if it is."""
    block = cast(MedNeXtBlock, network.enc_block_0[0])
    style, block.checkpoint_style = block.checkpoint_style, None
    wide = image.new_zeros(len(image), block.conv1.in_channels, *image.shape[2:])
    found = kept_bytes(block, wide) if style else 0
    block.checkpoint_style = style
    return found


def step_bytes(patch: Sequence[int], network: Network, batch: int = 2, style: str | None = None) -> float:
    """Return the bytes that a training step takes at its peak by stock operators in float32; autocast takes less.

    Args:
        patch: voxels.
        network: what is trained.
        batch: patches in a step.
        style: checkpoint_style of the network.
    """
    with torch.device("meta"):
        built, image = network.build(style), torch.empty(1, network.channels, *patch)
        kept = kept_bytes(built, image) + recomputed_bytes(built, image)
    return _peak(built, MARGIN * batch * kept)


def cpu_step_bytes(
    patch: Sequence[int], network: Network, batch: int = 2, style: str | None = None, cpu_precision: str = "auto"
) -> float:
    """Return the same with the kernels of this CPU, which keep less, in the precision that training has here.

    The arguments are those of `step_bytes`, and `cpu_precision` as for `CpuPrecision`.
    """
    return _cpu_bytes(network.build(style), network.channels, patch, batch, cpu_precision)


def _cpu_bytes(network: MedNeXt, channels: int, patch: Sequence[int], batch: int, cpu_precision: str) -> float:
    image = torch.zeros(1, channels, *[SMALL] * network.axes)
    with CpuPrecision(cpu_precision).autocast(image.device):
        kept = kept_bytes(network, image) + recomputed_bytes(network, image)
    return _peak(network, CPU_MARGIN * batch * kept * math.prod(patch) / SMALL**network.axes)


def check_memory(
    network: nn.Module,
    channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    device: str | torch.device,
    cpu_precision: str = "auto",
) -> None:
    """Say what a training on this CPU takes of memory, before it starts; a GPU's memory and other networks pass.

    Args:
        network: that is trained.
        channels: of an image.
        patch_size: voxels of a patch.
        batch_size: patches in a step.
        device: that trains.
        cpu_precision: see `CpuPrecision`.

    Raises:
        UserError: this computer has less.
    """
    if torch.device(device).type != "cpu" or not isinstance(network, MedNeXt):
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    step = _cpu_bytes(network, channels, patch_size, batch_size, cpu_precision)
    needed, memory = processes * (PROCESS + step), total_memory()
    said = f"{batch_size} patches of {list(patch_size)} voxels in a step take about {needed / 1e9:.2g} GB of memory"
    if needed > memory:
        raise UserError(
            f"{said}, of which this computer has {memory / 1e9:.3g}: give a smaller --batch_size or --patch_size, or"
            " --network_def#checkpoint_style block, or use a larger computer."
        )
    if os.environ.get("RANK", "0") == "0":
        logger.info("%s; %.3g GB are free", said, free_memory() / 1e9)


def _peak(network: nn.Module, kept: float) -> float:
    """Return the most bytes of a step: gradients of parameters come as what was kept for the backward pass goes."""
    parameters = sum(p.numel() for p in network.parameters())
    return RESTING_BYTES * parameters + max(GRADIENT_BYTES * parameters, kept)


def largest_batch(patch: Sequence[int], network: Network, gigabytes: float) -> tuple[int, str | None]:
    """Return (patches in a step, checkpoint_style) that fit; 2 at least as published if recomputing makes room.

    Args:
        patch: voxels.
        network: what is trained.
        gigabytes: what a step may take.

    Raises:
        UserError: two patches do not fit even with all blocks computed again.
    """
    for style in (None, "expansion", "block"):
        two, three = (step_bytes(patch, network, n, style) for n in (2, 3))
        if (fits := 2 + math.floor((gigabytes * 1e9 - two) / (three - two))) >= 2:
            return fits, style
    raise UserError(
        f"memory_gb is {gigabytes}; MedNeXt {network.size} needs {two / 1e9:.1f} GB for two patches of"
        f" {list(patch)} even with every block computed again: give more, a smaller --size, or a coarser --spacing."
    )
