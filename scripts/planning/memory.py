"""What a training step takes of memory, counted without computing anything, or on a CPU on a small patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from ..blocks import MedNeXtBlock
from ..kernels.precision import CpuPrecision
from ..mednext import MedNeXt, create_mednext
from ..utils.errors import UserError

RESTING_BYTES, GRADIENT_BYTES = 12, 4  # a float32 parameter with AdamW's two moments; its gradient, made in backward
MARGIN = 1.2  # of what is kept for the backward pass: what a layer needs while it computes
CPU_MARGIN = 1.45  # the same with a CPU's kernels, measured: docs/benchmarks/training-peak_2-core-cpu_2026-11-25.md
SMALL = 32  # voxels along each edge of the patch that is computed on a CPU in order to count


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
    built, image = network.build(style), torch.zeros(1, network.channels, *[SMALL] * 3)
    with CpuPrecision(cpu_precision).autocast(image.device):
        kept = kept_bytes(built, image) + recomputed_bytes(built, image)
    return _peak(built, CPU_MARGIN * batch * kept * math.prod(patch) / SMALL**3)


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
