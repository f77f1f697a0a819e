"""Signals and faults in real trainings: one line, the right exit code, and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import CACHE, COARSE, ROOT, TINY, bundle, overlays


def arguments(data, folder, *more: object) -> list[str]:
    common = ("--dataset_dir", data, "--ckpt_dir", folder, "--output_dir", folder, "--epochs", 2, *TINY, *COARSE)
    return [*map(str, ("training", *overlays("train"), *common, "--iterations", 12, "--resume", "auto", *more))]


def test_a_training_that_signals_end_within_an_epoch_is_the_uninterrupted_one(phantom_dir, tmp_path):
    bundle(*arguments(phantom_dir, tmp_path / "whole"))
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-m", "monai.bundle", "run", *arguments(phantom_dir, tmp_path / "parts")]
        process = subprocess.Popen(
            [*command, "--cache_dir", CACHE.name], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        checkpoint = tmp_path / "parts/training/checkpoint.pt"
        lock = tmp_path / "parts/training.lock"
        while not lock.exists():
            time.sleep(0.05)
        time.sleep(1.5 if number == signal.SIGTERM else 2.5)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 128 + number, stderr
        assert stderr.rstrip().endswith(f"by {number.name}")
        assert "Traceback" not in stderr
        assert not lock.exists()
    bundle(*arguments(phantom_dir, tmp_path / "parts"))
    one, other = (torch.load(tmp_path / f / "training/checkpoint.pt", weights_only=True) for f in ("whole", "parts"))
    assert checkpoint.with_name("checkpoint_before.pt").is_file()
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


@pytest.mark.parametrize("rate", [1e30, 1e39])
def test_a_training_that_diverges_ends_and_keeps_what_was_good(rate, phantom_dir, tmp_path):
    bundle(*arguments(phantom_dir, tmp_path, "--train#trainer#max_epochs", 1))
    before = torch.load(tmp_path / "training/checkpoint.pt", weights_only=True)
    done = bundle(*arguments(phantom_dir, tmp_path, "--learning_rate", rate), fails=True)
    assert "--resume auto and a smaller --learning_rate" in done.stderr
    after = torch.load(tmp_path / "training/checkpoint.pt", weights_only=True)
    assert after["epoch"] == 1
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in before["model"])
