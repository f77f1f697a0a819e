"""The precision in which a network computes: on a CPU as chosen here, on a GPU as MONAI's engines autocast."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from ..utils.device import amp_kwargs
from ..utils.errors import UserError
from ..utils.files import remembered, write_text
from . import native
from .backend import Weights
from .cpu import Cpu

WORTH = 0.9  # of float32's time: bfloat16 that takes more is not worth its digits
FEWEST_PAIRS, MOST_PAIRS = 5, 40  # that are measured, until the middle half of them agrees

logger = logging.getLogger("mednext")


@functools.cache
def bfloat16_pays() -> bool:
    """Tell whether this processor is faster in bfloat16, and say so in the log, once.

    Its instructions decide where Linux lists them, as it does for x86: with products of bfloat16 (AVX512-BF16, which
    every processor with AMX has, too) it takes half to three quarters of float32's time, emulated 2 to 10 times that.
    So all machines of a kind give the same masks, whatever else they do meanwhile. Elsewhere a measurement decides.
    """
    flags = native.processor().split()
    if b"flags" not in flags:
        pays, reason = _measured()
    elif pays := b"avx512_bf16" in flags:
        reason = "this processor has instructions for it"
    else:
        reason = "this processor would emulate bfloat16"
    logger.info('cpu_precision "auto" is %s: %s', "bfloat16" if pays else "float32", reason)
    return pays


def _measured() -> tuple[bool, str]:
    """Tell what was measured on this processor before, unless one pair contradicts it, or else measure.

    What stays undecided is float32, which is exact, and not remembered.
    """
    time_pair = _pairs()
    try:
        key = hashlib.sha256(native.processor() + torch.__version__.encode()).hexdigest()[:16]
        file = native.cache() / f"bfloat16-{key}.json"
        ratios = remembered(file).get("ratios", [])
    except (OSError, UserError):
        file, ratios = None, []
    if _decided(ratios) is None or _decided(ratios) != (time_pair() < WORTH):
        ratios = []
        while _decided(ratios) is None and len(ratios) < MOST_PAIRS:
            ratios.append(time_pair())
        if file is not None and _decided(ratios) is not None:
            content = json.dumps({"ratios": ratios}) + "\n"
            with suppress(UserError):  # a full disk
                write_text(file, content)
    pays = _decided(ratios)
    middle = f"{statistics.median(ratios):.2f} of float32's time ({min(ratios):.2f} to {max(ratios):.2f})"
    return pays is True, f"in {len(ratios)} pairs bfloat16 took {middle}{'' if pays is not None else ', undecided'}"


def _decided(ratios: object) -> bool | None:
    """Tell whether bfloat16 pays, by its times divided by float32's; None where the middle half of them does not say.

    Fewer than FEWEST_PAIRS say nothing, nor does what is no list of times.
    """
    if (
        not isinstance(ratios, list)
        or len(ratios) < FEWEST_PAIRS
        or not all(isinstance(r, float) and 0 < r < 1e3 for r in ratios)
    ):
        return None
    low, _, high = statistics.quantiles(ratios, n=4)
    return None if low < WORTH <= high else high < WORTH


def _pairs() -> Callable[[], float]:
    """Return what times a block of 32 channels at 64^3 in both precisions in turn: bfloat16's time by float32's."""
    cpu, row, square = Cpu(), torch.ones(32), torch.ones(64, 32)
    images = [torch.ones(1, 32, 64, 64, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]

    def seconds(x: Tensor) -> float:
        start = time.perf_counter()
        y, _ = cpu.depthwise(x, torch.ones(32, 1, 3, 3, 3), row)
        cpu.mlp(y, Weights(row, row, square, torch.ones(64), square.t(), row), 1e-5, residual=x)
        return time.perf_counter() - start

    def pair() -> float:
        exact, half = map(seconds, images)
        return half / exact

    pair()  # the first one compiles and allocates
    return pair


CPU_PRECISIONS: dict[str, Callable[[], bool]] = {
    "auto": bfloat16_pays,
    "float32": lambda: False,
    "bfloat16": lambda: True,
}


class CpuPrecision:
    """Chooses between float32 and autocast to bfloat16, which keeps weights, their gradients and sums in float32.

    Args:
        name: "float32", "bfloat16", or "auto", bfloat16 where this processor is faster in it.

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


def used_precision(device: str | torch.device, amp: bool, cpu_precision: str) -> str:
    """Name the type of number in which a network computes, such as "bfloat16".

    Args:
        device: where it computes.
        amp: whether MONAI's engine autocasts on a GPU.
        cpu_precision: that of a CPU, see `CpuPrecision`.
    """
    if torch.device(device).type == "cpu":
        return CpuPrecision(cpu_precision).name()
    found = amp_kwargs(device).get("dtype", torch.float16) if amp else torch.float32
    return str(found).removeprefix("torch.")
