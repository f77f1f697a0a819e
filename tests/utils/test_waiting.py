"""Waiting threads sleep while other processes want the processors, and spin again when those are free."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.utils import waiting
from scripts.utils.waiting import SleepingTeam, share_cores, waited

LIBRARY = ("omp_get_num_procs", "omp_get_num_threads", "GOMP_parallel", "omp_pause_resource_all")


def fake(processors: int = 8) -> tuple[SimpleNamespace, list]:
    """Make a library that writes down what it is asked for."""
    calls: list = []
    library = SimpleNamespace(
        omp_get_num_procs=lambda: processors,
        omp_get_num_threads=None,
        GOMP_parallel=lambda function, data, threads, flags: calls.append(threads),
        omp_pause_resource_all=lambda kind: calls.append("end"),
    )
    return library, calls


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.0, 0.05, 0.24], []),
        ([0.3], [9]),
        ([0.3, 0.5, 0.3, 0.2, 0.11], [9]),  # neither crowded nor calm: as it was
        ([0.3, 0.05, 0.05, 0.2], [9, "end"]),
        ([0.3, 0.0, 7.0], [9, "end", 9]),
        ([-1.0, 0.3, -1.0], [9, "end"]),  # a thread that waited has ended
    ],
)
def test_a_team_is_there_while_processors_are_scarce(shares, expected):
    library, calls = fake()
    team = SleepingTeam(library)
    for share in shares:
        team.adapt(share)
    assert calls == expected


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings libgomp on Linux alone")
def test_libgomp_has_more_threads_than_processors_while_the_team_is_there():
    counts = []

    def look() -> None:
        team = SleepingTeam(ctypes.CDLL(None))
        own = set(tasks())
        team.adapt(1.0)
        counts.extend([len(set(tasks()) - own), team.processors()])
        team.adapt(0.0)
        ended.update(set(tasks()) - own)

    def tasks():
        return (task.name for task in Path("/proc/self/task").iterdir())

    ended: set = set()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    made, processors = counts
    assert made + 1 > processors  # with the one that made them
    assert not ended


def test_time_that_threads_waited_is_summed(tmp_path):
    for name, text in {"1": "5000000000 2000000000 7\n", "2": "0 500000000 1\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "3").mkdir()  # has just ended
    assert waited(tmp_path) == 2.5


def test_this_process_is_looked_at():
    if sys.platform == "linux":
        assert waited(waiting.TASKS) >= 0


@pytest.fixture
def started(monkeypatch):
    """List the threads that would look at how long this process waits, of a process that computes in four threads."""
    threads: list = []
    thread = SimpleNamespace(start=lambda: threads.append("started"))
    for name in waiting.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(waiting, "threading", SimpleNamespace(Thread=lambda **_: thread))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: fake()[0])
    monkeypatch.setattr(waiting, "waited", lambda _: 0.0)
    waiting._start.cache_clear()
    yield threads
    waiting._start.cache_clear()


def test_one_thread_looks_however_often_it_is_asked_for(started):
    for _ in range(3):
        share_cores()
    assert started == ["started"]


@pytest.mark.parametrize("setting", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}, {"threads": "1"}])
def test_what_the_user_decided_stays(setting, started, monkeypatch):
    for name, value in setting.items():
        if name == "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        else:
            monkeypatch.setenv(name, value)
    share_cores()
    assert started == []


@pytest.mark.parametrize("missing", LIBRARY)
def test_another_library_waits_as_it_does(missing, started, monkeypatch):
    library, _ = fake()
    delattr(library, missing)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    share_cores()
    assert started == []


@pytest.mark.parametrize("error", [FileNotFoundError, TypeError])  # no /proc; CDLL(None) on Windows
def test_another_system_waits_as_it_does(error, started, monkeypatch):
    def fails(_):
        raise error

    monkeypatch.setattr(waiting, "waited", fails)
    share_cores()
    assert started == []
