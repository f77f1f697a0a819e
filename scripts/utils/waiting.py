"""How OpenMP's threads wait for each other: spinning while the cores are theirs, asleep while others want them.

libgomp, which PyTorch brings on Linux, lets a thread that waits spin for milliseconds. Alone that saves the time of
waking it; beside another process that computes, both spin where the other one would work, and each takes many times as
long. Its settings are read when PyTorch is loaded, which is before any of ours. But it stops spinning while a process
has more of its threads than there are processors: a second team, of threads that sleep, is kept for that long.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # of a user who has decided
CROWDED, CALM = 0.25, 0.1  # seconds a second that threads wait for a processor: from where they sleep, and spin again
TICK = 0.2  # seconds between two looks; a turn of a thread on a processor takes milliseconds
PAUSE_HARD = 2  # omp_pause_hard of omp.h: all threads of the calling thread's team end
TASKS = Path("/proc/self/task")  # Linux has of each thread how long it waited for a processor


def share_cores() -> None:
    """Let the threads of this process sleep instead of spin while other processes want its processors.

    Nothing happens where one thread computes, where OMP_WAIT_POLICY or GOMP_SPINCOUNT says how to wait, or without
    libgomp and Linux's account of waiting.
    """
    if torch.get_num_threads() > 1 and not any(map(os.environ.get, SETTINGS)):
        _start()


@functools.cache
def _start() -> None:
    try:
        team = SleepingTeam(ctypes.CDLL(None))
        waited(TASKS)
    except (OSError, AttributeError, TypeError):  # not Linux, or not libgomp
        return
    threading.Thread(target=_watch, args=(team,), name="mednext-waiting", daemon=True).start()


def _watch(team: SleepingTeam) -> None:
    then, before = time.monotonic(), waited(TASKS)
    while True:
        time.sleep(TICK)
        now, found = time.monotonic(), waited(TASKS)
        team.adapt((found - before) / (now - then))
        then, before = now, found


def waited(tasks: Path) -> float:
    """Sum the seconds that the threads of a process were ready to run and waited for a processor.

    Args:
        tasks: folder with `schedstat` of each thread, in nanoseconds behind the time that it ran.
    """
    found = 0
    for task in tasks.iterdir():
        with suppress(OSError):  # it has ended
            found += int((task / "schedstat").read_text().split()[1])
    return found / 1e9


class SleepingTeam:
    """A team of OpenMP threads that does nothing but be there; used from one thread alone, whose team it is.

    Args:
        openmp: libgomp, as it is loaded in this process.

    Raises:
        AttributeError: it is another library.
    """

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self.there = False
        self.processors, self.nothing = openmp.omp_get_num_procs, openmp.omp_get_num_threads
        self.parallel, self.pause = openmp.GOMP_parallel, openmp.omp_pause_resource_all

    def adapt(self, share: float) -> None:
        """Be there while processors are scarce.

        Args:
            share: seconds a second that threads of this process waited for one.
        """
        if not self.there and share > CROWDED:
            self.parallel(self.nothing, None, self.processors() + 1, 0)
            self.there = True
        elif self.there and share < CALM:
            self.pause(PAUSE_HARD)
            self.there = False
