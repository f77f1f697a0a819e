"""What dataset.json says about label values, in both layouts, with regions and with voxels to ignore."""

from __future__ import annotations

import json

import pytest

from scripts.data import labels
from scripts.utils.errors import UserError

BRATS = {"background": 0, "whole tumor": [1, 2, 4], "tumor core": [1, 4], "enhancing tumor": 4}


def folder(tmp_path, found, **more) -> str:
    description = {"channel_names": {"0": "CT"}, "labels": found, **more}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return str(tmp_path)


@pytest.mark.parametrize(
    "found", [{"0": "background", "4": "tumour", "1": "edema"}, {"tumour": 4, "background": 0, "edema": 1}]
)
def test_both_layouts_give_names_in_the_order_of_the_values(found, tmp_path):
    read = labels.read(folder(tmp_path, found))
    assert read == (["background", "edema", "tumour"], [0, 1, 4], None, None, None)
    assert labels.scored(read.names, read.values, read.regions) == {"edema": [1], "tumour": [4]}
    assert labels.indices({"edema": [1], "tumour": [4]}, read.values) == {"edema": [1], "tumour": [2]}


def test_regions_have_a_channel_each_and_no_background(tmp_path):
    read = labels.read(folder(tmp_path, BRATS, regions_class_order=[2, 1, 4]))
    assert read.names == ["whole tumor", "tumor core", "enhancing tumor"]
    assert read.values == [0, 1, 2, 4]
    assert labels.scored(read.names, read.values, read.regions) == read.regions
    assert labels.members(read.regions, read.values) == [[1, 2, 3], [1, 3], [3]]
    assert labels.painted(read.order, read.values) == [2, 1, 3]
    assert labels.index_names(read) == ["background", "label 1", "label 2", "label 4"]


def test_voxels_to_ignore_are_no_class_and_come_last(tmp_path):
    read = labels.read(folder(tmp_path, {"background": 0, "organ": 2, "ignore": 7}))
    assert (read.names, read.values, read.ignore) == (["background", "organ"], [0, 2], 7)
    assert labels.stored(read.values, read.ignore) == [0, 2, 7]
    assert labels.ignore_index(read.values, read.ignore) == 2
    assert labels.stored([0, 2], None) == [0, 2]
    assert labels.ignore_index([0, 2], None) is None


@pytest.mark.parametrize(
    ("found", "more", "message"),
    [
        ({"organ": 1, "tumour": 2}, {}, r"values \[1, 2\]; expected 0"),
        ({"background": 0, "organ": 1, "tumour": 1}, {}, r"values \[0, 1, 1\]; expected 0"),
        ({"background": 0}, {}, "at least one foreground"),
        ({"background": 0, "organ": 40000}, {}, "up to 32767"),
        ({"background": 0, "organ": "1"}, {}, "expected an integer a name"),
        ({"background": 0, "organ": []}, {}, "expected an integer a name"),
        ({"0": "background", "1": "organ", "2": "organ"}, {}, 'gives two "labels" one name'),
        ({"background": 0, "ignore": 1, "organ": 2}, {}, '"ignore" the value 1; expected more than 2'),
        (BRATS, {}, '"regions_class_order" None for the regions whole tumor, tumor core, enhancing tumor'),
        (BRATS, {"regions_class_order": [1, 2]}, r'"regions_class_order" \[1, 2\]'),
        (BRATS, {"regions_class_order": [1, 2, 3]}, r"expected one of the values \[1, 2, 4\] for each"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(found, more, message, tmp_path):
    with pytest.raises(UserError, match=message):
        labels.read(folder(tmp_path, found, **more))


def test_a_class_of_unknown_values_is_refused():
    with pytest.raises(UserError, match=r"core is made of the label values \[3\]; the data set has \[0, 1, 4\]"):
        labels.indices({"core": [3]}, [0, 1, 4])
