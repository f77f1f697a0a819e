"""The engine room: what MedNeXt spends its time on, each operation as stock PyTorch and as something faster.

Kernels know tensors and no modules. `reference` is the specification, in stock operators that run everywhere; `cpu` is
for CPUs, `gpu` for GPUs, in Triton. All have `depthwise` and `expansion`, with the same arguments and, to rounding, the
same numbers.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import autotune as measured
from . import cpu, reference
from . import triton_ops as gpu

KERNELS = ("auto", "reference", "cpu", "triton")


def check(kernels: str) -> str:
    """Its argument.

    Raises:
        ValueError: it is none of KERNELS.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}.")
    return kernels


def choose(
    kernels: str, x: torch.Tensor, why_not: str | None = None, compiled: bool = True, kernel_size: int | None = None
) -> ModuleType:
    """The module whose operations suit the tensor.

    Args:
        kernels: one of KERNELS; "auto" is "cpu" on a CPU and, where `measured` says that it is faster, "triton" on a
            GPU, if that is possible; else "reference".
        x: (N, C, *space).
        why_not: what about the operation only the reference can do.
        compiled: whether the operation has a part that is compiled, which "cpu" by name insists on.
        kernel_size: of the operation's depthwise convolution, if it has one.

    Raises:
        RuntimeError: what was asked for by name cannot run on this tensor or this machine; says why.
    """
    if kernels == "reference":
        return reference
    ops = gpu if kernels == "triton" or (kernels == "auto" and x.is_cuda) else cpu
    reason = why_not or ops.unsuitable(x, kernel_size)
    if kernels == "auto":
        return reference if reason or (ops is gpu and not measured.faster(x, kernel_size)) else ops
    reason = reason or (cpu.missing(x) if compiled and ops is cpu else None)
    if reason:
        raise RuntimeError(f'kernels="{kernels}" cannot be used: {reason}. Use kernels="auto".')
    return ops
