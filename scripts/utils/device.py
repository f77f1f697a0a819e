"""The computer that a process runs on: its cores, its devices, and what torch is told before it computes on them."""

from __future__ import annotations

import ctypes
import datetime
import functools
import logging
import math
import mmap
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .waiting import share_cores

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt in glibc's malloc.h
MAPPED = 2**25  # bytes: what glibc gets from the system afresh, and gives back, however often it is needed
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # as CUDA's driver and its libraries say it

logger = logging.getLogger("mednext")


def cpu_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the cores that this process may use: its affinity, at most a container's share of time, rounded up.

    Args:
        groups: folder in which Linux tells that share, by control groups of version 1 or 2.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        try:
            quota, period = " ".join((groups / name).read_text() for name in names).split()
            found = min(found, math.ceil(int(quota) / int(period))) if quota not in ("max", "-1") else found
        except (OSError, ValueError):
            continue
    return max(found, 1)


def free_memory() -> float:
    """Return the bytes of RAM that programs can still have; where the kernel does not say it, half of all."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except FileNotFoundError:
        found = None
    return 1024 * int(found[1]) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def ran_out_of_memory(error: Exception) -> bool:
    """Tell whether a GPU's memory was not enough."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


@functools.cache
def total_memory(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Count the bytes of RAM that this computer has, or a container's share of them.

    Args:
        groups: folder in which Linux tells that share, by control groups of version 1 or 2.
    """
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return math.inf  # Windows does not say
    found = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2, version 1
        try:
            found = min(found, int((groups / name).read_text()))
        except (OSError, ValueError):
            continue
    return found


def loader_workers(device: object = None) -> int:
    """Return how many processes load data: half of the cores, at most 8, and none for a network on the CPU.

    A network on the CPU needs the cores itself.

    Args:
        device: where the network computes; None says nothing about it.
    """
    return 0 if "cpu" in str(device) else min(8, cpu_cores() // 2)


def set_cpu_defaults(device: str | torch.device) -> None:
    """Set torch and the allocator up for a process that computes on a CPU; do nothing for another device.

    - As many threads as there are cores for it, where OMP_NUM_THREADS does not say otherwise; they wait for each other
      asleep while other processes want the cores, see `waiting`.
    - Memory that was freed is kept for the next tensors instead of being returned to the system, which would hand it
      out again page by page (glibc only).

    Denormal numbers stay what they are: with `torch.set_flush_denormal(True)` SciPy's k-d tree, which the surface
    distances of scoring need, overflows the stack (SciPy 1.15.3).
    """
    if torch.device(device).type != "cpu":
        return
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(cpu_cores())
    share_cores()
    keep_memory()


@functools.cache
def keep_memory() -> None:
    """Keep memory that was freed for the next tensors, from now on (glibc only)."""
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_memory_back() -> None:
    """Return to the system what was freed and kept so far (glibc only), where tensors of other sizes follow."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def advise(x: torch.Tensor) -> None:
    """Tell once, of a loop that trains on large tensors like x on a CPU, that it lacks `set_cpu_defaults`."""
    if _has_glibc() and not keep_memory.cache_info().currsize and x.nbytes >= MAPPED:
        _advise()


@functools.cache
def _advise() -> None:
    logger.warning(
        "freed memory goes back to the system after every tensor, which made training steps take up to 1.3 times as"
        ' long: call %s.set_cpu_defaults("cpu") once, before the first step',
        __name__,
    )


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def passing_zeros(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Make zeros of a tensor's type and device that, on a CPU, the system has back as soon as they are freed.

    Large tensors of many sizes that come and go would leave holes in the memory that `set_cpu_defaults` keeps.
    """
    size = math.prod(shape)
    if like.device.type != "cpu" or not size or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_zeros(list(shape))
    memory = mmap.mmap(-1, size * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(list(shape))


def amp_kwargs(device: str | torch.device) -> dict[str, Any]:
    """Choose the arguments of autocast: bfloat16 where the GPU computes it natively, else float16; none for a CPU.

    Training in float16 needs a gradient scaler, which MONAI's trainer has.
    """
    if torch.device(device).type != "cuda":
        return {}
    return {"dtype": torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16}


def start_distributed(minutes: float = 30) -> None:
    """Join the process group that torchrun describes, unless that is done: nccl on GPUs, gloo on CPUs.

    Args:
        minutes: how long a process waits for another one, before all of them end.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=minutes)
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())


def devices_here() -> list[str]:
    """List the devices that torch can compute on here: cpu, and cuda:0, cuda:1, mps:0 and the like where there are."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()) if found is not None)]


def local_device() -> torch.device:
    """Return this process's GPU, by torchrun's LOCAL_RANK, or the CPU where there is none."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
