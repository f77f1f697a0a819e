"""The ranges that weights carry hold every case that they were trained on, and no other."""

from __future__ import annotations

import pytest

from scripts.data.datasets import training_cases
from scripts.data.labels import read as read_labels
from scripts.planning.training_ranges import learn_training_ranges


@pytest.fixture(scope="module")
def ranges(phantom_dir, tmp_path_factory):
    """Learn the ranges of the cases that fold 0 trains on."""
    file = str(tmp_path_factory.mktemp("fingerprint") / "fingerprint.json")
    return learn_training_ranges(training_cases(str(phantom_dir), 0), 1, read_labels(str(phantom_dir)).values, file)


def test_ranges_hold_every_training_case(ranges):
    assert {name.split(" (")[0] for name in ranges} == {
        "spacing x", "spacing y", "spacing z", "extent x", "extent y", "extent z",
        "contrast of channel 0", "volume of label 1", "volume of label 2", "volume of label 3",
    }  # fmt: skip
    assert all(low <= high for low, high in ranges.values())


def test_a_case_that_cannot_be_read_has_no_part_in_them(phantom_dir, ranges, tmp_path):
    items = [*training_cases(str(phantom_dir), 0), {"case": "none", "image": "none.nii", "label": "none.nii"}]
    values = read_labels(str(phantom_dir)).values
    assert learn_training_ranges(items, 1, values, str(tmp_path / "fingerprint.json")) == ranges
