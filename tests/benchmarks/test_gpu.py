"""The commands around the Triton kernels, as far as they go without a GPU."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import kernels
from scripts.benchmarks import gpu_operations
from scripts.benchmarks.gpu import Job, bench, run_job
from scripts.benchmarks.gpu_operations import Limits, kernel_table
from scripts.benchmarks.gpu_report import markdown, row
from scripts.kernels import CPU, REFERENCE, TRITON, TUNER, autotune, triton_ops
from scripts.kernels.backend import BlockKind
from scripts.kernels.trial import Result
from scripts.utils.errors import UserError

ROOT = Path(__file__).parents[2]
JOB = Job("reference", "S", 3, 1, False, False, 32, 1, "cpu", None)
FOUND = {"seconds": [0.5, 0.1, 0.2], "peak": 2**31, "kernels": {"conv": 0.7, "norm": 0.2, "add": 0.06, "mul": 0.04}}


@pytest.mark.skipif(not triton_ops.INSTALLED, reason="Triton is not installed")
def test_every_kernel_compiles_for_two_gpus_and_fits_into_their_registers():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts", "compile_triton", "--kernel_size", "3", "--arch", "[80,90]"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| (_\w+) .*?\| (\d+), (\d+), \d+ \| (\d+), (\d+), \d+ \|$", done.stdout, re.MULTILINE)
    assert {name for name, *_ in rows} == {
        "_stream", "_strided", "_transposed", "_merge", "_correlate_stream", "_correlate_strided",
        "_forward", "_energy", "_backward_input", "_backward_weights", "_product", "_combine",
    }  # fmt: skip
    assert all(int(spilled) <= 16 for _, _, a, _, b in rows for spilled in (a, b)), done.stdout  # bytes a thread


def test_compiling_ahead_says_what_it_takes(monkeypatch):
    from scripts.benchmarks.compile_triton import report

    monkeypatch.setattr(triton_ops, "INSTALLED", False)
    with pytest.raises(UserError, match="pip install triton, and unset TRITON_INTERPRET"):
        report()


class TestBenchmark:
    def test_without_a_gpu_it_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="no GPU that PyTorch can use"):
            bench(output_dir=str(tmp_path))
        with pytest.raises(UserError, match=r"modes is \['fast'\]; expected some of eager, compiled"):
            bench(modes="fast")

    def test_a_job_prints_its_times_and_largest_kernels(self, capsys):
        run_job(JOB)
        found = json.loads(capsys.readouterr().out)
        assert len(found["seconds"]) == 1
        assert found["peak"] is None
        assert 0.5 < sum(found["kernels"].values()) <= 1

    def test_a_row_compares_with_the_first_of_its_task(self):
        first = {**JOB._asdict(), **FOUND, "seconds": [0.6]}
        ours = {**JOB._asdict(), **FOUND, "implementation": "triton", "compiled": True}
        other = {**first, "batch": 2, "seconds": [9.0]}
        line = row([other, first, ours], ours, Limits(1e9, 2e12))
        assert line.startswith("| forward | S k3 | 1 | ours, Triton, compiled | 200.0 | 3.00 | 2.0 GiB | ")
        assert line.endswith("| conv 70%, norm 20%, add 6% |")

    def test_what_ran_out_of_memory_has_a_row_that_says_so(self):
        failed = {**JOB._asdict(), "failed": "out of memory"}
        assert row([failed], failed, Limits(1, 1)) == "| forward | S k3 | 1 | ours, reference | out of memory | | | | |"
        assert "| nan |" in row([failed], {**JOB._asdict(), **FOUND}, Limits(1e9, 1e12))

    def test_operations_are_measured_by_themselves_and_written_as_a_page(self, monkeypatch):
        monkeypatch.setattr(gpu_operations, "LEVELS", ((16, 8),))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        found = kernel_table(2, [3], 32, Limits(1e9, 1e12), 1, "cpu")
        assert [r["kernel"] for r in found] == [
            "depthwise", "depthwise, input gradient", "depthwise, weight gradient", "mlp", "mlp, backward",
        ]  # fmt: skip
        assert all(r["ms"] > 0 and r["bandwidth"] > 0 and r["side"] == 4 for r in found)
        report = {
            "device": "X",
            "torch": "2",
            "monai": "1",
            "python": "3",
            "date": "today",
            "command": "c",
            "patch": 32,
        }
        report |= {
            "bandwidth": 1e9,
            "rate": 1e12,
            "runs": 3,
            "networks": [{**JOB._asdict(), **FOUND}],
            "kernels": found,
        }
        page = markdown({**report, "blocks": {"float16 32 channels k3": 0.456, "k5": "inaccurate"}})
        assert "| depthwise, weight gradient | 16 | 4 | 3 | reference |" in page
        assert "| float16 32 channels k3 | 0.46 |\n| k5 | inaccurate |" in page


def test_every_kind_of_block_of_the_networks_is_measured_anew_and_remembered(tmp_path, monkeypatch):
    """With a measurement and a GPU of this test; on a real one, `tests/kernels/test_autotune.py` says what is done."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_ops, "_missing", lambda device: None)
    results = iter([Result(0.5, 0.0, 1.0, 2.0), Result(left_out="SyntaxError: no such type")] * 1000)
    tried, limits = [], set()

    def attempt(use, *_):
        tried.append(use.name)
        limits.add(TUNER.limit)
        return next(results)

    def choose(name, x, why=None, compiled=True, block=None):
        assert block is None or TUNER.choose(x, block) in (TRITON, None)
        return REFERENCE

    monkeypatch.setattr(autotune, "attempt", attempt)
    monkeypatch.setattr("scripts.blocks.choose_kernels", choose)
    try:
        for _ in range(2):
            found = gpu_operations.block_ratios("S", [3], [1], 32, "cpu")
    finally:
        TUNER.forget()
    assert len({*found}) == len(found) == 26  # 5 in place, 4 down, 4 up; training and inference
    assert sorted(tried) == sorted([*found] * 2)
    assert {*found.values()} == {0.5, "SyntaxError: no such type"}
    assert limits == {math.inf}
    assert TUNER.limit == 60
    assert len([*(tmp_path / "mednext").glob("kernels-cpu-*.json")]) == 1


