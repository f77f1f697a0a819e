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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..blocks import MedNeXtBlock
from ..kernels import autotune as measured
from ..kernels import reference
from ..kernels import triton_ops as gpu
from ..kernels.reference import Weights, channels_last
from ..mednext import KERNEL_SIZES
from ..training.losses import SegmentationLoss
from ..utils.errors import UserError
from .cpu import BUILDERS, ROOT, Task, check, listed, multiplications, test

LEVELS = ((32, 1), (64, 2), (128, 4), (256, 8), (512, 16))  # channels, and by what the patch is smaller
DEEP_SUPERVISION = tuple(w / 31 for w in (16, 8, 4, 2, 1))
WARMUP = 5  # runs that do not count
MODES = ("eager", "compiled")
DEVICES = ("cuda", "cpu")
NAMES = {"original": "original", "monai": "MONAI", "reference": "ours, reference", "triton": "ours, Triton"}


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


# ---- one process: one figure


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], runs: int, device: str, warmup: int = WARMUP) -> list[float]:
    """Of each run, with the device idle before and after."""
    found = []
    for number in range(warmup + runs):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        if number >= warmup:
            found.append(time.perf_counter() - start)
    return found


def _half(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cpu" or torch.cuda.is_bf16_supported() else torch.float16


def _runner(job: Job) -> Callable[[], None]:
    """A training step (bfloat16 autocast, deep-supervision loss, AdamW) or a forward pass of a window."""
    torch.manual_seed(0)
    network = BUILDERS[job.implementation](job.size, job.kernel_size, job.original).to(job.device).train(job.trains)
    called = torch.compile(network) if job.compiled else network
    image = torch.randn(job.task.shape, device=job.device)
    label = torch.randint(3, job.task.shape, device=job.device)
    labels = [label[:, :, :: 2**i, :: 2**i, :: 2**i] for i in range(len(DEEP_SUPERVISION))]
    loss, optimizer = SegmentationLoss(), torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-4, fused=True)

    def run() -> None:
        with torch.set_grad_enabled(job.trains), torch.autocast(job.device, _half(job.device)):
            outputs = called(image)
        if job.trains:
            optimizer.zero_grad()
            sum(w * loss(y, t) for w, y, t in zip(DEEP_SUPERVISION, outputs, labels, strict=True)).backward()
            optimizer.step()

    return run


def work(job: Job) -> None:
    """Prints a line of JSON: seconds of each run, peak bytes, and shares of the device's time by kernel; or that memory
    ran out."""
    cuda = job.device == "cuda"
    try:
        run = _runner(job)
        found = {"seconds": seconds(run, job.runs, job.device)}
        found["peak"] = torch.cuda.max_memory_allocated() if cuda else None
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            run()
            _synchronise(job.device)
        found["kernels"] = shares(profiler)
    except torch.cuda.OutOfMemoryError:
        found = {"failed": "out of memory"}
    print(json.dumps(found), flush=True)


def shares(profiler: profile, largest: int = 8) -> dict[str, float]:
    """Which share of all time the largest kernels take, by name."""
    events = profiler.key_averages()
    times = {e.key: e.self_device_time_total or e.self_cpu_time_total for e in events}
    total = sum(times.values()) or 1
    ranked = sorted(times, key=times.get, reverse=True)[:largest]
    return {re.sub(r"[<(].*", "", name): times[name] / total for name in ranked}


# ---- the process that asks


def _ask(job: Job) -> dict:
    code = "import json, sys; from scripts.benchmarks.gpu import Job, work; work(Job(*json.loads(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


class Limits(NamedTuple):
    """What this device reaches at best: measured, not the vendor's."""

    bandwidth: float  # bytes a second, read and written
    rate: float  # multiply-adds a second of matrix products in half precision


def limits(device: str) -> Limits:
    """By copying a GiB, and by a product of two large matrices (smaller ones on a CPU)."""
    dtype, edge, size = (_half(device), 8192, 2**30) if device == "cuda" else (torch.float32, 512, 2**24)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), torch.randn(edge, edge, device=device).to(dtype)
    copying, multiplying = (min(seconds(run, 10, device)) for run in (lambda: target.copy_(source), lambda: a @ a))
    return Limits(2 * size / copying, edge**3 / multiplying)


class Kernel(NamedTuple):
    """An operation on one level's activations, of which each must be read or written at least `passes` times."""

    name: str
    run: Callable[[], object]
    passes: float
    multiplications: float  # of one voxel and channel


