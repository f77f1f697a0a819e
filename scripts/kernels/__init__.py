"""What MedNeXt spends its time on, each operation as stock PyTorch and as something faster.

Kernels know tensors and no modules. A `Backend` computes the operations of a block: `reference` in stock operators that
run everywhere, which is the specification; `cpu` for CPUs; `triton` for GPUs.
"""

from __future__ import annotations

from torch import Tensor

from .autotune import Tuner
from .backend import Backend, BlockKind
from .cpu import Cpu
from .reference import Reference
from .triton_ops import Triton

REFERENCE, CPU, TRITON = Reference(), Cpu(), Triton()
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, CPU, TRITON)}
KERNELS = ("auto", *BACKENDS)
TUNER = Tuner([TRITON])


def check_kernels(kernels: str) -> str:
    """Return the name of a backend, or "auto", as it is.

    Raises:
        ValueError: it is none of KERNELS.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}.")
    return kernels


def choose_kernels(
    kernels: str, x: Tensor, why_not: str | None = None, compiled: bool = True, block: BlockKind | None = None
) -> Backend:
    """Choose the backend that suits the tensor.

    Args:
        kernels: one of KERNELS; "auto" is "cpu" on a CPU and, for a whole block that it is measured to be faster for
            (see `autotune`), "triton" on a GPU, if that is possible; else "reference".
        x: (N, C, *space).
        why_not: what about the operation only the reference can do.
        compiled: whether the operation has a part that is compiled, which "cpu" by name insists on.
        block: what the operation is, if it is a block.

    Raises:
        RuntimeError: what was asked for by name cannot run on this tensor or this machine; says why.
    """
    if kernels == REFERENCE.name:
        return REFERENCE
    kernel_size = None if block is None else block.kernel_size
    if kernels == "auto":
        if x.is_cuda:
            return REFERENCE if why_not or block is None else TUNER.choose(x, block) or REFERENCE
        return REFERENCE if why_not or CPU.unsuitable(x, kernel_size) else CPU
    backend = BACKENDS[check_kernels(kernels)]
    reason = why_not or backend.unsuitable(x, kernel_size) or (backend.incomplete(x) if compiled else None)
    if reason:
        raise RuntimeError(f'kernels="{kernels}" cannot be used: {reason}. Use kernels="auto".')
    return backend
