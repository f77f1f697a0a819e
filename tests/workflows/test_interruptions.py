"""Signals and faults in real commands: one line, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import pytest
import torch
from conftest import CACHE, COARSE, ROOT, TINY, bundle, overlays, save

from scripts.training import stopping
from scripts.utils.files import read_table

NARROW = ("--network_def#n_channels", 8)  # a network of 0.4 million weights


def arguments(data, folder, *more: object) -> list[str]:
    common = ("--dataset_dir", data, "--ckpt_dir", folder, "--output_dir", folder, *TINY, *COARSE, *NARROW)
    return [*map(str, ("training", *overlays("train"), *common, "--resume", "auto", *more))]


def checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(folder / "training" / name, weights_only=True)


def test_a_training_that_is_stopped_three_times_is_the_uninterrupted_one(phantom_dir, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = ("--epochs", 2, "--iterations", 3, "--val_interval", 1)
    expected = bundle(*arguments(phantom_dir, whole, *short)).stdout
    printed = ""
    for call, said in (  # after so many looks for a signal, which every step, validated case and epoch has one of
        (2, "epoch 1, iteration 2"),
        (2, "epoch 1, iteration 3"),  # step 3, and within the validation, which is made again
        (5, "epoch 2, iteration 6"),  # validated case, epoch 1, and the last step of epoch 2
    ):
        looks = iter([0] * (call - 1) + [signal.SIGTERM] * 9)
        monkeypatch.setattr(stopping, "asked", lambda looks=looks: next(looks))
        done = bundle(*arguments(phantom_dir, parts, *short), fails=True)
        assert done.returncode == 128 + signal.SIGTERM
        assert done.stderr.endswith(f"{said}; --resume auto goes on: ended by SIGTERM\n")
        printed += done.stdout
    monkeypatch.setattr(stopping, "asked", lambda: 0)
    printed += bundle(*arguments(phantom_dir, parts, *short)).stdout

    for pattern in (r"epoch \d/2  loss \S+  lr \S+", r"validation after epoch .*\)"):  # those stopped come twice
        assert set(re.findall(pattern, printed)) == set(re.findall(pattern, expected))
    for name in ("checkpoint.pt", "checkpoint_before.pt"):
        one, other = checkpoint(whole, name), checkpoint(parts, name)
        assert one["epoch"] == {"checkpoint.pt": 2, "checkpoint_before.pt": 1}[name]
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
        assert one["lr_scheduler"] == other["lr_scheduler"]
        assert one["best_metric"] == other["best_metric"]
        for moments, others in zip(*(c["optimizer"]["state"].values() for c in (one, other)), strict=True):
            assert all(torch.equal(moments[key], others[key]) for key in moments)


def test_a_training_that_diverges_ends_and_goes_on_from_before(phantom_dir, tmp_path):
    handlers = json.loads((ROOT / "configs/train.json").read_text())["train"]["handlers"]
    (at,) = (place for place, handler in enumerate(handlers) if handler["_target_"].endswith(".FiniteSteps"))
    assert handlers[at]["patience"] == 10  # as docs/how-to/restarting.md says
    short = ("--epochs", 5, "--iterations", 1, "--val_interval", 99, f"--train#handlers#{at}#patience", 3)
    bundle(*arguments(phantom_dir, tmp_path, *short, "--train#trainer#max_epochs", 1))
    before = checkpoint(tmp_path)
    done = bundle(*arguments(phantom_dir, tmp_path, *short, "--learning_rate", 1e30), fails=True)  # epoch 2 is finite
    assert re.search(
        "epoch 3, iteration 1: the loss is not finite, .* left out; cases phantom_0., phantom_0",
        done.stdout + done.stderr,
    )
    assert "error: the last 3 steps, up to iteration 1 of epoch 5" in done.stderr
    assert "go on with --resume auto and a smaller --learning_rate" in done.stderr
    assert sorted(path.stem for path in tmp_path.glob("training/*.pt")) == ["checkpoint_before", "checkpoint_diverged"]
    kept = checkpoint(tmp_path, "checkpoint_before.pt")
    assert all(torch.equal(before["model"][key], kept["model"][key]) for key in before["model"])
    done = bundle(*arguments(phantom_dir, tmp_path, *short, "--train#trainer#max_epochs", 2))
    assert "resuming after epoch 1 of 2" in done.stdout
    assert checkpoint(tmp_path)["epoch"] == 2


class Running:
    """A command in a process group of its own, until something is said on its stderr or is there."""

    def __init__(self, folder: Path, *args: object) -> None:
        self.err = folder / f"stderr{time.monotonic_ns()}"
        command = [sys.executable, "-m", "monai.bundle", "run", *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(self.err, "w") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=err, stderr=err, start_new_session=True
            )

    def until(self, reached) -> None:
        latest = time.monotonic() + 200
        while not reached(self.said()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < latest, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return self.err.read_text()

    def end(self, number: signal.Signals) -> str:
        """Send a signal to the whole group; return what was said after it."""
        before = len(self.said())
        os.killpg(self.process.pid, number)
        assert self.process.wait(60) == 128 + number, self.said()
        said = self.said()[before:]
        assert "Traceback" not in said
        assert said.rstrip().endswith(f"by {number.name}")
        return said


@pytest.fixture
def running(tmp_path):
    """Give the class above for the test, and kill at its end what still runs."""
    started: list[Running] = []
    yield lambda *args: started.append(Running(tmp_path, *args)) or started[-1]
    for command in started:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGKILL)
        command.process.wait()


def test_signals_to_whole_groups_end_commands_in_one_line_and_lose_nothing(phantom_dir, shipped, running, tmp_path):
    scans = tmp_path / "scans"
    sample = nib.load(next((ROOT / "docs/samples").glob("*.nii.gz")))
    for number in range(40):
        save(scans / f"scan_{number:02}.nii.gz", sample.get_fdata().astype("int16"), sample.affine)
    masks = tmp_path / "masks"
    infer = (*overlays("inference"), "--dataset_dir", scans, "--ckpt_dir", shipped, "--output_dir", masks)
    folders = [tmp_path / name for name in ("a", "b")]
    long = ("--epochs", 2, "--iterations", 9999, "--cache_dir", CACHE.name)
    trainings = [
        running(*arguments(phantom_dir, folder, *long, "--num_workers", workers))
        for workers, folder in enumerate(folders)
    ]
    inference = running(*infer)

    inference.until(lambda said: len(list(masks.glob("*_seg.nii.gz"))) > 1)
    inference.end(signal.SIGTERM)
    made = {path.name.removesuffix("_seg.nii.gz") for path in masks.glob("*_seg.nii.gz")}
    recorded = set(json.loads((masks / "masks.json").read_text())["masks"])
    assert recorded <= {row["case"] for row in read_table(masks / "report.csv")}
    assert len(made - recorded) <= 1  # a signal between a mask and its record
    assert {path.suffix for path in masks.iterdir()} == {".gz", ".csv", ".json"}

    for training, folder, number in zip(trainings, folders, (signal.SIGINT, signal.SIGTERM), strict=True):
        training.until(lambda said: re.search(r"training.* [1-9]\d*/9999", said))
        if number == signal.SIGINT:
            refused = bundle(*arguments(phantom_dir, folder, *long), fails=True)
            assert f"error: {folder} belongs to another training (process {training.process.pid} on " in refused.stderr
        assert "epoch 1, iteration" in training.end(number)
        state = checkpoint(folder)
        assert (state["epoch"], state["step"] > 0) == (0, True)
        assert not (folder / "training.lock").exists()


WAITING = """
import os, signal, sys
import torch.distributed as dist
from scripts.utils import errors
from scripts.utils.device import start_distributed
sys.excepthook = errors._print_user_error
start_distributed(minutes=0.05)
dist.barrier()
if dist.get_rank():
    print(os.getpid(), flush=True)
    {fault}
dist.barrier()
"""


@pytest.mark.parametrize("fault", ["os.kill(os.getpid(), signal.SIGSTOP)", "os._exit(1)"])
def test_a_process_does_not_wait_for_ever_for_one_that_stands_still_or_is_gone(fault, tmp_path):
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": str(20000 + os.getpid() % 10000)}
    code = [sys.executable, "-c", WAITING.replace("{fault}", fault)]
    one, other = (
        subprocess.Popen(
            code, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    )
    try:
        stderr = one.communicate(timeout=60)[1]
    finally:
        other.kill()
        other.communicate()
    assert one.returncode == 1
    assert "error: process 0 of 2 waits for another one that has ended or does not answer" in stderr
    assert "Traceback" not in stderr
