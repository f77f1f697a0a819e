"""The ranges that weights carry hold every case that they were trained on, and no other."""

from __future__ import annotations

import math

import pytest

from scripts.data.datasets import Dataset
from scripts.data.labels import Labels
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.planning.training_ranges import learn_training_ranges


@pytest.fixture(scope="module")
def data(phantom_dir) -> Dataset:
    return Dataset(phantom_dir)


@pytest.fixture(scope="module")
def records(data, tmp_path_factory) -> list[dict]:
    return fingerprint_cases(data.cases, 1, data.labels, str(tmp_path_factory.mktemp("read") / "checked.json"))


def test_ranges_hold_every_training_case_and_no_other(data, records):
    ranges = learn_training_ranges(records, data.training_cases(0), data.labels)
    assert {name.split(" (")[0] for name in ranges} == {
        "spacing x", "spacing y", "spacing z", "extent x", "extent y", "extent z", "tilt",
        "contrast of channel 0", *(f"volume of {name}" for name in data.labels.names[1:]),
    }  # fmt: skip
    assert all(low <= high for low, high in ranges.values())
    trained = {case["case"] for case in data.training_cases(0)}
    only = [record for record in records if record["case"] in trained]
    assert learn_training_ranges(only, data.cases, data.labels) == ranges
    assert learn_training_ranges(records, data.cases, data.labels) != ranges


def test_a_case_that_cannot_be_read_has_no_part_in_them(data, records):
    bad = [*records, {"case": "none", "file": "none.nii", "error": "not found"}]
    cases = [*data.cases, {"case": "none", "image": "none.nii", "label": "none.nii"}]
    expected = learn_training_ranges(records, data.cases, data.labels)
    assert learn_training_ranges(bad, cases, data.labels) == expected


def test_extents_are_those_of_what_the_network_gets(data, records):
    padded = [{**record, "shape": [n + 40 for n in record["shape"]]} for record in records]
    assert [record["cropped"] for record in records] == [record["shape"] for record in records]
    expected = learn_training_ranges(records, data.cases, data.labels)
    assert learn_training_ranges(padded, data.cases, data.labels, crop_to_nonzero=True) == expected
    assert learn_training_ranges(padded, data.cases, data.labels) != expected


def test_the_volume_of_a_region_is_that_of_all_its_parts(records, data):
    labels = Labels(["all", "core"], [0, 1, 2, 3], {"all": [1, 2, 3], "core": [3]}, [1, 3])
    ranges, parts = (learn_training_ranges(records, data.cases, one) for one in (labels, data.labels))
    assert {name for name in ranges if name.startswith("volume")} == {"volume of all (ml)", "volume of core (ml)"}
    *_, last = data.labels.names
    assert ranges["volume of core (ml)"] == parts[f"volume of {last} (ml)"]
    counts = [sum(record["labels"][1:4]) * math.prod(record["spacing"]) / 1000 for record in records]
    assert ranges["volume of all (ml)"] == pytest.approx([min(counts), max(counts)], abs=1e-4)
