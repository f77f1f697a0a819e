"""Measures have their unit in their name, and their textbook value."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.data.statistics import (
    class_sums,
    contrast,
    label_sums,
    label_volumes,
    present_ranges,
    rounded,
    scan_measures,
)


def test_a_scan_has_spacing_and_extent_an_axis_and_contrast_a_channel():
    assert scan_measures([3.0, 2.0, 1.5], [8, 12, 10], [45.0, 120.0], 7.0) == {
        "spacing x (mm)": 3.0, "spacing y (mm)": 2.0, "spacing z (mm)": 1.5,
        "extent x (mm)": 24.0, "extent y (mm)": 24.0, "extent z (mm)": 15.0,
        "contrast of channel 0 (degrees)": 45.0, "contrast of channel 1 (degrees)": 120.0, "tilt (degrees)": 7.0,
    }  # fmt: skip


def test_volumes_are_in_millilitres():
    assert label_volumes({"liver": 500, "label 7": 0}, 1.5) == pytest.approx(
        {"volume of liver (ml)": 0.75, "volume of label 7 (ml)": 0.0}
    )


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("top", "dtype"), [(5, np.uint8), (300, np.int16), (1, np.uint8)])
def test_voxels_are_counted_and_added_up_by_label_and_by_class(top, dtype, order):
    rng = np.random.default_rng(0)
    labels = np.asarray(rng.integers(0, top, (7, 5, 35)), dtype, order=order)
    voxels = np.asarray(rng.integers(-1000, 3000, labels.shape), np.int16)
    counts, sums = label_sums(labels), label_sums(labels, voxels)
    for value in range(top):
        assert counts.get(value, 0) == (labels == value).sum()
        assert sums.get(value, 0) == voxels[labels == value].astype(float).sum()
    assert class_sums(counts, {"odd": [1, 3], "none": [999]}) == {"odd": np.isin(labels, [1, 3]).sum(), "none": 0}
    assert label_sums(np.zeros((0, 0, 0), np.uint8)) == {0: 0}


LIVER = {"volume of liver (ml)": [900.0, 2000.0]}


@pytest.mark.parametrize(
    ("written", "classes", "expected"),
    [
        ({"volume of label 6 (ml)": [900.0, 2000.0]}, {"liver": [6]}, LIVER),
        (LIVER, {"liver": [6]}, LIVER),
        ({"volume of label 1 (ml)": [1, 2]}, {"label 1": [1]}, {"volume of label 1 (ml)": [1, 2]}),
        (  # names that look like the old keys, in an old file and in a new one
            {"volume of label 1 (ml)": [1, 2], "volume of label 2 (ml)": [3, 4]},
            {"label 2": [1], "label 3": [2]},
            {"volume of label 2 (ml)": [1, 2], "volume of label 3 (ml)": [3, 4]},
        ),
        ({"volume of label 2 (ml)": [1, 2]}, {"label 2": [1]}, {"volume of label 2 (ml)": [1, 2]}),
        ({"volume of label 4 (ml)": [1, 2], "volume of label 1 (ml)": [3, 4]}, {"all": [1, 4], "core": [4]},
         {"volume of core (ml)": [1, 2]}),  # of the whole region nothing was learnt
        ({"volume of label 1 (ml)": [1, 2]}, {}, {"volume of label 1 (ml)": [1, 2]}),
    ],
)  # fmt: skip
def test_volumes_of_earlier_weights_are_those_of_the_organs(written, classes, expected):
    assert present_ranges(written, classes) == expected
    assert present_ranges(expected, classes) == expected


@pytest.mark.parametrize(
    ("mean", "deviation", "degrees"),
    [(1.0, 1.0, 45.0), (300.0, 0.0, 0.0), (0.0, 5.0, 90.0), (-1.0, 1.0, 135.0), (-7.0, 0.0, 180.0), (0.0, 0.0, 0.0)],
)
def test_contrast_is_an_angle_of_any_unit(mean, deviation, degrees):
    for unit in (1e-30, 1.0, 1e30):
        assert contrast(mean * unit, deviation * unit) == pytest.approx(degrees)


def test_contrast_of_ct_passes_smoothly_through_a_mean_of_zero():
    around = [contrast(mean, 400.0) for mean in (-4.0, -0.4, 0.0, 0.4, 4.0)]  # Hounsfield units; std / mean: +-1000
    assert max(around) - min(around) < 1.2
    assert contrast(-400.0, 450.0) > contrast(624.0, 450.0) + 90  # the same CT, stored with 1024 added


def test_ranges_of_earlier_weights_are_judged_as_before():
    found = present_ranges({"contrast of channel 0 (std / mean)": [0.3643, 0.5125], "extent x (mm)": [31.0, 42.0]})
    assert found == {
        "contrast of channel 0 (degrees)": [contrast(1.0, 0.3643), contrast(1.0, 0.5125)], "extent x (mm)": [31.0, 42.0]
    }  # fmt: skip
    assert present_ranges({"contrast of channel 1 (std / mean)": [-30.0, 50.0]}) == {}  # a CT's: it said nothing
    assert present_ranges(found) == found


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.3642857, 0.3643), (1.0, 1.0), (173.37821, 173.3782), (4.6e-6, 4.6e-6), (1.23456789e-12, 1.23457e-12), (0, 0)],
)
def test_numbers_keep_four_decimals_or_six_digits(value, expected):
    assert rounded(value) == pytest.approx(expected, rel=1e-12)
