"""One block in use, tried with a backend: is it exact, and how long does it take beside stock operators?"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.device import ran_out_of_memory
from .backend import CHANNELS_LAST, Backend, BlockKind, Weights
from .exactness import inexact
from .reference import Reference

VOXELS = r"(\d{1,6})\^3 voxels"  # the end of a use's name
SIDE, CASES = 20, 2  # of what is checked in float64, at most: several tiles of every kernel, the last one not full
FEWEST, MOST = 5, 15  # pairs of runs
CLOSE = 2.0  # where one of two is over so many times as fast, two pairs that take SECONDS are enough
STEADY = 0.05  # spread of the pairs' ratios, as a share of their median, that ends the measurement
SECONDS = 2.0  # that pairs take, at most, once there are enough
UNLIKE = 0.05  # of what stock operators make at the size in use; half precision has a root mean square of 0.01 at worst
CONDITIONED = (0, 1, 7)  # gradients of which that is true: of input, convolution and second weights; others cancel out


class Use(NamedTuple):
    """A block as it is used: kind, tensor, precision, and whether gradients are asked for."""

    block: BlockKind
    shape: torch.Size  # (N, C, D, H, W)
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    trains: bool

    @property
    def name(self) -> str:
        """Name what is measured once: uses of about as many voxels, to a factor of two an edge, share a name."""
        edge = 2 ** round(math.log2(max(self.shape[0] * self.shape[2:].numel(), 1)) / 3)
        return f"{use_name(self.block, self.shape[1], self.dtype, self.autocast, self.trains)}{edge}^3 voxels"


def use_name(block: BlockKind, channels: int, dtype: torch.dtype, autocast: torch.dtype | None, trains: bool) -> str:
    """Begin the name of a use, with all but its voxels."""
    precision = str(autocast or dtype).removeprefix("torch.") + " autocast" * (autocast is not None)
    how = "up" if block.transposed else "down" if block.stride > 1 else "in place"
    widths = f"{channels} to {block.hidden} to {block.made} channels{', GRN' * block.grn}"
    return f"{precision}, k{block.kernel_size} {how}, {widths}, {'training' if trains else 'inference'}, about "


class Result(NamedTuple):
    """What became of a backend: its time in that of stock operators, or why it is left out."""

    ratio: float | None = None  # median of the pairs'
    spread: float | None = None  # of the middle half of the pairs' ratios
    milliseconds: float | None = None
    stock_milliseconds: float | None = None
    left_out: str | None = None
    lasting: bool = True  # it would be the same next time


class Clock:
    """Measures time; tests have one of their own."""

    def now(self) -> float:
        """Return seconds since some moment."""
        return time.monotonic()

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        """Time a run: by events of the GPU, with it idle before and after, or by the processor's clock."""
        if device.type != "cuda":
            moment = time.perf_counter()
            run()
            return time.perf_counter() - moment
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def settle(self, device: torch.device) -> None:
        """Wait until the device is idle; a device that a kernel broke raises here."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def attempt(use: Use, ours: Backend, clock: Clock, given_up: Event) -> Result:
    """Check a backend and time it, in pairs with stock operators, unless it fails.

    What `given_up` ends before it is done has no result.

    Raises:
        Exception: the device does not work any more.
    """
    try:
        with torch.cuda.device(use.device) if use.device.type == "cuda" else contextlib.nullcontext():
            reason = _inexact(use, ours)
            if given_up.is_set():
                return Result()
            result = Result(left_out=f"inaccurate: {reason}") if reason else _timed(use, ours, clock, given_up)
    except Exception as e:  # whatever a compiler or a driver raises
        for_now = ran_out_of_memory(e)
        result = Result(left_out="out of memory" if for_now else _sentence(e), lasting=not for_now)
    broke = result.left_out and result.lasting  # maybe the device, too, which `settle` tells
    if use.device.type == "cuda" and not broke:
        torch.cuda.empty_cache()
    return result


def _sentence(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or ["no message"]
    line = lines[-1] if lines[0].startswith("at ") else lines[0]  # Triton quotes the source first
    return f"{type(e).__name__}: {line}"[:200]


def _random(shape: Sequence[int], like: Use, seed: int = 0) -> Tensor:
    """Draw from a generator of its own, so that what is drawn elsewhere stays the same."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=like.device, dtype=torch.float32)