@pytest.mark.parametrize(
    ("x", "kernel_size", "reason"),
    [
        (torch.zeros(1, 16, 4, 4), 3, "3D"),
        (torch.zeros(1, 16, 4, 4, 4, dtype=torch.float64), 3, "it needs float32, float16 or bfloat16"),
        (torch.zeros(1, 16, 4, 4, 4), 9, "a depthwise kernel of 9 is none of 3, 5, 7"),
        (torch.zeros(1, 16, 4, 4, 4, device="meta"), 3, "the input is on meta, not on a GPU"),
        ([], 3, "the input is a list, not a plain tensor"),
    ],
)
def test_triton_asked_for_by_name_says_why_it_cannot_be(x, kernel_size, reason, monkeypatch):
    monkeypatch.setattr(triton_ops, "INSTALLED", True)
    with pytest.raises(RuntimeError, match=rf'kernels="triton" cannot be used: .*{reason}.*Use kernels="auto"'):
        kernels.choose_kernels("triton", x, block=BlockKind(kernel_size, 1, False, 16, 32, False))


def test_without_triton_everything_but_triton_by_name_runs(monkeypatch):
    monkeypatch.setattr(triton_ops, "INSTALLED", False)
    assert kernels.choose_kernels("auto", torch.zeros(1, 16, 4, 4, 4)) is CPU
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        kernels.choose_kernels("triton", torch.zeros(1, 16, 4, 4, 4))


def test_triton_is_imported_only_where_it_is_used():
    code = "import sys, torch, scripts.mednext as m; m.create_mednext(1, 2, 'S'); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
