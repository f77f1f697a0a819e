"""The grid: 1 mm, the median and the mixed one, and which of them is recommended for what kind of scan."""

from __future__ import annotations

import numpy as np
import pytest

from planning.test_planner import record
from scripts.planning.spacing import mixed_spacing, recommended_spacing, target_spacing, training_grid

CARDIAC = [record((1.5, 1.5, 8.0), (256, 216, 10))]
PROSTATE = [record((0.5, 0.5, 3.0), (320, 320, 20))]
SAGITTAL = [record((4.0, 0.6, 0.6), (15, 320, 320))]
STACKS = [record(s, n) for s, n in (((1.1, 1.1, 3.3), (320, 320, 22)), ((1.1, 3.3, 1.1), (320, 22, 320)),
                                    ((3.3, 1.1, 1.1), (22, 320, 320)))]  # fmt: skip


def test_median_spacing_is_nnunets_with_thick_slices_at_their_tenth_percentile():
    assert target_spacing([record((0.7, 0.7, 1.0)), record((0.8, 0.8, 1.5)), record((0.9, 0.9, 2.0))]) == [
        0.8, 0.8, 1.5
    ]  # fmt: skip
    thick = [record((0.8, 0.8, s), (400, 400, 40)) for s in (3.0, 5.0, 5.0, 5.0, 6.0)]
    assert target_spacing(thick) == [0.8, 0.8, pytest.approx(np.percentile([3, 5, 5, 5, 6], 10))]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (CARDIAC, [1.5, 1.5, 1.5]),  # 10 slices; finer than in the plane would be interpolation alone
        (PROSTATE, [0.5, 0.5, 1.0]),
        (SAGITTAL, [1.0, 0.6, 0.6]),  # whichever axis it is
        ([record((0.8, 0.8, 5.0), (512, 512, 78))], [0.8, 0.8, 5.0]),  # enough slices
        (STACKS, [1.1, 1.1, 1.1]),  # slices along different axes
        ([record((1.0, 1.0, 1.0), (35, 50, 35))], [1.0, 1.0, 1.0]),
        ([record((2.0, 2.0, 2.0), (20, 20, 20))], [2.0, 2.0, 2.0]),
        ([record((5e-6, 5e-6, 3e-5), (256, 256, 20))], [5e-6, 5e-6, 3e-5]),  # microscopy
    ],
)
def test_mixed_spacing_keeps_the_plane_and_refines_few_slices(records, expected):
    assert mixed_spacing(records) == expected
    assert training_grid(records, "mixed") == expected


@pytest.mark.parametrize(
    ("records", "name", "reason"),
    [
        (CARDIAC, "mixed", "1 mm makes 9.95 M voxels of the median case's 0.553 M, this grid 2.95 M"),
        (PROSTATE, "mixed", "1 mm merges 2 voxels along each axis of the plane into one"),
        (SAGITTAL, "mixed", "1 mm merges 1.7 voxels along each axis of the plane into one"),
        ([record((0.8, 0.8, 5.0), (512, 512, 78))], "median", "1 mm makes 65.4 M voxels of the median case's 20.4 M"),
        ([record((0.4, 0.4, 0.4), (200, 200, 200))], "median", "1 mm merges 2.5 voxels"),
        ([record((5e-6, 5e-6, 5e-6), (256, 256, 100))], "median", "not every case can be on a grid of 1 mm"),
        ([record((0.76, 0.76, 3.0), (512, 512, 130))], None, "1 mm makes 59.1 M voxels of the median case's 34.1 M"),
        ([record((1.0, 1.0, 1.0), (35, 50, 35))], None, "1 mm makes 61.2 k voxels of the median case's 61.2 k"),
        (STACKS, None, "1 mm makes"),
    ],
)
def test_the_recommendation_follows_from_voxels(records, name, reason):
    found = recommended_spacing(records)
    assert found[0] == name
    assert found[1].startswith(reason)
    assert ("this grid" in found[1]) == ("this grid" in reason)
