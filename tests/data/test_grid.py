"""A scan that cannot be on a grid is refused by its header, with both lengths, the reason and the setting."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import save
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged

from scripts.data import grid
from scripts.data.grid import grid_fault, record_faults
from scripts.preprocessing.scan_check import CheckGridd
from scripts.utils.errors import UserError

NM = 4.6e-6  # mm


@pytest.mark.parametrize(
    ("shape", "spacing", "step", "message"),
    [
        ((100, 100, 100), (NM,) * 3, (1.0,) * 3, r"voxels of 4.6e-06 x .* mm \(4.6 x 4.6 x 4.6 nm\).* are under 16"),
        ((500, 500, 60), (4.6e-3,) * 3, (1.0,) * 3, r"\(4.6 x 4.6 x 4.6 um\).* are under 16 along every axis"),
        ((64, 64, 64), (1000.0,) * 3, (1.0,) * 3, r"\(1 x 1 x 1 m\).* take 1.258e\+07 GB of memory, of which this"),
        ((512, 512, 300), (0.7, 0.7, 1.0), (0.7e-3,) * 3, r"take .* GB of memory.*\(0.7 x 0.7 x 0.7 um\)|take"),
        ((10, 12, 9), (1.0,) * 3, (1.0,) * 3, r"10 x 12 x 9 voxels of 1 x 1 x 1 mm: .* \"\[0.75, 0.75, 0.75\]\""),
        ((200, 200, 200), (1.0,) * 3, (20.0,) * 3, r"the 10 x 10 x 10 on a grid of 20 x 20 x 20 mm are under 16"),
    ],
    ids=["nanometres", "microns", "metres", "grid in micron", "few voxels", "coarse grid"],
)
def test_what_cannot_be_on_a_grid_is_named(shape, spacing, step, message):
    said = grid_fault("scan.nii.gz", shape, spacing, step)
    assert said.startswith("scan.nii.gz has ")
    assert re.search(message, said)
    example = [float(edge) for edge in re.search(r'--spacing "\[(.*)\]"', said)[1].split(", ")]
    assert grid_fault("scan.nii.gz", shape, spacing, example) is None  # the advice holds


@pytest.mark.parametrize(
    ("shape", "spacing", "step"),
    [
        ((36, 50, 35), (1.0,) * 3, (1.0,) * 3),
        ((512, 512, 1), (1.0, 1.0, 5.0), (1.0,) * 3),  # a slice
        ((16, 4, 4), (1.0,) * 3, (1.0,) * 3),
        ((100, 100, 100), (NM,) * 3, (NM,) * 3),
        ((100, 100, 100), (0.0, 1.0, 1.0), (1.0,) * 3),  # other checks name it
        ((100, 100, 100), (1.0,) * 3, (1.0, float("nan"), 1.0)),
    ],
)
def test_everything_else_passes(shape, spacing, step):
    assert grid_fault("scan.nii.gz", shape, spacing, step) is None


def test_memory_counts_channels_and_this_computer(monkeypatch):
    monkeypatch.setattr(grid, "total_memory", lambda: 100 * 100 * 100 * 60.0)
    assert grid_fault("a", (100, 100, 100), (1.0,) * 3, (1.0,) * 3, 2) is None
    assert "has 0.06" in grid_fault("a", (100, 100, 100), (1.0,) * 3, (1.0,) * 3, 3)


def test_records_are_judged_one_by_one():
    good = {"file": "a", "shape": [40] * 3, "spacing": [1.0] * 3, "channels": [None]}
    bad = good | {"file": "b", "spacing": [NM] * 3}
    assert [record["file"] for record, _ in record_faults([good, bad], [1.0] * 3)] == ["b"]


def test_a_file_is_named_before_it_is_resampled(tmp_path):
    path = save(tmp_path / "em.nii.gz", np.ones((20, 20, 20), np.uint8), np.diag([NM, NM, NM, 1]))
    steps = Compose([LoadImaged("image", ensure_channel_first=True), CheckGridd("image", [1.0] * 3)])
    with pytest.raises(RuntimeError) as raised:
        steps({"image": str(path)})
    assert isinstance(raised.value.__cause__, UserError)
    assert str(raised.value.__cause__).startswith(f"{path} has 20 x 20 x 20 voxels of 4.6e-06")
    passed = {"image": MetaTensor(torch.zeros(1, 20, 20, 20), affine=torch.eye(4))}
    assert CheckGridd("image", [1.0] * 3)(passed)["image"].shape == (1, 20, 20, 20)
