"""Downloads are checked and put where a training finds them; the network is a file here."""

from __future__ import annotations

import hashlib
import shutil
import tarfile

import pytest
from conftest import bundle

from scripts.data.datasets import Dataset


@pytest.fixture(scope="module")
def archive(phantom_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(phantom_dir, folder / "Task04_Hippocampus")
    with tarfile.open(folder / "task.tar", "w") as tar:
        tar.add(folder / "Task04_Hippocampus", "Task04_Hippocampus")
    return folder / "task.tar"


def fetch(folder, *arguments, fails=False):
    return bundle("fetching", "--config_file", "configs/fetch.json", "--folder", folder, *arguments, fails=fails)


def test_a_task_is_fetched_checked_and_ready(archive, tmp_path):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    done = fetch(tmp_path, "--url", archive.as_uri(), "--hash_val", digest)
    assert f"--dataset_dir {tmp_path}/Task04_Hippocampus" in done.stdout
    assert len(Dataset(tmp_path / "Task04_Hippocampus").cases) == 5
    again = fetch(tmp_path, "--url", archive.as_uri(), "--hash_val", digest, fails=True)
    assert "Task04_Hippocampus exists and is not overwritten" in again.stderr


def test_another_checksum_is_refused_and_nothing_unpacked(archive, tmp_path):
    done = fetch(tmp_path, "--url", archive.as_uri(), "--hash_val", "0" * 64, fails=True)
    assert "error: Task04_Hippocampus could not be fetched" in done.stderr
    assert "hash check" in done.stderr
    assert not (tmp_path / "Task04_Hippocampus").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "Task99_Tail"), "task is 'Task99_Tail'; expected one of Task01_BrainTumour"),
        (("--url", "file:///nowhere.tar"), "comes without a checksum; give --hash_val"),
        (("--url", "file:///nowhere.tar", "--hash_val", "0"), "could not be fetched from file:///nowhere.tar"),
    ],
    ids=["task", "no checksum", "no file"],
)
def test_faults_are_one_sentence(arguments, message, tmp_path):
    done = fetch(tmp_path, *arguments, fails=True)
    assert "Traceback" not in done.stderr
    assert message in done.stderr