def _kernels(
    channels: int, side: int, kernel_size: int, ratio: int, ops, dtype: torch.dtype, device: str
) -> list[Kernel]:
    """Forward and backward passes of the operations on one patch."""
    x = channels_last(torch.randn(1, channels, side, side, side, device=device).to(dtype)).requires_grad_()
    convolution = nn.Conv3d(channels, channels, kernel_size, groups=channels).to(device)
    block = MedNeXtBlock(channels, channels, ratio, kernel_size).to(device)
    weight, bias = convolution.weight, convolution.bias
    matrices = (block.conv2.weight.flatten(1), block.conv2.bias, block.conv3.weight.flatten(1), block.conv3.bias)
    weights = Weights(block.norm.weight, block.norm.bias, *matrices)
    if ops is reference:  # has no mixed precision of its own
        weight, bias, *rest = (t.to(dtype) for t in (weight, bias, *weights[:6]))
        weights = Weights(*rest)
    y, moments = ops.depthwise(x, weight, bias)
    y = y.detach().requires_grad_()
    out, made = ops.depthwise(x, weight, bias)[0], ops.expansion(y, weights, 1e-5, False, x, moments)
    g = torch.randn_like(out)

    def back(of: torch.Tensor, *inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(of, inputs, g, retain_graph=True)

    taps, products = kernel_size**3, 2 * ratio * channels
    return [
        Kernel("depthwise", lambda: ops.depthwise(x.detach(), weight, bias), 2, taps),
        Kernel("depthwise, input gradient", back(out, x), 2, taps),
        Kernel("depthwise, weight gradient", back(out, weight), 2, taps),
        Kernel("expansion", lambda: ops.expansion(y.detach(), weights, 1e-5, False, x.detach(), moments), 3, products),
        Kernel("expansion, backward", back(made, y, *weights[:6]), 3, 2 * products),
    ]


def kernel_table(
    ratio: int, kernel_sizes: Sequence[int], patch: int, best: Limits, runs: int, device: str
) -> list[dict]:
    """Every operation of every level by itself: time, and the share of what the device reaches at best."""
    found, dtype = [], _half(device) if device == "cuda" else torch.float32
    for channels, smaller in LEVELS:
        side = patch // smaller
        for k in kernel_sizes:
            for name, ops in (("reference", reference), ("triton", gpu)):
                if ops is gpu and gpu.unsuitable(torch.empty(1, channels, 1, 1, 1, dtype=dtype, device=device)):
                    continue
                for kernel in _kernels(channels, side, k, ratio, ops, dtype, device):
                    taken = statistics.median(seconds(kernel.run, runs, device))
                    size = channels * side**3
                    bandwidth = kernel.passes * size * dtype.itemsize / taken / best.bandwidth
                    rate = kernel.multiplications * size / taken / best.rate
                    row = {
                        "kernel": kernel.name,
                        "channels": channels,
                        "side": side,
                        "k": k,
                        "ops": name,
                        "ms": taken * 1e3,
                    }
                    found.append({**row, "bandwidth": bandwidth, "rate": rate})
    return found


def block_ratios(kernel_sizes: Sequence[int], patch: int, runs: int, device: str) -> dict[str, float]:
    """Time of blocks with Triton in that with stock operators, forward and backward, by `measured.key`.

    Kernel size 1 stands for a 1x1x1 convolution, which is measured with the block of the first size.
    """
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels, smaller in LEVELS:
            x = torch.randn(1, channels, *[patch // smaller] * 3, device=device, requires_grad=True)
            for k in kernel_sizes:
                block = MedNeXtBlock(channels, channels, 2, k).to(device)

                def run(block=block, x=x, dtype=dtype) -> None:
                    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                        block(x).float().square().mean().backward()

                times = []
                for block.kernels in ("reference", "triton"):
                    times.append(statistics.median(seconds(run, runs, device)))
                found[measured.key(dtype, channels, k)] = times[1] / times[0]
            found[measured.key(dtype, channels, 1)] = found[measured.key(dtype, channels, kernel_sizes[0])]
    return found


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
    """Writes `gpu_<name>_<date>.json` and `.md`: training steps and forward passes of all implementations, eager and
    compiled, with the largest kernels of each; every operation of a block by itself; and, where it is a GPU, for which
    blocks `kernels="auto"` takes Triton from then on.

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
    check(original, **possible, device=([device], DEVICES))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that PyTorch can use here; --device cpu tries the command out.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        test("tests/kernels/test_triton.py")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()}-core CPU"
    best = limits(device)
    report = {
        "device": name,
        "torch": torch.__version__,
        "monai": version("monai"),
        "python": platform.python_version(),
    }
    report |= {
        "date": str(datetime.date.today()),
        "command": " ".join(["python -m scripts benchmark_gpu", *sys.argv[1:]]),
    }
    report |= {"bandwidth": best.bandwidth, "rate": best.rate, "patch": patch, "runs": runs, "networks": []}
    implementations = [i for i in NAMES if (i != "original" or original) and (i != "triton" or device == "cuda")]
    file = folder / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '-', name)}_{report['date']}"
    for size, k, batch, trains, who, mode in product(
        sizes, kernel_sizes, batches, (True, False), implementations, modes
    ):
        job = Job(who, size, k, batch, trains, mode == "compiled", patch, runs, device, original)
        report["networks"].append({**job._asdict(), **_ask(job)})
        print(row(report["networks"], report["networks"][-1], best), flush=True)
        file.with_suffix(".json").write_text(json.dumps(report, indent=1))
    report["kernels"] = kernel_table(2, kernel_sizes, patch, best, runs, device)
    if device == "cuda":
        report["blocks"] = block_ratios(kernel_sizes, patch, runs, device)
        measured.remember(name, report["blocks"])
    file.with_suffix(".json").write_text(json.dumps(report, indent=1))
    file.with_suffix(".md").write_text(markdown(report))
    print(f"wrote {file}.json and .md")


def row(networks: list[dict], job: dict, best: Limits) -> str:
    """A line of the table; the first figure of the same network and task is the one to compare with."""
    same = ("size", "kernel_size", "batch", "trains", "patch")
    first = next(j for j in networks if all(j[key] == job[key] for key in same))
    label = f"| {'step' if job['trains'] else 'forward'} | {job['size']} k{job['kernel_size']} | {job['batch']} "
    label += f"| {NAMES[job['implementation']]}{', compiled' * job['compiled']} |"
    if "failed" in job:
        return f"{label} {job['failed']} | | | | |"
    median = statistics.median(job["seconds"])
    times = statistics.median(first["seconds"]) / median if "seconds" in first else float("nan")
    work = multiplications(job["size"], job["kernel_size"], Task(job["trains"], (job["batch"], 1, *[job["patch"]] * 3)))
    peak = "" if job["peak"] is None else f"{job['peak'] / 2**30:.1f} GiB"
    kernels = ", ".join(f"{name} {share:.0%}" for name, share in [*job["kernels"].items()][:3])
    return f"{label} {median * 1e3:.1f} | {times:.2f} | {peak} | {work / median / best.rate:.1%} | {kernels} |"


def markdown(report: dict) -> str:
    """The whole report as a page."""
    best = Limits(report["bandwidth"], report["rate"])
    versions = f"torch {report['torch']}, MONAI {report['monai']}, Python {report['python']}"
    head = ["task", "network", "batch", "implementation", "ms", "times as fast", "peak memory", "share of the rate"]
    lines = [
        f"# MedNeXt on {report['device']}, {report['date']}",
        "",
        f"`{report['command']}`; {versions}. Copying reaches {best.bandwidth / 1e9:.0f} GB/s, matrix products"
        f" {best.rate / 1e12:.2f} T multiply-adds/s. Patches of {report['patch']}^3 voxels, medians of {report['runs']}"
        " runs. A step is forward, deep-supervision loss, backward and AdamW under autocast to bfloat16.",
        "",
        *_header(*head, "largest kernels"),
        *(row(report["networks"], job, best) for job in report["networks"]),
        "",
        "Operations by themselves, expansion ratio 2, batch 1. The share of bandwidth counts each tensor once.",
        "",
        *_header("operation", "channels", "side", "k", "by", "ms", "share of bandwidth", "share of the rate"),
    ]
    for r in report["kernels"]:
        what = " | ".join(str(r[key]) for key in ("kernel", "channels", "side", "k", "ops"))
        lines.append(f"| {what} | {r['ms']:.3f} | {r['bandwidth']:.0%} | {r['rate']:.1%} |")
    if "blocks" in report:
        lines += ["", "Time of a block, forward and backward, with Triton in that with stock operators:", ""]
        lines += [
            *_header("block", "ratio"),
            *(f"| {name} | {ratio:.2f} |" for name, ratio in report["blocks"].items()),
        ]
    return "\n".join(lines) + "\n"


def _header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
