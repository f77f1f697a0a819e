"""Compiles the Triton kernels for GPUs that are not there: `python -m scripts compile_triton`.

Prints registers a thread, bytes spilled to memory and shared memory of every kernel as the network calls it, which
tells whether tiles fit before a GPU is at hand; it needs no GPU, only Triton with the assembler that comes with it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..utils.errors import UserError
from .cpu import listed

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
LEVELS = ((32, 64, 32), (64, 256, 64))  # channels, hidden channels and channels made of levels 0 and 1
WIDE = (128, 1024, 128)  # level 2, as matrix products


class Call(NamedTuple):
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: tuple
    options: dict[str, Any]

    def source(self) -> Any:
        """Describe the launch to Triton: types, constants, which numbers are multiples of 16 (pointers always)."""
        from triton.compiler import ASTSource

        named = {**dict(zip(self.kernel.arg_names, self.arguments, strict=False)), **self.options}
        signature, constants, hints = {}, {}, {}
        for number, (name, value) in enumerate(named.items()):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            elif name in self.options or value == 1:
                signature[name], constants[name] = "constexpr", value
                continue
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                hints[(number,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, hints)


class _Recorder:
    """Stands in for a kernel and keeps how it is launched."""

    def __init__(self, kernel: Any, calls: list[Call]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append(Call(self.kernel, arguments, options))


def recorded(kernel_size: int, dtype: torch.dtype, side: int = 128) -> list[Call]:
    """Record all launches of the forward and backward passes of blocks with stride 1 and 2 of every kind of level."""
    from ..kernels import triton_depthwise, triton_gradient, triton_mlp, triton_product
    from ..kernels.mlp import Layers

    rows, calls = triton_mlp.ROWS, list[Call]()
    modules = (triton_depthwise, triton_gradient, triton_mlp, triton_product)
    kernels = [(module, name, kernel) for module in modules for name, kernel in _kernels(module)]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, calls))
        weight = torch.empty(32, 1, *[kernel_size] * 3, device="meta")
        x = torch.empty(1, side, side, side, 32, dtype=dtype, device="meta").movedim(-1, 1)
        half = x[:, :, ::2, ::2, ::2].contiguous(memory_format=torch.channels_last_3d)
        triton_depthwise.convolve(x, weight, None, 1, True)
        triton_depthwise.convolve(x, weight, None, 2, True)
        triton_depthwise.transposed(half, weight, None, [side - 1] * 3, True)
        triton_gradient.weight_gradient(x, x, 1, weight)
        triton_gradient.weight_gradient(x, half, 2, weight)
        for channels, hidden, made in (*LEVELS, WIDE):
            y, out = (torch.empty(2, 32**3, n, dtype=dtype, device="meta") for n in (channels, made))
            scale, along = (torch.empty(2, n, device="meta") for n in (channels, hidden))
            first = torch.empty(hidden, channels, dtype=dtype, device="meta")
            second = torch.empty(made, hidden, dtype=dtype, device="meta").expand(2, -1, -1)
            start, end = (torch.empty(n, device="meta") for n in (hidden, made))
            layers = Layers(scale, scale, first, start, second, end)
            rows.forward(y, layers, out, torch.empty_like(out))
            rows.energy(y, layers)
            rows.backward(out, y, layers, None, torch.empty_like(y))
            rows.backward(out, y, layers, along, torch.empty_like(y))
            rows.combine(torch.empty_like(y), y, scale, scale, scale)
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return calls


def _kernels(module: ModuleType) -> Iterator[tuple[str, Any]]:
    from triton.runtime.jit import JITFunction

    return ((name, value) for name, value in vars(module).items() if isinstance(value, JITFunction))


class Usage(NamedTuple):
    """What a kernel takes on one architecture."""

    registers: int  # a thread, at most 255
    spilled: int  # bytes a thread that did not fit
    shared: int  # bytes a program


def compile_call(call: Call, arch: int) -> Usage:
    """Compile for a compute capability times ten, 80 or 90.

    Raises:
        UserError: the assembler failed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    made = triton.compile(call.source(), target=GPUTarget("cuda", arch, 32))
    target = _found(r"\.target (\w+)", made.asm["ptx"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(made.asm["ptx"])
        assembler = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(file), "-o", f"{file}.cubin"]
        done = subprocess.run(assembler, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(assembler)} failed: {done.stderr}")
    registers, spilled = (
        int(_found(pattern, done.stderr)) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return Usage(registers, spilled, made.metadata.shared)


def _found(pattern: str, text: str) -> str:
    """Return the group of the pattern, which the text has in every version that is known."""
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text}"
    return match[1]


def report(
    arch: Sequence[int] = (80, 90), kernel_size: Sequence[int] = (3, 5, 7), dtype: str = "bfloat16"
) -> dict[tuple, dict[int, Usage]]:
    """Compile every kernel as it is called and prints a Markdown table.

    Args:
        arch: compute capabilities times ten.
        kernel_size: of depthwise convolutions.
        dtype: float32, float16 or bfloat16.

    Returns:
        Usage by kernel with its constants, and by architecture.

    Raises:
        UserError: Triton is not there, or interprets.
    """
    from ..kernels import triton_ops

    if not triton_ops.INSTALLED or triton_ops.interpreted():
        raise UserError("kernels are compiled by Triton: pip install triton, and unset TRITON_INTERPRET.")
    found: dict[tuple, dict[int, Usage]] = {}
    arch, kernel_size = listed(arch), listed(kernel_size)
    for k in kernel_size:
        for call in recorded(k, getattr(torch, dtype)):
            key = (
                call.kernel.__name__,
                *(f"{name}={value}" for name, value in call.options.items() if name != "PRECISION"),
            )
            if key not in found:
                found[key] = {a: compile_call(call, a) for a in arch}
    print("| kernel |" + "".join(f" sm_{a}: registers, spilled, shared |" for a in arch))
    print("|---|" + "---|" * len(arch))
    for (name, *options), usage in found.items():
        print(
            f"| {name} {' '.join(options)} |"
            + "".join(f" {u.registers}, {u.spilled}, {u.shared} |" for u in usage.values())
        )
    return found
