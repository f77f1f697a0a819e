"""MedNeXt's speed on this CPU beside other implementations: `python -m scripts benchmark_cpu`.

Every implementation runs in a process of its own, and one after another within a round, so that whatever else the
machine does meets all of them alike. The tests of the kernels run first; if one fails, nothing is measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..inference.environment import peak_memory, reset_peak
from ..kernels.cpu_mlp import linear
from ..mednext import KERNEL_SIZES, create_mednext_v1
from ..utils.device import set_cpu_defaults
from ..utils.errors import UserError
from ..utils.files import check_writable, write_text
from .runtimes import PACKAGES, Compiling, installed, onnxruntime, openvino

TURN = 3.0  # seconds that a task is repeated for, at least
ROOT = Path(__file__).resolve().parents[2]


class Task(NamedTuple):
    """Describes a training step or a forward pass that is timed, with one input channel and three classes."""

    trains: bool
    shape: tuple[int, ...]  # N, C, D, H, W


TASKS = {
    "step": Task(True, (2, 1, 48, 64, 48)),  # forward, backward and AdamW, with deep supervision
    "64": Task(False, (1, 1, 64, 64, 64)),
    "128": Task(False, (1, 1, 128, 128, 128)),
}


class Contender(NamedTuple):
    """Names an implementation, with the memory format, precision and allocator it runs with."""

    label: str
    builder: str  # a key of BUILDERS
    channels_last: bool = False
    bfloat16: bool = False  # autocast
    keeps_memory: bool = False  # that was freed, as `set_cpu_defaults` tells the allocator and the commands do
    trains: bool = True  # else it takes part in forward passes alone

    def takes(self, task: Task) -> bool:
        """Tell whether it can do a task."""
        return self.trains or not task.trains

    def is_here(self, original: str | None) -> bool:
        """Tell whether its packages are installed, or the checkout of the original is named."""
        runtime = self.builder.split()[0]
        return installed(runtime) if runtime in PACKAGES else self.builder != "original" or original is not None


CONTENDERS = [
    Contender("original", "original"),
    Contender("original, memory kept", "original", keeps_memory=True),
    Contender("original, channels last, memory kept", "original", channels_last=True, keeps_memory=True),
    Contender("original, bfloat16, memory kept", "original", bfloat16=True, keeps_memory=True),
    Contender("MONAI", "monai"),
    Contender("MONAI, memory kept", "monai", keeps_memory=True),
    Contender("ONNX Runtime", "onnxruntime", trains=False),
    Contender("OpenVINO", "openvino", trains=False),
    Contender("OpenVINO, bfloat16", "openvino bfloat16", bfloat16=True, trains=False),
    Contender("ours, reference, memory kept", "reference", keeps_memory=True),
    Contender("ours, memory not kept", "ours"),
    Contender("ours", "ours", keeps_memory=True),
    Contender("ours, bfloat16", "ours", bfloat16=True, keeps_memory=True),
]


Builder = Callable[[str, int, str | None], nn.Module]  # of size, kernel size and a checkout of the original


def _original(size: str, kernel_size: int, checkout: str | None) -> nn.Module:
    """Build the network of a checkout of MIC-DKFZ/MedNeXt, without the rest of that package and what it needs."""
    package = types.ModuleType("nnunet_mednext")
    assert checkout is not None  # else it takes no part
    package.__path__ = [str(Path(checkout) / "nnunet_mednext")]
    sys.modules["nnunet_mednext"] = package
    from nnunet_mednext.network_architecture.mednextv1.create_mednext_v1 import create_mednext_v1 as create

    return create(1, 3, size, kernel_size, deep_supervision=True)


def _monai(size: str, kernel_size: int, checkout: str | None) -> nn.Module:
    from monai.networks.nets.mednext import create_mednext

    return create_mednext(size, 3, 1, 3, kernel_size, deep_supervision=True)


def _with(kernels: str) -> Builder:
    return lambda size, kernel_size, checkout: create_mednext_v1(
        1, 3, size, kernel_size, deep_supervision=True, kernels=kernels
    )


BUILDERS: dict[str, Builder] = {
    "original": _original,
    "monai": _monai,
    "reference": _with("reference"),
    "ours": _with("auto"),
    "triton": _with("triton"),
    "onnxruntime": lambda *options: Compiling(_with("reference")(*options), onnxruntime),
    "openvino": lambda *options: Compiling(_with("reference")(*options), openvino("f32")),
    "openvino bfloat16": lambda *options: Compiling(_with("reference")(*options), openvino("bf16")),
}


def serve(contender: Contender, size: str, kernel_size: int, tasks: Sequence[str], checkout: str | None) -> None:
    """Read names of tasks from standard input, write `[seconds, peak bytes]` for each as a line of JSON.

    A turn repeats its task for TURN seconds at least, and its last run counts: processes have waited before.
    """
    if contender.keeps_memory:
        set_cpu_defaults("cpu")
    torch.manual_seed(0)
    network = BUILDERS[contender.builder](size, kernel_size, checkout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-4)
    images = {name: torch.randn(TASKS[name].shape) for name in tasks}
    if contender.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # its stub lacks it
        images = {name: image.contiguous(memory_format=torch.channels_last_3d) for name, image in images.items()}

    def run(task: Task, image: torch.Tensor) -> None:
        network.train(task.trains)
        autocast = torch.autocast("cpu", torch.bfloat16) if contender.bfloat16 else nullcontext()
        with torch.set_grad_enabled(task.trains), autocast:
            outputs = network(image)
        if task.trains:
            optimizer.zero_grad()
            sum(y.float().square().mean() for y in outputs).backward()
            optimizer.step()

    for line in sys.stdin:
        name = line.strip()
        reset_peak()
        begun = time.perf_counter()
        while True:
            start = time.perf_counter()
            run(TASKS[name], images[name])
            end = time.perf_counter()
            if end - begun > TURN:
                break
        print(json.dumps([end - start, peak_memory()]), flush=True)


class _Worker:
    """Runs what it is told to of one implementation, in a process of its own."""

    def __init__(self, *job: object) -> None:
        code = "import json, sys; from scripts.benchmarks.cpu import Contender, serve; "
        code += "c, *job = json.loads(sys.argv[1]); serve(Contender(*c), *job)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(self, task: str) -> tuple[float, int]:
        assert self.process.stdout is not None  # a pipe, as stdin is
        try:
            print(task, file=self.process.stdin, flush=True)
            seconds, peak = json.loads(self.process.stdout.readline())
            return seconds, peak
        except (BrokenPipeError, json.JSONDecodeError) as e:
            raise UserError("an implementation failed; its error is above.") from e

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def multiplications(size: str, kernel_size: int, task: Task) -> int:
    """Count multiply-adds of a task, of convolutions, which are over 99 %; backward takes twice a forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = create_mednext_v1(1, 3, size, kernel_size, deep_supervision=True, kernels="reference")
        network.train(task.trains)(torch.empty(task.shape))
    return counter.get_total_flops() // 2 * (3 if task.trains else 1)


