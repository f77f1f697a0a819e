"""A table of where Triton was measured to be faster: "auto" takes it there and nowhere else.

`python -m scripts benchmark_gpu` measures blocks of every width on the GPU at hand and keeps what it found in the
user's cache, for this model of GPU and these versions of PyTorch and Triton. Without that file stock operators run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from ..utils.files import write_text
from .native import cache

Function = TypeVar("Function", bound=Callable)

FASTER = 0.95  # of the time of stock operators, at most


def constant(function: Function) -> Function:
    """Let torch.compile call the function once and keep what it returns.

    Does as `torch.compiler.assume_constant_result`, which imports the whole compiler, and Triton, at once.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def key(dtype: torch.dtype, channels: int, kernel_size: int) -> str:
    """Name blocks of one kind in the table."""
    return f"{str(dtype).removeprefix('torch.')} {channels} channels k{kernel_size}"


def faster(x: torch.Tensor, kernel_size: int | None) -> bool:
    """Tell whether Triton takes less time than stock operators for a block on x (N, C, D, H, W)."""
    if kernel_size is None:
        return False  # only whole blocks are measured
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return _faster(x.device, key(dtype, x.shape[1], kernel_size))


@constant
def _faster(device: torch.device, name: str) -> bool:
    return _table(torch.cuda.get_device_name(device)).get(name, 1.0) < FASTER


def table_file(gpu: str) -> Path:
    """Name the file with the table of a GPU.

    Raises:
        OSError: the cache cannot be used, see `native.cache`.
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = "-".join([gpu, torch.__version__, triton])
    return cache() / f"triton-{'-'.join(name.split())}.json"


@functools.cache
def _table(gpu: str) -> dict[str, float]:
    try:
        path = table_file(gpu)
        return json.loads(path.read_text()) if path.exists() else {}
    except OSError:
        return {}


def remember(gpu: str, table: dict[str, float]) -> Path:
    """Keep the times of Triton in those of stock operators, by `key`, adding to what is there."""
    path = table_file(gpu)
    whole = {**_table(gpu), **table}
    write_text(path, json.dumps(whole, indent=1) + "\n")
    forget()
    return path


def forget() -> None:
    """Read the file again when it is next asked for."""
    _table.cache_clear()
