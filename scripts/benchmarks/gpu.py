"""MedNeXt's speed on this GPU beside other implementations: `python -m scripts benchmark_gpu`.

The tests of the kernels run on the GPU first; if one fails, nothing is measured. Every figure comes from a process of
its own, so that one that runs out of memory says so and takes nothing from the next.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from ..mednext import KERNEL_SIZES
from ..training.losses import SegmentationLoss
from ..utils.errors import UserError
from ..utils.files import check_writable, write_text
from .cpu import BUILDERS, ROOT, Task, check_arguments, listed, require_green
from .gpu_operations import block_ratios, half_precision, kernel_table, measure_limits, seconds, synchronise
from .gpu_report import NAMES, markdown, row

DEEP_SUPERVISION = tuple(w / 31 for w in (16, 8, 4, 2, 1))
MODES = ("eager", "compiled")
DEVICES = ("cuda", "cpu")


class Job(NamedTuple):
    """One figure: which network, what it does, how."""

    implementation: str  # a key of BUILDERS
    size: str
    kernel_size: int
    batch: int
    trains: bool
    compiled: bool
    patch: int
    runs: int
    device: str
    original: str | None

    @property
    def task(self) -> Task:
        return Task(self.trains, (self.batch, 1, *[self.patch] * 3))


def _runner(job: Job) -> Callable[[], None]:
    """Prepare a training step (bfloat16 autocast, deep-supervision loss, AdamW) or a forward pass of a window."""
    torch.manual_seed(0)
    network = BUILDERS[job.implementation](job.size, job.kernel_size, job.original).to(job.device).train(job.trains)
    called = torch.compile(network) if job.compiled else network
    image = torch.randn(job.task.shape, device=job.device)
    label = torch.randint(3, job.task.shape, device=job.device)
    labels = [label[:, :, :: 2**i, :: 2**i, :: 2**i] for i in range(len(DEEP_SUPERVISION))]
    loss, optimizer = SegmentationLoss(), torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-4, fused=True)

    def run() -> None:
        with torch.set_grad_enabled(job.trains), torch.autocast(job.device, half_precision(job.device)):
            outputs = called(image)
        if job.trains:
            optimizer.zero_grad()
            sum(w * loss(y, t) for w, y, t in zip(DEEP_SUPERVISION, outputs, labels, strict=True)).backward()
            optimizer.step()

    return run


def run_job(job: Job) -> None:
    """Print a line of JSON: seconds of each run, peak bytes, and shares of the device's time by kernel.

    Where memory runs out, the line says that.
    """
    cuda = job.device == "cuda"
    try:
        run = _runner(job)
        found: dict[str, Any] = {"seconds": seconds(run, job.runs, job.device)}
        found["peak"] = torch.cuda.max_memory_allocated() if cuda else None
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            run()
            synchronise(job.device)
        found["kernels"] = shares(profiler)
    except torch.cuda.OutOfMemoryError:
        found = {"failed": "out of memory"}
    print(json.dumps(found), flush=True)


def shares(profiler: profile, largest: int = 8) -> dict[str, float]:
    """Tell which share of all time the largest kernels take, by name."""
    events = profiler.key_averages()
    times = {e.key: e.self_device_time_total or e.self_cpu_time_total for e in events}
    total = sum(times.values()) or 1
    ranked = sorted(times, key=times.__getitem__, reverse=True)[:largest]
    return {re.sub(r"[<(].*", "", name): times[name] / total for name in ranked}


def _ask(job: Job) -> dict[str, Any]:
    code = "import json, sys; from scripts.benchmarks.gpu import Job, run_job; run_job(Job(*json.loads(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def bench(
    sizes: Sequence[str] = ("S", "B", "M", "L"),
    kernel_sizes: Sequence[int] = (3, 5),
    batches: Sequence[int] = (1, 2),
    modes: Sequence[str] = MODES,
    patch: int = 128,
    runs: int = 10,
    original: str | None = None,
    output_dir: str = "docs/benchmarks",
    device: str = "cuda",
) -> None:
    """Time training steps and forward passes, and write `gpu_<name>_<date>.json` and `.md`.

    They have all implementations, eager and compiled, with the largest kernels of each; every operation of a block by
    itself; and, where it is a GPU, what `kernels="auto"` then measures anew of every kind of block, and remembers.

    Args:
        sizes: rows of the paper's table.
        kernel_sizes: depthwise kernels.
        batches: patches a step.
        modes: some of MODES: as it is, and through torch.compile.
        patch: edge of the patches in voxels.
        runs: how many count, after some to warm up.
        original: folder of a checkout of MIC-DKFZ/MedNeXt, whose network is then compared too.
        output_dir: for the two files.
        device: "cuda"; "cpu" tries the command itself out.

    Raises:
        UserError: an argument is none of its values, there is no GPU, or a test of the kernels failed.
    """
    sizes, kernel_sizes, batches, modes = map(listed, (sizes, kernel_sizes, batches, modes))
    possible = {"sizes": (sizes, "SBML"), "kernel_sizes": (kernel_sizes, KERNEL_SIZES), "modes": (modes, MODES)}
    check_arguments(original, **possible, device=([device], DEVICES))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that PyTorch can use here; --device cpu tries the command out.")
    folder = Path(output_dir)
    check_writable(folder)
    if device == "cuda":
        require_green("tests/kernels/test_triton.py")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()}-core CPU"
    best = measure_limits(device)
    report: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "monai": version("monai"),
        "python": platform.python_version(),
        "date": str(datetime.date.today()),
        "command": " ".join(["python -m scripts benchmark_gpu", *sys.argv[1:]]),
        "bandwidth": best.bandwidth,
        "rate": best.rate,
        "patch": patch,
        "runs": runs,
        "networks": [],
    }
    implementations = [i for i in NAMES if (i != "original" or original) and (i != "triton" or device == "cuda")]
    file = folder / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '-', name)}_{report['date']}"
    for size, k, batch, trains, who, mode in product(
        sizes, kernel_sizes, batches, (True, False), implementations, modes
    ):
        job = Job(who, size, k, batch, trains, mode == "compiled", patch, runs, device, original)
        report["networks"].append({**job._asdict(), **_ask(job)})
        print(row(report["networks"], report["networks"][-1], best), flush=True)
        write_text(file.with_suffix(".json"), json.dumps(report, indent=1))
    report["kernels"] = kernel_table(2, kernel_sizes, patch, best, runs, device)
    if device == "cuda":
        report["blocks"] = block_ratios(sizes, kernel_sizes, batches, patch, device)
    write_text(file.with_suffix(".json"), json.dumps(report, indent=1))
    write_text(file.with_suffix(".md"), markdown(report))
    print(f"wrote {file}.json and .md")