def peak_rate(dtype: torch.dtype) -> float:
    """Measure the multiply-adds a second of the best matrix product, by PyTorch's library for them or by oneDNN."""
    a, b, seconds = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype), []
    for product in [lambda: a @ b, lambda: linear(a, b)] * 10:
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2048**3 / min(seconds)


def require_green(file: str) -> None:
    """Run tests of kernels.

    Raises:
        UserError: one failed.
    """
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", file], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the tests of the kernels fail, so nothing is measured:\n{(done.stdout + done.stderr).strip()[-2000:]}\n"
            "They take pip install -r requirements-dev.txt and a checkout of the bundle."
        )


def listed(values: object) -> list:
    """Return the values of a command line as a list, which one value alone is not."""
    return list(values) if isinstance(values, list | tuple) else [values]


def check_arguments(original: str | None, **known: tuple[Sequence, Iterable]) -> None:
    """Compare arguments by name, as (given, possible).

    Raises:
        UserError: a value is not possible, or `original` is no checkout of MIC-DKFZ/MedNeXt.
    """
    for name, (given, possible) in known.items():
        if not {*given} <= {*possible}:
            raise UserError(f"{name} is {given}; expected some of {', '.join(map(str, possible))}.")
    if original is not None and not (Path(original) / "nnunet_mednext/network_architecture/mednextv1").is_dir():
        raise UserError(f"{original} is no checkout of MIC-DKFZ/MedNeXt: it has no nnunet_mednext with MedNeXt v1.")


