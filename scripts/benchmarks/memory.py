"""Memory and time of a training step, for each way of recomputing: `python -m scripts benchmark_memory --size S`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..mednext import KERNEL_SIZES, SIZES, create_mednext
from ..planning.memory import kept_bytes
from ..utils.errors import UserError

STYLES = (
    None,
    ("expansion", "expansion", None, None, None),
    "expansion",
    ("block", "block", None, None, None),
    "block",
)


def time_step(network: nn.Module, image: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a step, and its peak bytes on CUDA (else nan).

    A step is forward and backward in training mode, on CUDA under autocast to bfloat16; without an optimizer.
    """
    seconds, cuda = [], image.is_cuda
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(image.device.type, torch.bfloat16, enabled=cuda):
            outputs = network(image)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        network.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), torch.cuda.max_memory_allocated() if cuda else math.nan


def memory(
    size: str = "S",
    kernel_size: int = 3,
    in_channels: int = 1,
    out_channels: int = 3,
    patch_size: Sequence[int] = (128, 128, 128),
    batch_size: int = 2,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    repeats: int = 3,
) -> None:
    """Print a row for no recomputing, and for wide layers and whole blocks at the two finest and at all resolutions.

    Args:
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        in_channels: channels of the image.
        out_channels: labels with background.
        patch_size: voxels.
        batch_size: patches in a step.
        device: "cpu", "cuda", or "meta", which only counts. What is kept for the backward pass is counted in float32,
            except on a CPU without computing anything; the peak on CUDA is that of a step under autocast.
        repeats: steps timed for each row, after one to warm up; the median is printed.
    """
    if size not in SIZES or kernel_size not in KERNEL_SIZES:
        known = f"{', '.join(SIZES)} and {', '.join(map(str, KERNEL_SIZES))}"
        raise UserError(f"size is {size!r} and kernel_size {kernel_size!r}; expected one of {known}.")
    if isinstance(patch_size, int) or len(patch_size) != 3:
        raise UserError(
            f'patch_size is {patch_size!r}; expected three sides, for example --patch_size "[128,128,128]".'
        )
    print(
        f"MedNeXt {size}, kernel {kernel_size}, {batch_size} x {list(patch_size)}, {device}, torch {torch.__version__}"
    )
    print(f"{'checkpoint_style':52}{'kept, float32':>20}{'peak':>12}{'a step':>12}")
    for style in STYLES:
        build = partial(create_mednext, in_channels, out_channels, size, kernel_size, True, checkpoint_style=style)
        torch.manual_seed(0)
        with torch.device("cpu" if device == "cpu" else "meta"):  # on a CPU other kernels run, which keep less
            network = build()
            image = torch.randn(batch_size, in_channels, *patch_size)
        row = f"{style if style is None or isinstance(style, str) else list(style)!s:52}"
        row += f"{kept_bytes(network, image) / 2**30:16.2f} GiB"
        if device != "meta":
            if device != "cpu":
                network = build().to(device)
                image = torch.randn(image.shape, device=device)
            seconds, peak = time_step(network, image, repeats)
            row += f"{'-':>12}" if math.isnan(peak) else f"{peak / 2**30:8.2f} GiB"
            row += f"{seconds:10.2f} s"
        print(row, flush=True)
