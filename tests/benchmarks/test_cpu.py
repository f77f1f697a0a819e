"""The benchmark of kernels; what it measures is in docs/benchmarks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.cpu import CONTENDERS, TASKS, bench, multiplications
from scripts.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def test_multiplications_are_those_of_the_paper():
    """Roy et al. 2023, table 1, counts S k3 as 130 G at 128^3 with its heads; see also the repository's README."""
    assert multiplications("S", 3, TASKS["128"]) == pytest.approx(130e9, rel=0.03)
    assert multiplications("S", 5, TASKS["128"]) == pytest.approx(169e9, rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "XL"}, r"sizes is \['XL'\]; expected some of S, B, M, L"),
        ({"tasks": 256}, r"tasks is \['256'\]; expected some of step, 64, 128"),
        ({"original": "/nowhere"}, "/nowhere is no checkout of MIC-DKFZ/MedNeXt"),
    ],
)
def test_an_argument_that_cannot_be_is_named(options, message):
    with pytest.raises(UserError, match=message):
        bench(**options)


def run(folder, *arguments):
    command = [sys.executable, "-m", "scripts", "benchmark_cpu", "--sizes", "S", "--kernel_sizes", "3", "--tasks", "64"]
    return subprocess.run([*command, "--rounds", "1", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    for name in ("scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_nothing_is_measured_with_a_red_test(copy):
    kernel = copy / "scripts/kernels/cpu.py"
    kernel.write_text(kernel.read_text().replace("weight.flip(*range(2, g.dim()))", "weight"))
    done = run(copy)
    assert done.returncode == 1
    assert "the tests of the kernels fail, so nothing is measured" in done.stderr
    assert "|" not in done.stdout


def test_the_table_names_every_implementation(copy):
    (copy / "tests/kernels/test_cpu.py").write_text("def test_nothing():\n    pass\n")  # they run on their own
    done = run(copy, "--output", "table.md")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 64")]
    assert [row[2] for row in rows] == [c.label for c in CONTENDERS if c.is_here(None)]
    kept = {c.builder for c in CONTENDERS if c.keeps_memory} & {c.builder for c in CONTENDERS if not c.keeps_memory}
    assert kept == {"original", "monai", "ours"}  # each is measured with both settings of the allocator
    assert all(float(row[3]) > 0 and row[5].strip() for row in rows)
    assert (copy / "table.md").read_text() == done.stdout
