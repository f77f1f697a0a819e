"""What dataset.json says about label values, in both layouts, with regions and with voxels to ignore."""

from __future__ import annotations

import json

import pytest

from scripts.data.datasets import Dataset
from scripts.data.labels import Labels
from scripts.utils.errors import UserError
from scripts.weights.model_settings import ModelSettings

BRATS = {"background": 0, "whole tumor": [1, 2, 4], "tumor core": [1, 4], "enhancing tumor": 4}


def folder(tmp_path, found, **more) -> str:
    description = {"channel_names": {"0": "CT"}, "labels": found, **more}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return str(tmp_path)


@pytest.mark.parametrize(
    "found", [{"0": "background", "4": "tumour", "1": "edema"}, {"tumour": 4, "background": 0, "edema": 1}]
)
def test_both_layouts_give_names_in_the_order_of_the_values(found, tmp_path):
    labels = Dataset(folder(tmp_path, found)).labels
    assert labels == Labels(["background", "edema", "tumour"], [0, 1, 4])
    assert labels.eval_classes == {"edema": [1], "tumour": [4]}
    assert labels.indices_of(labels.eval_classes) == {"edema": [1], "tumour": [2]}
    assert (labels.activation, labels.region_order, labels.region_indices) == ("softmax", None, None)
    assert labels.index_names == labels.names


def test_regions_have_a_channel_each_and_no_background(tmp_path):
    labels = Dataset(folder(tmp_path, BRATS, regions_class_order=[2, 1, 4])).labels
    assert labels.names == ["whole tumor", "tumor core", "enhancing tumor"]
    assert labels.values == [0, 1, 2, 4]
    assert labels.eval_classes == labels.regions
    assert labels.region_indices == [[1, 2, 3], [1, 3], [3]]
    assert labels.region_order == [2, 1, 3]
    assert labels.activation == "sigmoid"
    assert labels.index_names == ["background", "label 1", "label 2", "label 4"]


def test_voxels_to_ignore_are_no_class_and_come_last(tmp_path):
    labels = Dataset(folder(tmp_path, {"background": 0, "organ": 2, "ignore": 7})).labels
    assert (labels.names, labels.values, labels.ignore_value) == (["background", "organ"], [0, 2], 7)
    assert (labels.file_values, labels.ignore_index) == ([0, 2, 7], 2)
    without = Labels(["background", "organ"], [0, 2])
    assert (without.file_values, without.ignore_index) == ([0, 2], None)


def test_labels_beside_weights_are_those_that_were_trained_for(tmp_path):
    trained = Dataset(folder(tmp_path, BRATS, regions_class_order=[2, 1, 4])).labels
    settings = ModelSettings(
        out_channels=3,
        labels=trained.names,
        label_values=trained.values,
        regions=trained.regions,
        regions_class_order=trained.regions_class_order,
    )
    assert Labels.from_settings(settings) == trained


def test_labels_that_nobody_wrote_down_are_numbered():
    labels = Labels.from_settings(ModelSettings(out_channels=3))
    assert labels == Labels(["background", "label 1", "label 2"], [0, 1, 2])


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
        Dataset(folder(tmp_path, found, **more))


def test_a_class_of_unknown_values_is_refused():
    with pytest.raises(UserError, match=r"core is made of the label values \[3\]; the data set has \[0, 1, 4\]"):
        Labels(["background", "a", "b"], [0, 1, 4]).indices_of({"core": [3]})
