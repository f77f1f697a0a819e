"""What a training step takes of memory, counted without computing anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..mednext import create_mednext
from ..utils.errors import UserError

OPTIMIZER_BYTES = 16  # a float32 parameter with its gradient and AdamW's two moments
MARGIN = 1.2  # of what is kept for the backward pass: what a layer needs while it computes


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


def step_bytes(
    patch: Sequence[int],
    channels: int,
    classes: int,
    size: str = "S",
    kernel_size: int = 3,
    batch: int = 2,
    style: str | None = None,
) -> float:
    """Return the bytes that a training step takes at its peak, in float32; under autocast it takes less.

    Args:
        patch: voxels.
        channels: of the image.
        classes: of the output.
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        batch: patches in a step.
        style: checkpoint_style of the network.
    """
    with torch.device("meta"):
        network = create_mednext(channels, classes, size, kernel_size, deep_supervision=True, checkpoint_style=style)
        one = MARGIN * kept_bytes(network, torch.empty(1, channels, *patch))
    return OPTIMIZER_BYTES * sum(p.numel() for p in network.parameters()) + batch * one


def largest_batch(
    patch: Sequence[int], channels: int, classes: int, size: str, kernel_size: int, gigabytes: float
) -> tuple[int, str | None]:
    """Return (patches in a step, checkpoint_style) that fit; 2 at least as published if recomputing makes room.

    Args:
        patch: voxels; so with what follows, see `step_bytes`.
        channels: of the image.
        classes: of the output.
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        gigabytes: what a step may take.

    Raises:
        UserError: two patches do not fit even with all blocks computed again.
    """
    for style in (None, "expansion", "block"):
        none, two = (step_bytes(patch, channels, classes, size, kernel_size, n, style) for n in (0, 2))
        if (fits := int(2 * (gigabytes * 1e9 - none) // (two - none))) >= 2:
            return fits, style
    raise UserError(
        f"memory_gb is {gigabytes}; MedNeXt {size} needs {two / 1e9:.1f} GB for two patches of"
        f" {list(patch)} even with every block computed again: give more, a smaller --size, or a coarser --spacing."
    )
