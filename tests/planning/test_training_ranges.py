"""The ranges that weights carry hold every case that they were trained on, and no other."""

from __future__ import annotations

import pytest

from scripts.data.datasets import Dataset
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.planning.training_ranges import learn_training_ranges


@pytest.fixture(scope="module")
def data(phantom_dir) -> Dataset:
    return Dataset(phantom_dir)


@pytest.fixture(scope="module")
def records(data, tmp_path_factory) -> list[dict]:
    return fingerprint_cases(data.cases, 1, data.labels, str(tmp_path_factory.mktemp("read") / "checked.json"))


def test_ranges_hold_every_training_case_and_no_other(data, records):
    ranges = learn_training_ranges(records, data.training_cases(0), data.labels.values)
    assert {name.split(" (")[0] for name in ranges} == {
        "spacing x", "spacing y", "spacing z", "extent x", "extent y", "extent z", "tilt",
        "contrast of channel 0", "volume of label 1", "volume of label 2", "volume of label 3",
    }  # fmt: skip
    assert all(low <= high for low, high in ranges.values())
    trained = {case["case"] for case in data.training_cases(0)}
    only = [record for record in records if record["case"] in trained]
    assert learn_training_ranges(only, data.cases, data.labels.values) == ranges
    assert learn_training_ranges(records, data.cases, data.labels.values) != ranges


def test_a_case_that_cannot_be_read_has_no_part_in_them(data, records):
    bad = [*records, {"case": "none", "file": "none.nii", "error": "not found"}]
    cases = [*data.cases, {"case": "none", "image": "none.nii", "label": "none.nii"}]
    expected = learn_training_ranges(records, data.cases, data.labels.values)
    assert learn_training_ranges(bad, cases, data.labels.values) == expected


def test_extents_are_those_of_what_the_network_gets(data, records):
    padded = [{**record, "shape": [n + 40 for n in record["shape"]]} for record in records]
    assert [record["cropped"] for record in records] == [record["shape"] for record in records]
    expected = learn_training_ranges(records, data.cases, data.labels.values)
    assert learn_training_ranges(padded, data.cases, data.labels.values, crop_to_nonzero=True) == expected
    assert learn_training_ranges(padded, data.cases, data.labels.values) != expected