def _parameters(use: Use, dtype: torch.dtype) -> tuple[Tensor, Tensor, Weights]:
    """Draw weight and bias of the depthwise convolution, and the rest."""
    channels, (k, _, _, made, hidden, grn) = use.shape[1], use.block
    shapes = [(channels, 1, k, k, k), (channels,), (channels,), (channels,), (hidden, channels), (hidden,)]
    shapes += [(made, hidden), (made,), *[(hidden,)] * 2 * grn]
    drawn = [_random(shape, use, seed) for seed, shape in enumerate(shapes)]
    for number, terms in ((0, k**3), (4, channels), (6, hidden)):
        drawn[number] /= terms**0.5
    weight, bias, *rest = (t.to(dtype) for t in drawn)
    return weight, bias, Weights(*rest)


def _inexact(use: Use, ours: Backend) -> str | None:
    """Compare both operations of the block, and their gradients, with float64, on a part of the size in use."""
    dtype = use.autocast or use.dtype
    block, size = use.block, [min(n, SIDE) for n in use.shape[2:]]
    cases, channels = min(use.shape[0], CASES), use.shape[1]
    weight, bias, weights = _parameters(use, dtype)
    parameters = [w for w in weights if w is not None]
    x = (_random((cases, channels, *size), use) + 1).to(dtype)

    def convolve(ops: Backend, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.depthwise(x, weight, bias, block.stride, block.transposed)[0]

    if reason := inexact(convolve, [x, weight, bias], ours):
        return f"the convolution: {reason}"
    residual = (_random((cases, block.made, *size), use, 1)).to(dtype)
    reason = inexact(lambda ops, y, r, *w: ops.mlp(y, Weights(*w), 1e-5, False, r), [x, residual, *parameters], ours)
    return f"what follows the convolution: {reason}" if reason else None


def _runner(use: Use, ops: Backend) -> Callable[[], list[Tensor]]:
    """Prepare the block in the layout that the backend leaves behind: contiguous of stock operators, else not."""
    weight, bias, weights = _parameters(use, torch.float32 if use.autocast else use.dtype)
    layout = torch.contiguous_format if isinstance(ops, Reference) else CHANNELS_LAST[len(use.shape)]
    x = _random(use.shape, use).to(use.dtype, memory_format=layout)
    inputs = [t.requires_grad_(use.trains) for t in (x, weight, bias, *weights) if t is not None]
    residual = x if use.block.made == use.shape[1] and use.block.stride == 1 else None
    incoming: list[Tensor] = []

    def run() -> list[Tensor]:
        with (
            torch.set_grad_enabled(use.trains),
            torch.autocast(use.device.type, use.autocast or torch.float16, enabled=use.autocast is not None),
        ):
            y, moments = ops.depthwise(x, weight, bias, use.block.stride, use.block.transposed)
            y = ops.mlp(y, weights, 1e-5, False, residual, moments)
        if not use.trains:
            return [y]
        if not incoming:
            incoming.append(torch.empty_like(y).copy_(_random(y.shape, use, 1)))
        gradients = torch.autograd.grad(y, inputs, incoming[0])
        return [y.detach(), *(gradients[i] for i in CONDITIONED)]

    return run


def _timed(use: Use, ours: Backend, clock: Clock, given_up: Event) -> Result:
    run = _runner(use, ours)
    made = run()
    try:
        stock = _runner(use, Reference())
        expected = stock()
    except RuntimeError as e:
        if not ran_out_of_memory(e):
            raise
        return Result(ratio=0.0, lasting=False)
    for result, truth in zip(made, expected, strict=True):
        difference = (result.float() - truth.float()).norm() / truth.float().norm()
        if not difference <= UNLIKE:
            return Result(left_out=f"inaccurate: differs by {difference:.2g} from stock operators at the size in use")
    del made, expected
    if given_up.is_set():
        return Result()
    stock(), run()  # once more, to warm up
    pairs: list[tuple[float, float]] = []
    ratios: list[float] = []
    start = clock.now()
    while len(pairs) < MOST and not given_up.is_set():
        theirs, mine = clock.seconds(stock, use.device), clock.seconds(run, use.device)
        pairs.append((theirs, mine))
        ratios.append(mine / max(theirs, 1e-9))
        late = clock.now() - start > SECONDS
        clear = len(pairs) > 1 and (min(ratios) > CLOSE or max(ratios) < 1 / CLOSE)
        if (late and clear) or (len(pairs) >= FEWEST and (late or _spread(ratios) <= STEADY)):
            break
    stock_median, median = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    return Result(statistics.median(ratios), _spread(ratios), median, stock_median)


def _spread(ratios: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (high - low) / max(middle, 1e-9)
