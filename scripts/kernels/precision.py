"""The precision in which a network computes on a CPU; on a GPU MONAI's engines decide it, by autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..utils.errors import UserError
from .cpu import bfloat16_pays

CPU_PRECISIONS: dict[str, Callable[[], bool]] = {
    "auto": bfloat16_pays,
    "float32": lambda: False,
    "bfloat16": lambda: True,
}


class CpuPrecision:
    """Chooses between float32 and autocast to bfloat16, which keeps weights, their gradients and sums in float32.

    Args:
        name: "float32", "bfloat16", or "auto", bfloat16 where this processor is measured to be faster in it.

    Raises:
        UserError: another name.
    """

    def __init__(self, name: str) -> None:
        if name not in CPU_PRECISIONS:
            raise UserError(f"cpu_precision is {name!r}; expected one of {', '.join(CPU_PRECISIONS)}.")
        self._halves = CPU_PRECISIONS[name]

    def name(self) -> str:
        """Return the type of number that it comes to here, "bfloat16" or "float32"."""
        return "bfloat16" if self._halves() else "float32"

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Make the context in which the network is called with tensors of a device; it does nothing for a GPU."""
        halved = device.type == "cpu" and self._halves()
        return torch.autocast("cpu", torch.bfloat16) if halved else nullcontext()
