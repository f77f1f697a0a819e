"""SIGINT and SIGTERM end a command in one line, with the exit codes 130 and 143 that shells have for them.

A command that has something to bring to an end first, as a training has its iteration, asks for that by `finish`, looks
at `asked` and ends by `leave`. Any other ends where it is; files appear whole or not at all.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 3.0  # seconds after which a second signal means at once; torchrun passes on what a terminal sent already
PR_SET_PDEATHSIG = 1  # of Linux' prctl.h


class _Received:
    """Holds what came so far, and whether it waits to be looked at."""

    number = 0
    time = 0.0
    finishing = False
    process = 0  # that listens; those that it forks, such as a loader's workers, are ended by it
    terminated = False  # once, as a worker


def listen() -> None:
    """End this process in one line when a signal comes, unless it `finish`es something."""
    _Received.process = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _receive)


def finish(wanted: bool = True) -> None:
    """Keep signals for `asked` from now on; with False they end the process again."""
    _Received.finishing = wanted


def asked() -> int:
    """Return the number of the signal that came, 0 where there was none."""
    return _Received.number


def _receive(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Received.process:
        return
    first = not _Received.number
    if first:
        _Received.number, _Received.time = number, time.monotonic()
    again = not first and time.monotonic() - _Received.time > AGAIN
    if again or not _Received.finishing:
        logging.disable()  # that engines are left is no news
        leave(number, "ended at once, at the second signal" if again else "ended")


def start_worker(worker: int) -> None:
    """Begin in a loader's worker: MONAI's part, and signals, which a terminal or a queue sends to whole groups.

    The process that needs the worker ends it, by a SIGTERM of its own, behind which there is a second one.
    """
    from monai.data.utils import worker_init_fn

    worker_init_fn(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _receive_in_worker)


def _receive_in_worker(number: int, frame: FrameType | None) -> None:
    if _Received.terminated:
        os._exit(0)
    _Received.terminated = True


def leave(number: int, how: str) -> None:
    """End the process as the signal `number` wants it; do nothing for 0.

    Raises:
        SystemExit: with 128 and the number.
    """
    if number:
        with suppress(OSError):
            os.write(2, f"{how} by {signal.Signals(number).name}\n".encode())  # print may be what was interrupted
        raise SystemExit(128 + number)


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command that does not outlive this process, and return its exit code.

    A signal is passed on, and this process ends when the command has. Where this process is killed, Linux tells it.

    Raises:
        SystemExit: a signal came.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught: list[int] = []
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    parent = os.getpid()

    def bind() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # which has ended in between
                os._exit(128 + signal.SIGTERM)

    try:
        process: subprocess.Popen | None = None

        def pass_on(number: int, frame: FrameType | None) -> None:
            caught.append(number)
            if process is not None:
                process.send_signal(number)

        for number in SIGNALS:
            signal.signal(number, pass_on)
        process = subprocess.Popen(command, env=environment, preexec_fn=bind)
        for early in caught[:1]:  # that came before there was a command to tell
            process.send_signal(early)
        code = process.wait()
    finally:
        for listened, handler in before.items():
            signal.signal(listened, handler)
    if caught:
        leave(caught[0], "ended, with the command that it had started,")
    return code
