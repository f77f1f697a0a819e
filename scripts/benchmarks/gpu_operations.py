"""The time of every operation of a block by itself, on a GPU: a part of `gpu`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch

from ..blocks import MedNeXtBlock
from ..kernels import REFERENCE, TRITON, TUNER, autotune_file
from ..kernels.backend import Backend, Weights, channels_last
from ..mednext import create_mednext

LEVELS = ((32, 1), (64, 2), (128, 4), (256, 8), (512, 16))  # channels, and by what the patch is smaller
WARMUP = 5  # runs that do not count


def synchronise(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], runs: int, device: str, warmup: int = WARMUP) -> list[float]:
    """Time each run, with the device idle before and after."""
    found = []
    for number in range(warmup + runs):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        if number >= warmup:
            found.append(time.perf_counter() - start)
    return found


def half_precision(device: str) -> torch.dtype:
    """Choose the precision of autocast."""
    return torch.bfloat16 if device == "cpu" or torch.cuda.is_bf16_supported() else torch.float16


class Limits(NamedTuple):
    """The best that this device reaches: measured, not the vendor's."""

    bandwidth: float  # bytes a second, read and written
    rate: float  # multiply-adds a second of matrix products in half precision


def measure_limits(device: str) -> Limits:
    """Copy a GiB, and multiply two large matrices (smaller ones on a CPU)."""
    dtype, edge, size = (half_precision(device), 8192, 2**30) if device == "cuda" else (torch.float32, 512, 2**24)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), torch.randn(edge, edge, device=device).to(dtype)
    copying, multiplying = (min(seconds(run, 10, device)) for run in (lambda: target.copy_(source), lambda: a @ a))
    return Limits(2 * size / copying, edge**3 / multiplying)


class Kernel(NamedTuple):
    """An operation on one level's activations, of which each must be read or written at least `passes` times."""

    name: str
    run: Callable[[], object]
    passes: float
    multiplications: float  # of one voxel and channel


def _kernels(
    channels: int, side: int, kernel_size: int, ratio: int, ops: Backend, dtype: torch.dtype, device: str
) -> list[Kernel]:
    """List forward and backward passes of the operations on one patch."""
    x = channels_last(torch.randn(1, channels, side, side, side, device=device).to(dtype)).requires_grad_()
    block = MedNeXtBlock(channels, channels, ratio, kernel_size).to(device)
    weight, bias, weights = block.conv1.weight, block.conv1.bias, block.weights()
    assert bias is not None
    if ops is REFERENCE:  # has no mixed precision of its own
        weight, bias, *rest = (t.to(dtype) for t in (weight, bias, *weights[:6]))
        weights = Weights(*rest)
    y, moments = ops.depthwise(x, weight, bias)
    y = y.detach().requires_grad_()
    out, made = ops.depthwise(x, weight, bias)[0], ops.mlp(y, weights, 1e-5, False, x, moments)
    g = torch.randn_like(out)

    def back(of: torch.Tensor, *inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(of, inputs, g, retain_graph=True)

    taps, products = kernel_size**3, 2 * ratio * channels
    return [
        Kernel("depthwise", lambda: ops.depthwise(x.detach(), weight, bias), 2, taps),
        Kernel("depthwise, input gradient", back(out, x), 2, taps),
        Kernel("depthwise, weight gradient", back(out, weight), 2, taps),
        Kernel("mlp", lambda: ops.mlp(y.detach(), weights, 1e-5, False, x.detach(), moments), 3, products),
        Kernel("mlp, backward", back(made, y, *weights[:6]), 3, 2 * products),
    ]


def kernel_table(
    ratio: int, kernel_sizes: Sequence[int], patch: int, best: Limits, runs: int, device: str
) -> list[dict]:
    """Time every operation of every level by itself, also as a share of what the device reaches at best."""
    found, dtype = [], half_precision(device) if device == "cuda" else torch.float32
    for channels, smaller in LEVELS:
        side = patch // smaller
        for k in kernel_sizes:
            for ops in (REFERENCE, TRITON):
                if ops is TRITON and TRITON.unsuitable(torch.empty(1, channels, 1, 1, 1, dtype=dtype, device=device)):
                    continue
                for kernel in _kernels(channels, side, k, ratio, ops, dtype, device):
                    taken = statistics.median(seconds(kernel.run, runs, device))
                    size = channels * side**3
                    bandwidth = kernel.passes * size * dtype.itemsize / taken / best.bandwidth
                    rate = kernel.multiplications * size / taken / best.rate
                    row = {
                        "kernel": kernel.name,
                        "channels": channels,
                        "side": side,
                        "k": k,
                        "ops": ops.name,
                        "ms": taken * 1e3,
                    }
                    found.append({**row, "bandwidth": bandwidth, "rate": rate})
    return found


def block_ratios(
    sizes: Sequence[str], kernel_sizes: Sequence[int], batches: Sequence[int], patch: int, device: str
) -> dict[str, float | str]:
    """Let `kernels="auto"` measure every kind of block of the networks anew, however long that takes, and remember it.

    Returns:
        By kind of block, Triton's time in that of stock operators, or why it is left out.
    """
    where = torch.empty(0, device=device).device  # with its number
    autotune_file.file_for(autotune_file.machine(where)).unlink(missing_ok=True)
    TUNER.forget()
    limit, TUNER.limit = TUNER.limit, math.inf
    try:
        for size, k, batch in product(sizes, kernel_sizes, batches):
            network = create_mednext(1, 3, size, k).to(where)
            image = torch.randn(batch, 1, *[patch] * 3, device=where)
            for trains in (True, False):
                with torch.set_grad_enabled(trains), torch.autocast(device, half_precision(device)):
                    network(image)
    finally:
        TUNER.limit = limit
    results = {name: found[TRITON.name] for name, found in TUNER.results.get(where, {}).items() if TRITON.name in found}
    return {name: str(result.left_out) if result.ratio is None else result.ratio for name, result in results.items()}
