"""What a training step costs in memory and time for each way of recomputing: `python -m scripts.memory --size S`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from .errors import command
from .mednext import create_mednext

STYLES = (
    None,
    ("expansion", "expansion", None, None, None),
    "expansion",
    ("block", "block", None, None, None),
    "block",
)


def measure(
    style: str | Sequence[str | None] | None,
    patch_size: Sequence[int],
    batch_size: int,
    device: str,
    repeats: int,
    **network,
) -> tuple[float, float, float]:
    """Of one `checkpoint_style`: bytes kept for the backward pass, peak bytes (CUDA, else nan), median seconds a step.

    The step is forward and backward in training mode, on CUDA under autocast to bfloat16; without an optimizer.
    """
    device, kept = torch.device(device), {}
    torch.manual_seed(0)
    net = create_mednext(**network, checkpoint_style=style, deep_supervision=True).to(device).train()
    x = torch.randn(batch_size, network["num_input_channels"], *patch_size, device=device)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    def step(pack=lambda t: t) -> None:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            outputs = net(x)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        net.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(keep)  # also the warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else float("nan")
    return sum(kept.values()), peak, statistics.median(seconds)


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
    """Prints a row for no recomputing, and for wide layers and whole blocks at the two finest and at all resolutions.

    Args:
        size: row of the table of sizes.
        kernel_size: depthwise kernel.
        in_channels: channels of the image.
        out_channels: labels with background.
        patch_size: voxels.
        batch_size: patches in a step.
        device: "cpu" or "cuda".
        repeats: steps timed for each row, after one to warm up; the median is printed.
    """
    network = {
        "model_id": size,
        "kernel_size": kernel_size,
        "num_input_channels": in_channels,
        "num_classes": out_channels,
    }
    print(
        f"MedNeXt {size}, kernel {kernel_size}, {batch_size} x {list(patch_size)}, {device}, torch {torch.__version__}"
    )
    print(f"{'checkpoint_style':52}{'kept for backward':>20}{'peak':>12}{'a step':>12}")
    for style in STYLES:
        kept, peak, seconds = measure(style, patch_size, batch_size, device, repeats, **network)
        name = str(style if style is None or isinstance(style, str) else list(style))
        most = "-" if math.isnan(peak) else f"{peak / 2**30:.2f} GiB"
        print(f"{name:52}{kept / 2**30:16.2f} GiB{most:>12}{seconds:10.2f} s", flush=True)


if __name__ == "__main__":
    command(memory)
