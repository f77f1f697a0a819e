"""The training step on a CPU in bfloat16, where that is faster; MONAI's trainers autocast on GPUs alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from monai.inferers import SimpleInferer

from ..kernels.precision import CpuPrecision


class AutocastInferer(SimpleInferer):
    """Calls the network in the precision that is chosen for a CPU; losses get float32, as their sums need.

    Args:
        cpu_precision: "float32", "bfloat16" or "auto", see `CpuPrecision`. A GPU's precision is the trainer's `amp`.
    """

    def __init__(self, cpu_precision: str = "auto") -> None:
        super().__init__()
        self.cpu_precision = CpuPrecision(cpu_precision)

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the logits of patches (N, C, *space), or with deep supervision those of each resolution in a list."""
        with self.cpu_precision.autocast(inputs.device):
            logits = super().__call__(inputs, network, *args, **kwargs)
        if inputs.device.type != "cpu":
            return logits
        return cast(torch.Tensor, [one.float() for one in logits]) if isinstance(logits, list) else logits.float()
