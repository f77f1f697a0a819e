"""One process owns a folder; its lock ends with it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.utils.errors import UserError
from scripts.utils.ownership import alone, own, owned

HOLD = "import sys, time; from scripts.utils.ownership import own; own(sys.argv[1], 'training'); print('x', flush=True)"


@pytest.fixture
def holder(tmp_path):
    """Start a process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD}; time.sleep(60)", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    with process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_owner_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(UserError, match=f"belongs to another training .process {holder.pid} on .*, since 20"):
        own(tmp_path, "training")
    with owned(tmp_path, "cross_validation"):  # other work
        pass


def test_the_lock_of_a_dead_owner_is_taken_over_with_a_sentence(holder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path, "training"):
        assert f"the training of process {holder.pid} on" in caplog.text
        assert f"process {os.getpid()} on" in (tmp_path / "training.lock").read_text()
    assert not [*tmp_path.iterdir()]


def test_an_end_leaves_nothing(tmp_path):
    subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    assert not [*tmp_path.iterdir()]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file could not be written .Not a directory"):
        own(tmp_path / "file", "training")


COUNT = """
import pathlib, sys
from scripts.utils.ownership import alone
file = pathlib.Path(sys.argv[1])
for _ in range(100):
    with alone(file):
        file.write_text(str(int(file.read_text()) + 1))
"""


def test_a_file_that_several_processes_change_loses_nothing(tmp_path):
    file = tmp_path / "number"
    file.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(file)], cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert file.read_text() == "300"
    with pytest.raises(KeyError), alone(file):
        raise KeyError
    assert [*tmp_path.iterdir()] == [file]
