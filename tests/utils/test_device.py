import os
import subprocess
import sys

import pytest

from scripts.utils.device import cpu_cores, loader_workers


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_of_the_container(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_cores(tmp_path) == expected


def test_a_network_on_the_cpu_gets_all_cores():
    assert loader_workers("cpu") == 0


SETTLED = """
import os, torch
from scripts.utils.device import set_cpu_defaults
set_cpu_defaults("cpu")
print(torch.get_num_threads())
faults = lambda: int(open("/proc/self/stat").read().rsplit(") ")[-1].split()[7])
for _ in range(20):  # the heap settles within ten
    torch.zeros(2**24)
before = faults()
for _ in range(8):
    torch.zeros(2**24)
print(faults() - before < 2**24 * 4 * 8 / 4096 / 10)
import numpy as np
from scipy.spatial import KDTree
KDTree(np.random.default_rng(0).integers(0, 20, (5000, 3)))  # crashes where denormal numbers are flushed
"""


def settled(**environment):
    environment = {**os.environ, "PYTHONPATH": ".", **environment}
    done = subprocess.run([sys.executable, "-c", SETTLED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_all_cores_compute_and_freed_memory_is_kept():
    threads, kept = settled(OMP_NUM_THREADS="")
    assert int(threads) == cpu_cores()
    if sys.platform == "linux":
        assert kept == "True"


def test_the_number_of_threads_that_was_asked_for_stays():
    assert settled(OMP_NUM_THREADS="1")[0] == "1"
