"""The computer is asked for what it has, and torch is told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from scripts.utils.device import (
    amp_kwargs,
    cpu_cores,
    loader_workers,
    local_device,
    set_cpu_defaults,
    start_distributed,
    total_memory,
)


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


def test_a_network_on_the_cpu_gets_all_cores_and_another_half_of_them(monkeypatch):
    monkeypatch.setattr("scripts.utils.device.cpu_cores", lambda: 12)
    assert (loader_workers("cpu"), loader_workers("cuda:0"), loader_workers()) == (0, 6, 6)
    monkeypatch.setattr("scripts.utils.device.cpu_cores", lambda: 64)
    assert loader_workers("cuda:0") == 8


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_autocast_takes_bfloat16_where_the_gpu_computes_it(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert amp_kwargs("cuda:0") == {"dtype": dtype}
    assert amp_kwargs("cpu") == {}


@pytest.mark.parametrize(("gpu", "backend"), [(True, "nccl"), (False, "gloo")], ids=["GPU", "CPU"])
def test_each_process_takes_its_own_device(gpu, backend, monkeypatch):
    joined = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **_: joined.append(backend))
    start_distributed()
    own = torch.device("cuda:3") if gpu else torch.device("cpu")
    assert local_device() == own
    assert joined == ([backend, own] if gpu else [backend])


SETTLED = """
import os, threading, torch
from scripts.utils.device import set_cpu_defaults
set_cpu_defaults("cpu")
print(torch.get_num_threads())
print("mednext-waiting" in [thread.name for thread in threading.enumerate()])
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


def test_a_process_for_another_device_keeps_its_threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", pytest.fail)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    set_cpu_defaults("cuda:0")


def test_all_cores_compute_and_freed_memory_is_kept():
    threads, watched, kept = settled(OMP_NUM_THREADS="", OMP_WAIT_POLICY="", GOMP_SPINCOUNT="")
    assert int(threads) == cpu_cores()
    if sys.platform == "linux":
        assert watched == str(cpu_cores() > 1)
        assert kept == "True"


LOOP = """
import sys, torch
from scripts.mednext import create_mednext
from scripts.utils.device import set_cpu_defaults
network, image = create_mednext(1, 2, "S", 3), torch.zeros(1, 1, 64, 64, 48)
if sys.argv[1] == "told":
    set_cpu_defaults("cpu")
if sys.argv[1] == "segments":
    with torch.inference_mode():
        network(image)
if sys.argv[1] == "small":
    image = image[..., :32, :32, :32]
for _ in range(2 if sys.argv[1] != "segments" else 0):
    network(image)[0].mean().backward()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators were not measured")
@pytest.mark.parametrize(("how", "lines"), [("trains", 1), ("told", 0), ("segments", 0), ("small", 0)])
def test_a_loop_of_ones_own_is_told_once_what_makes_it_faster(how, lines):
    done = subprocess.run([sys.executable, "-c", LOOP, how], capture_output=True, text=True, check=True)
    assert done.stderr.count('call scripts.utils.device.set_cpu_defaults("cpu") once') == lines
    assert len(done.stderr.splitlines()) == lines


def test_the_number_of_threads_that_was_asked_for_stays():
    assert settled(OMP_NUM_THREADS="1")[:2] == ["1", "False"]


@pytest.mark.parametrize(
    ("files", "bound"),
    [({}, False), ({"memory.max": "max\n"}, False), ({"memory.max": "1000000\n"}, True),
     ({"memory/memory.limit_in_bytes": "1000000\n"}, True), ({"memory/memory.limit_in_bytes": str(2**63)}, False)],
)  # fmt: skip
def test_memory_is_the_computers_or_the_containers_share(files, bound, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    everything = total_memory(tmp_path / "nothing")
    assert everything > 1e8
    assert total_memory(tmp_path) == (1e6 if bound else everything)
