"""The report of `gpu` as a page in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from .cpu import Task, multiplications
from .gpu_operations import Limits

NAMES = {"original": "original", "monai": "MONAI", "reference": "ours, reference", "triton": "ours, Triton"}


def row(networks: list[dict[str, Any]], job: dict[str, Any], best: Limits) -> str:
    """Write a line of the table; the first figure of the same network and task is the one to compare with."""
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


def markdown(report: dict[str, Any]) -> str:
    """Write the whole report as a page."""
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
        lines += ["", "Time of a block with Triton in that with stock operators, or why it is left out:", ""]
        lines += [
            *_header("block", "ratio"),
            *(f"| {name} | {r if isinstance(r, str) else f'{r:.2f}'} |" for name, r in report["blocks"].items()),
        ]
    return "\n".join(lines) + "\n"


def _header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
