"""A command that another one started does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from conftest import ROOT

PARENT = """
import os, sys
from scripts.utils.signals import listen, run_child
listen()
sys.exit(run_child([sys.executable, "-c", sys.argv[1]], os.environ))
"""
CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def started(child: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PARENT, child]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGTERM,
        pytest.param(
            signal.SIGKILL, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the child")
        ),
    ],
)
def test_a_child_ends_with_the_command_that_started_it(number):
    with started(CHILD) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        try:
            parent.wait(30)
            assert ended(child)
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        stderr = parent.stderr.read()
    if number != signal.SIGKILL:
        assert parent.returncode == 128 + number
        assert stderr.rstrip().endswith(f"ended, with the command that it had started, by {number.name}")


def ended(process: int) -> bool:
    """Wait for a process that is no child of this one."""
    for _ in range(200):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_of_a_child_is_told(code):
    with started(f"raise SystemExit({code})") as parent:
        assert parent.wait() == code
