"""Shared by all tests: the commands of the bundle, the phantom, and scans on every kind of grid."""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when it is imported, which the bundle may cause

from command_line import ROOT, run_module, run_process

from scripts.data.phantom import phantom

# MONAI's LoadImage sets up every reader where pydicom is installed, and says each time what that one lacks
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel("ERROR")

SHARED = ROOT.parent / "shared" / "data"
TRAIN = "configs/train.json"
CACHE = tempfile.TemporaryDirectory(prefix="mednext-cache-")
TINY = ("--patch_size", "[32,32,32]", "--iterations", "2", "--num_workers", "0")
COARSE = ("--spacing", "[1.5,1.5,1.5]")  # a phantom scan is one window of TINY instead of eight


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Stop every file of this process after so many bytes, as a full disk does: also that of pytest's lines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def overlays(*names: str) -> tuple[str, str]:
    """Return `--config_file` for several files."""
    return "--config_file", str([f"configs/{name}.json" for name in names])


def pytest_collection_finish() -> None:
    """Keep modules and tests out of the garbage collections to come: they stay to the end."""
    gc.collect()
    gc.freeze()


def bundle(
    *args: object, cwd: Path = ROOT, fails: bool = False, process: bool = False, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Run `python -m monai.bundle run ARGS`, in a process of its own where that is the point.

    Cached cases are shared by all tests.

    Args:
        args: what stands behind `run`.
        cwd: directory to run in.
        fails: whether the exit code must not be 0, instead of being 0.
        process: start a process of its own.
        launcher: what starts that process behind `python`, such as `-m torch.distributed.run`.

    Returns:
        The exit code, and stdout and stderr as text.
    """
    args += ("--cache_dir", CACHE.name) if "train.json" in str(args) else ()
    return python_m("monai.bundle", "run", *args, cwd=cwd, fails=fails, process=process, launcher=launcher)


def python_m(
    module: str, *args: object, cwd: Path = ROOT, fails: bool = False, process: bool = False, launcher: tuple = ()
) -> subprocess.CompletedProcess:
    """Run `python -m module ARGS`; the options are those of `bundle`."""
    if process or launcher:
        done = run_process(module, *args, cwd=cwd, launcher=launcher)
    else:
        done = run_module(module, *args, cwd=cwd)
    assert (done.returncode != 0) == fails, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """Make a phantom data set of five training and two test cases."""
    return Path(phantom(str(tmp_path_factory.mktemp("data") / "phantom"), training=5, test=2))


@pytest.fixture(scope="session")
def trained(phantom_dir, tmp_path_factory) -> Path:
    """Train two epochs of two iterations on the phantom; return the `ckpt_dir`, in which `log` is what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = bundle(
        "training", *overlays("train"), "--dataset_dir", phantom_dir, "--ckpt_dir", folder / "models",
        "--output_dir", folder / "eval", "--epochs", 2, *TINY,
    )  # fmt: skip
    (folder / "models" / "log").write_text(done.stdout)
    return folder / "models"


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """Copy the weights of the bundle as they are committed, since trainings write to the same folder."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in ("model.pt", "model.json", "postprocessing.json", "SHA256SUMS"):
        shown = subprocess.run(["git", "show", f"HEAD:models/{name}"], cwd=ROOT, capture_output=True)
        if shown.returncode:  # an archive without git: what lies there
            shutil.copy(ROOT / "models" / name, folder / name)
        else:
            (folder / name).write_bytes(shown.stdout)
    return folder


def grid(kind: str) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of a scan grid whose extent is about 44 mm."""
    spacing = {"thick": (0.9, 0.9, 4.0)}.get(kind, (1.5, 1.2, 2.0))
    shape = tuple(round(44 / s) for s in spacing)
    affine = np.diag([*spacing, 1.0])
    if kind == "flipped":
        affine[:3, :3] *= (-1, 1, -1)
    if kind == "permuted":
        affine[:3, :3] = affine[:3, :3][[2, 0, 1]] * (1, -1, 1)
    if kind in ("oblique", "thick"):
        a, b = np.deg2rad(25), np.deg2rad(-18)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        affine[:3, :3] = tilt @ turn @ affine[:3, :3]
    affine[:3, 3] = (12.0, -34.0, 56.0)
    return shape, affine


GRIDS = ("straight", "flipped", "permuted", "oblique", "thick")


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Compute the world coordinates in mm of every voxel, (*shape, 3)."""
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def save_without_spacing(path: Path, shape: tuple[int, int, int] = (4, 4, 4)) -> Path:
    """Write an uncompressed NIfTI-1 file whose third voxel edge is 0 mm and that has no other geometry."""
    content = bytearray(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)).to_bytes())
    content[88:92] = bytes(4)  # pixdim[3]
    content[252:256] = bytes(4)  # qform_code, sform_code
    path.write_bytes(bytes(content))
    return path
