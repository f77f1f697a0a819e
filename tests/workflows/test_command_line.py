"""Commands do the same in the process of the tests, where most tests run them, as in one of their own."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sys
import warnings
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import pytest
import torch
from command_line import loggers, run_module, run_process
from conftest import TINY, bundle, overlays

COMMANDS = {  # of the data, trained weights and the folder to write to
    "training": lambda data, models, out: (
        "training", *overlays("train"), "--dataset_dir", data, "--ckpt_dir", out, "--output_dir", out, *TINY,
        "--epochs", 1,
    ),
    "evaluating": lambda data, models, out: (
        "evaluating", *overlays("train", "evaluate"), "--dataset_dir", data, "--ckpt_dir", models, "--output_dir", out,
        "--num_workers", 0,
    ),
    "inference": lambda data, models, out: (
        *overlays("inference"), "--dataset_dir", data, "--ckpt_dir", models, "--output_dir", out, "--num_workers", 0,
    ),
    "planning": lambda data, models, out: (
        "planning", "--config_file", "configs/plan.json", "--dataset_dir", data, "--output", out / "plan.json",
        "--output_dir", out,
    ),
}  # fmt: skip
READERS = {
    "*.pt": lambda path: {k: v.numpy().tobytes() for k, v in torch.load(path, weights_only=True).items()},
    "**/*_seg.nii.gz": lambda path: np.asarray(nib.load(path).dataobj).tobytes(),
    "cases.csv": Path.read_text,
    "*plan.json": lambda path: json.loads(path.read_text()),
}
WRITTEN = {
    "training": {"model.pt"},
    "evaluating": {"cases.csv"},
    "inference": {"phantom_05_seg.nii.gz", "phantom_06_seg.nii.gz"},
    "planning": {"plan.json"},
}
FAULTS = {  # module, arguments, exit code, what the last line says
    "of the user": ("monai.bundle", ("run", *overlays("train"), "--dataset_dir", "nowhere"), 1, "error: .*nowhere"),
    "of ours": ("monai.bundle", ("run", "nothing", "--config_file", "configs/plan.json"), 1, r"\w+Error: .*nothing"),
    "of spelling": ("monai.bundle", ("nothing",), 2, ".*"),
    "in a command's name": ("scripts", ("nothing",), 1, "error: 'nothing' is no command"),
}


def results(folder: Path) -> dict[str, object]:
    """Read what a command wrote, without what has times in it."""
    return {
        str(path.relative_to(folder)): read(path) for pattern, read in READERS.items() for path in folder.glob(pattern)
    }


def said(printed: str, folder: Path) -> str:
    """Return what a command printed, without the name of its folder and without times."""
    printed = re.sub(r"\d{4}-\d\d-\d\d [\d:,]+", "TIME", printed.replace(str(folder), "FOLDER"))
    printed = re.sub(r"[\d.]+ GB are free", "FREE", printed)
    return re.sub(r"[\d.]+ (?:s|min|h|samples/s|%)(?=[\s,])", "TIME", printed)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_and_says_the_same_in_a_process_of_its_own(name, phantom_dir, trained, tmp_path):
    def run(process: bool) -> tuple[str, dict[str, object]]:
        folder = tmp_path / str(process)
        done = bundle(*COMMANDS[name](phantom_dir, trained, folder), process=process)
        return said(done.stdout, folder), results(folder)

    here, there = run(process=False), run(process=True)
    assert here == there
    assert WRITTEN[name] <= here[1].keys()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_as_in_a_process_of_its_own(name):
    module, arguments, code, message = FAULTS[name]
    here, there = run_module(module, *arguments), run_process(module, *arguments)
    assert here.returncode == there.returncode == code
    last = here.stderr.splitlines()[-1]
    assert last == there.stderr.splitlines()[-1]
    assert re.match(message, last)
    assert ("Traceback" in here.stderr) == ("Traceback" in there.stderr) == (name == "of ours")


CHANGES = """
import logging, os, random, sys, warnings
import matplotlib, numpy, torch
os.chdir("/")
os.environ["MEDNEXT"] = os.environ["HOME"] = "changed"
os.system("echo of a child")
sys.path.append("changed")
sys.argv.append("changed")
sys.excepthook = None
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(0)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision("medium")
torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
warnings.simplefilter("error")
matplotlib.rcParams["font.size"] = 40
logging.basicConfig(level=1, stream=sys.stdout, force=True)
for name in ("mednext", "new"):
    logging.getLogger(name).setLevel(1)
    logging.getLogger(name).propagate = False
    logging.getLogger(name).addHandler(logging.StreamHandler())
print("of this process")
"""


def test_nothing_that_a_command_changes_is_left_behind(tmp_path):
    def seen() -> dict[str, object]:
        return {
            "logging": {
                logger.name: (logger.level, logger.propagate, logger.handlers[:], logger.disabled)
                for logger in loggers()
                if logger.name != "new"
            },
            "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            "torch": (
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                torch.backends.cudnn.benchmark,
            ),
            "system": (os.getcwd(), dict(os.environ), sys.path[:], sys.argv[:], sys.excepthook, sys.stdout, sys.stderr),
            "warnings": (warnings.filters[:], warnings.showwarning),
            "matplotlib": dict(matplotlib.rcParams),
        }  # fmt: skip

    (tmp_path / "changes.py").write_text(CHANGES)
    before = seen()
    done = run_module("changes", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "of a child\nof this process\n"
    assert seen() == before
    new = logging.getLogger("new")
    assert (new.level, new.propagate, new.handlers) == (logging.NOTSET, True, [])


def test_two_runs_in_one_process_draw_other_numbers(tmp_path):
    """A run that is repeatable must have set its seed; the process does not do it for it."""
    (tmp_path / "draws.py").write_text(
        "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(()).item())"
    )
    one, other = (run_module("draws", cwd=tmp_path).stdout.split() for _ in range(2))
    assert not set(one) & set(other)