def bench(
    sizes: Sequence[str] = ("S", "B"),
    kernel_sizes: Sequence[int] = (3, 5),
    tasks: Sequence[str] = tuple(TASKS),
    rounds: int = 3,
    original: str | None = None,
    output: str | None = None,
) -> None:
    """Print a table in Markdown with a row for each task, network and implementation.

    It has median and spread of seconds, how many times as fast that is as the first implementation, peak memory, and
    the share of the arithmetic limit.

    Args:
        sizes: rows of the paper's table.
        kernel_sizes: depthwise kernels.
        tasks: some of TASKS: "step", a training step of 2 x 48 x 64 x 48 voxels; "64" and "128", a forward pass of one
            cube of that edge.
        rounds: how often each is timed, after once to warm up.
        original: folder of a checkout of MIC-DKFZ/MedNeXt, whose network is then compared too.
        output: a file for the table.

    Raises:
        UserError: an argument is none of its values, or a test of the kernels failed.
    """
    sizes, kernel_sizes, tasks = map(listed, (sizes, kernel_sizes, tasks))
    tasks = [str(task) for task in tasks]
    check_arguments(original, sizes=(sizes, "SBML"), kernel_sizes=(kernel_sizes, KERNEL_SIZES), tasks=(tasks, TASKS))
    if output is not None:
        check_writable(Path(output).parent)
    require_green("tests/kernels/test_cpu.py")
    lines = _table(sizes, kernel_sizes, tasks, rounds, original)
    if output is not None:
        write_text(output, "\n".join(lines) + "\n")


def _table(
    sizes: Sequence[str], kernel_sizes: Sequence[int], tasks: Sequence[str], rounds: int, original: str | None
) -> list[str]:
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    rates = {bfloat16: peak_rate(torch.bfloat16 if bfloat16 else torch.float32) for bfloat16 in (False, True)}
    say(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, Python {platform.python_version()}; matrix products reach"
        f" {rates[False] / 1e9:.0f} (float32) and {rates[True] / 1e9:.0f} (bfloat16) G multiply-adds/s."
        f" Medians of {rounds}."
    )
    say("")
    say("| task | network | implementation | seconds | from .. to | times as fast | peak memory | share of the limit |")
    say("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        for kernel_size in kernel_sizes:
            found = _measured(size, kernel_size, tasks, rounds, original)
            for name in tasks:
                least = multiplications(size, kernel_size, TASKS[name])
                baseline = math.nan
                for contender, runs in ((c, r[name]) for c, r in found.items() if r[name]):
                    seconds = [run[0] for run in runs]
                    median = statistics.median(seconds)
                    baseline = median if math.isnan(baseline) else baseline
                    say(
                        f"| {name} | {size} k{kernel_size} | {contender.label} | {median:.2f} |"
                        f" {min(seconds):.2f} .. {max(seconds):.2f} | {baseline / median:.1f} |"
                        f" {max(run[1] for run in runs) / 2**30:.1f} GiB |"
                        f" {least / rates[contender.bfloat16] / median:.0%} |"
                    )
    return lines


def _measured(
    size: str, kernel_size: int, tasks: Sequence[str], rounds: int, original: str | None
) -> dict[Contender, dict[str, list[tuple[float, int]]]]:
    taking_part = [c for c in CONTENDERS if c.is_here(original)]
    workers = {c: _Worker(c, size, kernel_size, tasks, original) for c in taking_part}
    found: dict = {c: {name: [] for name in tasks} for c in taking_part}
    try:
        for name in tasks:
            for number in range(rounds + 1):
                for contender, worker in ((c, w) for c, w in workers.items() if c.takes(TASKS[name])):
                    run = worker.run(name)
                    if number:
                        found[contender][name].append(run)
    finally:
        for worker in workers.values():
            worker.stop()
    return found
