"""`native*.cpp`, compiled for this machine's processor when it is first needed, and kept in the user's cache.

Compiling takes the C++ compiler that is there (`CXX`, else g++, c++ or clang++) a few seconds, once. Where there is
none, or it fails, `library` says so and `cpu` does without. The code runs in the OpenMP threads of PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..utils.errors import UserError
from ..utils.files import copy_file
from .backend import CHANNELS_LAST, Moments

SOURCES = sorted(Path(__file__).parent.glob("native*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("native*.h"))
FLAGS = ["-std=c++14", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-Wno-psabi"]
LANES = 16  # channels of a vector
STORED = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
KERNEL_SIZES = (3, 5, 7)


class _Shape(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), ("channels", ctypes.c_int64)] + [
        (name, ctypes.c_int64 * 3) for name in ("fine", "coarse", "kernel", "stride")
    ]


class UnavailableError(RuntimeError):
    """There is no library on this machine; the message says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        UnavailableError: no compiler, it failed, or what it made cannot be loaded.
    """
    compiler = next(
        filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "c++", "clang++"]))), None
    )
    if compiler is None:
        raise UnavailableError("no C++ compiler (CXX, g++, c++, clang++) was found")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        text = [file.read_bytes() for file in (*HEADERS, *SOURCES)]
        key = hashlib.sha256(b"\0".join([*text, version, *map(str.encode, FLAGS), processor()]))
        file = cache() / f"native-{key.hexdigest()[:16]}.so"
        if not file.exists():
            _compile(compiler, file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{compiler} failed: {error.stderr.decode(errors='replace').strip()[-500:]}") from error
    except (OSError, UserError) as error:
        raise UnavailableError(f"the kernels could not be compiled or loaded: {error}") from error


def available() -> bool:
    """Tell whether there is a library."""
    try:
        library()
    except UnavailableError:
        return False
    return True


def processor() -> bytes:
    """Describe the processor, since a home directory may be shared by several."""
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text().splitlines() if flags.exists() else []
    return "\n".join(
        [platform.machine(), *sorted({x for x in lines if x.startswith(("model name", "flags"))})]
    ).encode()


def cache() -> Path:
    """Return the folder for what is compiled and measured, to which nobody else writes.

    Raises:
        OSError: somebody else can, or it cannot be made.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mednext"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        raise OSError(f"{folder} can be written by others; make it yours alone, or set XDG_CACHE_HOME")
    return folder


def _compile(compiler: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        objects, made = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES], str(Path(folder) / file.name)
        commands = [[*FLAGS, "-c", str(source), "-o", o] for source, o in zip(SOURCES, objects, strict=True)]
        # linked without -fopenmp, so that the OpenMP already in the process is used: PyTorch's, and its threads
        for command in [*commands, ["-shared", *objects, "-o", made]]:
            subprocess.run([compiler, *command], capture_output=True, check=True)
        copy_file(made, file)


def _shape(
    n: int, channels: int, fine: Sequence[int], coarse: Sequence[int], kernel: Sequence[int], stride: int
) -> _Shape:
    """Describe a convolution, whose two spatial axes become three, the first of one voxel."""

    def three(values: Sequence[int]) -> ctypes.Array:
        return (ctypes.c_int64 * 3)(*[1] * (3 - len(values)), *values)

    return _Shape(n, channels, three(fine), three(coarse), three(kernel), three([stride] * len(kernel)))


def call(name: str, *arguments: object) -> None:
    """Call a function of the library; tensors are passed by their first element."""
    plain = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(library(), f"mednext_{name}")(*plain)


def parts(*shape: int) -> torch.Tensor:
    """Return zeros for the sums of each thread, in float64: (threads, *shape)."""
    return torch.zeros(library().mednext_threads(), *shape, dtype=torch.float64)


class Native:
    """The operations that oneDNN lacks or does slowly, compiled: see `cpu.Helper`."""

    def suits(self, x: torch.Tensor, edge: int) -> bool:
        """Tell whether the operations take x (N, C, *space) and kernels of that edge."""
        return x.shape[1] % LANES == 0 and edge in KERNEL_SIZES and x.dtype in STORED and available()

    def transposed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, size: Sequence[int]
    ) -> torch.Tensor:
        """Compute the transposed convolution."""
        y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, memory_format=CHANNELS_LAST[x.dim()])
        number = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = weight.detach().to(number).flatten(1).t().contiguous()  # (k^3, C)
        start = bias.detach().to(number).contiguous()
        n, channels = x.shape[:2]
        shape = _shape(n, channels, size, x.shape[2:], weight.shape[2:], stride)
        call("transposed", x, weights, start, y, ctypes.byref(shape), STORED[x.dtype])
        return y

    def weight_gradient(
        self, fine: torch.Tensor, coarse: torch.Tensor, stride: int, weight: torch.Tensor
    ) -> torch.Tensor:
        """Sum products of voxels of both, in float64."""
        n, channels = fine.shape[:2]
        kernel = weight.shape[2:]
        sums = parts(kernel.numel(), channels)
        shape = _shape(n, channels, fine.shape[2:], coarse.shape[2:], kernel, stride)
        call("correlate", fine, coarse, sums, ctypes.byref(shape), STORED[fine.dtype])
        return sums.sum(0).t().reshape(weight.shape).to(weight.dtype)

    def moments(self, x: torch.Tensor) -> Moments:
        """Sum voxels and their squares, in float64."""
        n, channels = x.shape[:2]
        size = x.shape[2:]
        sums = parts(n, 2, channels)
        call("moments", x, sums, ctypes.byref(_shape(n, channels, size, size, [1] * len(size), 1)), STORED[x.dtype])
        mean, squares = (sums.sum(0) / size.numel()).unbind(1)
        return mean, (squares - mean.square()).clamp(min=0)
