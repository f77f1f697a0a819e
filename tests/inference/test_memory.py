"""What a scan takes is said before, counted from what the windows hold, and refused where the computer has less."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.inference import memory
from scripts.inference.memory import FEATURES, PROCESS, SLAB, CheckMemoryd, window_bytes
from scripts.inference.sliding_window import SlidingWindowInferer
from scripts.inference.window_sums import WindowSums
from scripts.utils.errors import UserError


def scan(*shape: int, spacing: float = 1.0) -> dict:
    meta = {"filename_or_obj": "ct.nii.gz"}
    return {"image": MetaTensor(torch.zeros(1, *shape), affine=np.diag([spacing] * 3 + [1.0]), meta=meta)}


@pytest.mark.parametrize("window_scheme", ["monai", "nnunet"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("size", [(40, 33, 21), (16, 70, 16), (61, 16, 9)])
def test_sums_take_no_more_than_is_said(size, overlap, window_scheme, monkeypatch):
    held = []
    add = WindowSums.add

    def watched(self, *args):
        add(self, *args)
        held.append(sum(4 * block.numel() for block in self.blocks.values()))

    monkeypatch.setattr(WindowSums, "add", watched)
    inferer = SlidingWindowInferer((16, 16, 16), overlap, window_scheme=window_scheme)
    inferer(torch.zeros(1, 1, *size), lambda x: x.expand(-1, 3, -1, -1, -1))
    padded = np.prod([max(n, 16) for n in size])
    others = 4 * padded + 16**3 * (4 * FEATURES + 4 * 3) + SLAB
    assert max(held) <= window_bytes(inferer, size, 1, 3) - others <= 4 * max(held) + 4 * 3 * padded


@pytest.mark.parametrize(("classes", "said"), [(15, "at most 5.66 GB"), (104, "at most 14.2 GB")])
def test_a_large_scan_is_announced(classes, said, caplog):
    check = CheckMemoryd("image", [1.0] * 3, classes, SlidingWindowInferer((128,) * 3, 0.5, window_scheme="nnunet"))
    with caplog.at_level(logging.INFO, "mednext"):
        check._tell("ct.nii.gz", [410, 410, 450], PROCESS + window_bytes(check.inferer, [410, 410, 450], 1, classes))
    assert said in caplog.text
    assert "410 x 410 x 450" in caplog.text


def test_nothing_is_said_of_a_small_scan(caplog):
    with caplog.at_level(logging.INFO, "mednext"):
        CheckMemoryd("image", [1.0] * 3, 3, SlidingWindowInferer((32,) * 3))(scan(40, 40, 40))
    assert not caplog.records


@pytest.mark.parametrize("inferer", [SlidingWindowInferer((32,) * 3), None], ids=["CPU", "GPU"])
def test_a_scan_is_refused_where_the_computer_has_less(inferer, monkeypatch):
    available = PROCESS + 0.1e9
    monkeypatch.setattr(memory, "total_memory", lambda: available)
    with pytest.raises(
        UserError, match=r"^ct.nii.gz: its 180 x 180 x 180 voxels .* with 3 classes take up to 1.\d+ GB"
    ):
        CheckMemoryd("image", [0.5] * 3, 3, inferer)(scan(90, 90, 90))
