"""Norm, expansion, GELU, compression and residual on a CPU in the C++ of `native_mlp.cpp`; see `mlp.Rows`."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import native
from .backend import Weights
from .mlp import Layers

SUMS = 2**21  # most bytes of gradients of weights that a thread sums up; more would not stay in its cache
VOXELS = 192  # that a thread needs at least, to make up for laying out the weights


class _Mlp(ctypes.Structure):
    """What `Mlp` of native_mlp.cpp holds: three matrices' sizes, and where tensors begin."""

    _fields_ = [(name, ctypes.c_int64) for name in ("voxels", "channels", "hidden", "made")] + [
        (name, ctypes.c_void_p)
        for name in (
            *("y", "first", "second", "first_back", "second_back", "residual", "g"),
            *("scale", "shift", "start", "end", "along", "out", "dz", "sums"),
        )
    ]


class NativeRows:
    """Computes rows in C++, float32 and bfloat16; see `mlp.Rows`."""

    def suits(self, y: Tensor, weights: Weights, trains: bool) -> bool:
        """Tell whether it computes the rows of y (N, C, *space) well, and with `trains` their gradients.

        What it leaves are channels that fill no vector, precisions that the processor multiplies faster otherwise, and
        gradients of more weights, or of fewer voxels, than pay.
        """
        if y.dtype not in (torch.float32, torch.bfloat16) or not native.available():
            return False
        if y.dtype == torch.bfloat16 and not _multiplies_bfloat16():
            return False
        (made, hidden), channels, voxels = weights.w2.shape, y.shape[1], y.shape[2:].numel()
        if any(number % native.LANES for number in (channels, made, hidden)):
            return False
        sums = (channels + made) * hidden * 8
        return not trains or (sums <= SUMS and voxels >= VOXELS * torch.get_num_threads())

    def energy(self, y: Tensor, layers: Layers) -> Tensor:
        """Sum the squares of hidden over the voxels."""
        found = []
        for n, rows in enumerate(y):
            sums = native.parts(len(layers.first))
            _run("energy", rows, layers, n, sums=sums)
            found.append(sums.sum(0))
        return torch.stack(found).to(layers.scale.dtype)

    def forward(self, y: Tensor, layers: Layers, residual: Tensor | None, out: Tensor) -> None:
        """Fill out."""
        for n, rows in enumerate(y):
            _run("forward", rows, layers, n, residual=None if residual is None else residual[n], out=out[n])

    def backward(
        self, g: Tensor, y: Tensor, layers: Layers, along: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of the layers, and that of z."""
        (hidden, channels), made = layers.first.shape, len(layers.end)
        sizes = [channels * hidden, made * hidden, hidden, made]
        found, first_back = [], layers.first.t().contiguous()
        for n, rows in enumerate(y):
            sums = native.parts(sum(sizes))
            tensors = {"along": None if along is None else along[n], "dz": None if dz is None else dz[n]}
            back = {"first_back": first_back, "second_back": layers.second[n].t()}
            _run("backward", rows, layers, n, g=g[n], sums=sums, **back, **tensors)
            first, second, start, end = sums.sum(0).to(layers.scale.dtype).split(sizes)
            found.append((first.view(channels, hidden).t(), start, second.view(made, hidden), end))
        return tuple(map(torch.stack, zip(*found, strict=True)))

    def combine(self, dz: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        """Turn dz into dz * a + y * b + c."""
        for n, rows in enumerate(y):
            _call("combine", rows, (0, 0), {"dz": dz[n], "scale": a[n], "shift": b[n], "start": c[n]})


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Tell whether vectors of the processor do, and no matrix unit (AMX), which oneDNN uses, is still faster."""
    return bool(native.library().mednext_multiplies_bfloat16()) and b"amx_bf16" not in native.processor()


def _run(name: str, rows: Tensor, layers: Layers, n: int, **tensors: Tensor | None) -> None:
    """Compute rows (voxels, C) of case n with its layers."""
    of_case = layers._replace(scale=layers.scale[n], shift=layers.shift[n], second=layers.second[n])
    _call(name, rows, (len(layers.first), len(layers.end)), of_case._asdict() | tensors)


def _call(name: str, y: Tensor, sizes: tuple[int, int], tensors: dict[str, Tensor | None]) -> None:
    held = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
    given = {key: tensor.data_ptr() for key, tensor in held.items()}
    (voxels, channels), (hidden, made) = y.shape, sizes
    call = _Mlp(voxels=voxels, channels=channels, hidden=hidden, made=made, y=y.data_ptr(), **given)
    native.call(f"mlp_{name}", ctypes.byref(call), native.STORED[y.dtype])
