"""Measures have their unit in their name, and their textbook value."""

from __future__ import annotations

import pytest

from scripts.data.statistics import label_volumes, scan_measures


def test_a_scan_has_spacing_and_extent_an_axis_and_contrast_a_channel():
    assert scan_measures([3.0, 2.0, 1.5], [8, 12, 10], [0.5, -2.0]) == {
        "spacing x (mm)": 3.0, "spacing y (mm)": 2.0, "spacing z (mm)": 1.5,
        "extent x (mm)": 24.0, "extent y (mm)": 24.0, "extent z (mm)": 15.0,
        "contrast of channel 0 (std / mean)": 0.5, "contrast of channel 1 (std / mean)": -2.0,
    }  # fmt: skip


def test_volumes_are_in_millilitres():
    assert label_volumes({2: 500, 7: 0}, 1.5) == pytest.approx(
        {"volume of label 2 (ml)": 0.75, "volume of label 7 (ml)": 0.0}
    )
