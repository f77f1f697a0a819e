"""Which cases and scans are found, in which folds, and which folders are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import save

from scripts.data.datasets import Dataset
from scripts.data.folds import five_folds
from scripts.data.scans import find_scans
from scripts.planning.fingerprint import fingerprint_case
from scripts.planning.integrity import unusable_splits
from scripts.utils.errors import UserError


def nnunet_folder(tmp_path, cases=("a", "b", "c"), channels=2, **changes):
    """An nnU-Net v2 data set with 4 x 4 x 4 voxels a case."""
    for case in cases:
        for channel in range(channels):
            save(tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz", np.zeros((4, 4, 4), np.int16))
        save(tmp_path / "labelsTr" / f"{case}.nii.gz", np.zeros((4, 4, 4), np.uint8))
    description = {
        "channel_names": {str(i): f"channel{i}" for i in range(channels)},
        "labels": {"background": 0, "organ": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **changes,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return str(tmp_path)


def test_decathlon_folder_gives_cases_and_channels(phantom_dir):
    assert Dataset(phantom_dir).channels == ["phantom"]
    found = Dataset(phantom_dir).cases
    assert [case["case"] for case in found] == [f"phantom_0{i}" for i in range(5)]
    assert nib.load(found[0]["image"]).shape == nib.load(found[0]["label"]).shape


def test_nnunet_folder_gives_one_file_a_channel(tmp_path):
    folder = nnunet_folder(tmp_path)
    assert [p.rsplit("/", 1)[1] for p in Dataset(folder).cases[1]["image"]] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_ten_channels_keep_their_numeric_order(tmp_path):
    folder = nnunet_folder(tmp_path, channel_names={str(i): f"channel{i}" for i in range(11)})
    assert Dataset(folder).channels[10] == "channel10"


def test_folds_partition_the_cases():
    names = [f"case_{i:02d}" for i in range(23)]
    folds = five_folds(names)
    assert sorted(n for fold in folds for n in fold["val"]) == names
    assert all(sorted(fold["train"] + fold["val"]) == names for fold in folds)


def test_folds_are_those_of_nnunet():
    # KFold(5, shuffle=True, random_state=12345) of scikit-learn 1.7 over ten sorted names
    assert [fold["val"] for fold in five_folds(list("abcdefghij"))] == [
        ["a", "h"], ["d", "j"], ["e", "g"], ["b", "i"], ["c", "f"]
    ]  # fmt: skip


def test_three_cases_make_three_folds():
    assert [len(fold["val"]) for fold in five_folds(["a", "b", "c"])] == [1, 1, 1]


def test_a_split_of_ones_own_is_used(tmp_path):
    folder = nnunet_folder(tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["c"], "val": ["a", "b"]}]))
    training, validation = Dataset(folder).split(0)
    assert [case["case"] for case in training] == ["c"]
    assert [case["case"] for case in validation] == ["a", "b"]


def test_a_fold_that_trains_on_what_it_holds_out_is_refused(tmp_path):
    folder = nnunet_folder(tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["b", "c"], "val": ["a", "b"]}]))
    with pytest.raises(UserError, match="splits_final.json trains fold 0 on case b and holds it out as well"):
        Dataset(folder).split(0)


def test_fold_all_trains_and_validates_on_everything(phantom_dir):
    training, validation = Dataset(phantom_dir).split("all")
    assert training == validation == Dataset(phantom_dir).cases


@pytest.mark.parametrize("fold", [5, -1, "first"])
def test_a_fold_out_of_range_is_refused(fold, phantom_dir):
    with pytest.raises(UserError, match=f"fold is {fold!r}; expected 0 to 4 or 'all'"):
        Dataset(phantom_dir).split(fold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, 'has no "labels" dictionary'),
        ({"file_ending": ".png"}, "'.png'; expected .nii.gz"),
    ],
    ids=["no labels", "file ending"],
)
def test_a_dataset_json_that_cannot_be_used_is_refused(changes, message, tmp_path):
    folder = nnunet_folder(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        _ = Dataset(folder).cases


def test_one_case_is_too_few(tmp_path):
    with pytest.raises(UserError, match="1 labelled cases; expected at least 2"):
        _ = Dataset(nnunet_folder(tmp_path, cases=("a",))).cases


def test_all_missing_files_are_named(tmp_path):
    folder = nnunet_folder(tmp_path)
    (tmp_path / "imagesTr" / "b_0001.nii.gz").unlink()
    (tmp_path / "labelsTr" / "c.nii.gz").unlink()
    with pytest.raises(UserError, match=r"lacks 2 files.*\n.*b_0001.nii.gz not found.*b needs\n.*c.nii.gz not found"):
        _ = Dataset(folder).cases


def test_broken_json_is_named(tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="dataset.json is not valid JSON"):
        _ = Dataset(tmp_path).cases


class TestScans:
    """What inference finds to segment."""

    def files(self, folder, *names):
        for name in names:
            save(folder / name, np.zeros((2, 2, 2), np.uint8))
        return folder

    def test_every_nifti_file_of_a_folder_is_a_case(self, tmp_path):
        folder = self.files(tmp_path, "b.nii", "a.nii.gz", "scan_2024.nii.gz", "scan_2025.nii.gz", "._a.nii.gz")
        (folder / "notes.txt").touch()
        assert [s["case"] for s in find_scans(str(folder))] == ["a", "b", "scan_2024", "scan_2025"]

    def test_channels_of_a_case_belong_together(self, tmp_path):
        folder = self.files(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
        found = find_scans(str(folder), channels=2)
        assert [s["case"] for s in found] == ["a", "b"]
        assert [len(s["image"]) for s in found] == [2, 2]

    def test_one_file_stands_for_its_case(self, tmp_path):
        folder = self.files(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
        assert len(find_scans(str(folder / "a_0001.nii.gz"), channels=2)[0]["image"]) == 2
        assert find_scans(str(folder / "a_0000.nii.gz"), channels=1) == [
            {"case": "a", "image": str(folder / "a_0000.nii.gz")}
        ]

    def test_a_training_folder_gives_its_test_scans_first(self, tmp_path):
        self.files(tmp_path, "imagesTr/a.nii.gz", "imagesTs/b.nii.gz")
        assert [s["case"] for s in find_scans(str(tmp_path))] == ["b"]

    def test_endings_in_any_case_count_and_what_is_left_out_is_named(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
        folder = self.files(tmp_path, "D.NII.GZ", "_x.nii.gz", "c.Nii", ".h.nii.gz")
        (folder / "b.nrrd").touch()
        (folder / "gone.nii.gz").symlink_to(folder / "nowhere.nii.gz")
        assert [s["case"] for s in find_scans(str(folder))] == ["D", "_x", "c"]
        assert all(name in caplog.text for name in ("b.nrrd", "gone.nii.gz", ".h.nii.gz"))

    def test_masks_of_an_earlier_run_are_no_scans(self, tmp_path):
        folder = self.files(tmp_path, "a.nii.gz", "a_seg.nii.gz", "b_seg.nii.gz", "p1.T1.nii.gz", "p1.T1_seg.nii.gz")
        assert [s["case"] for s in find_scans(str(folder))] == ["a", "b_seg", "p1.T1"]
        self.files(folder, "c_0000.nii.gz", "c_seg.nii.gz")
        assert [s["case"] for s in find_scans(str(folder))] == ["a", "b_seg", "c", "p1.T1"]

    @pytest.mark.parametrize("name", ["a.b", "p_0000", "p_0001", "s_2024", "1.2.840", "a.nii"])
    def test_a_file_has_one_id_in_training_and_inference(self, name, tmp_path):
        folder = self.files(tmp_path, f"imagesTr/{name}.nii.gz", "labelsTr/l.nii.gz")
        listed = [{"image": f"imagesTr/{name}.nii.gz", "label": "labelsTr/l.nii.gz"}]
        description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "x"}, "training": listed}
        (folder / "dataset.json").write_text(json.dumps(description))
        assert [c["case"] for c in Dataset(folder).listed_cases] == [s["case"] for s in find_scans(str(folder))]

    @pytest.mark.parametrize("channels", [1, 2])
    @pytest.mark.parametrize(
        "names", [("a.nii", "a.nii.gz"), ("a.nii", "a_0000.nii"), ("a_0000.nii", "a_0000.nii.gz")], ids=str
    )
    def test_two_files_of_one_case_are_refused(self, names, channels, tmp_path):
        with pytest.raises(UserError, match=f"are of one case, a, and not a channel each of {channels}; move those"):
            find_scans(str(self.files(tmp_path, *names)), channels)

    @pytest.mark.parametrize(
        ("name", "message"), [("", "holds no .nii.gz"), ("x", "does not exist"), ("t.txt", "not a")]
    )
    def test_nothing_to_segment_is_said(self, name, message, tmp_path):
        if name.endswith("txt"):
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=message):
            find_scans(str(tmp_path / name))


def test_dataset_json_is_parsed_once(phantom_dir, monkeypatch):
    opened = []
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(self.name) or read_text(self, *a, **k))
    data = Dataset(phantom_dir)
    assert (data.channels, data.labels.values, len(data.cases)) == (["phantom"], [0, 1, 2, 3], 5)
    assert data.training_cases(0) + data.validation_cases(0) + data.split("all")[0]
    assert opened.count("dataset.json") == 1


SPLITS = {  # text of splits_final.json -> what is said
    "[{": "is not valid JSON",
    "": "is not valid JSON",
    "\x00\x01": "is not valid JSON",
    "[" * 100_000: "is not valid JSON",
    '[{"train": ["\\ud800"], "val": []}]': "is not valid JSON",
    "[]": "holds an empty list; expected a list of",
    "{}": "holds a dict; expected a list of",
    "null": "holds a NoneType",
    '[["a", "b"]]': "has a list as fold 0; expected a list of",
    '[{"train": ["a", "b"]}]': 'has nothing as "val" of fold 0',
    '[{"train": "ab", "val": ["c"]}]': "has 'ab' as \"train\" of fold 0",
    '[{"train": [1, 2], "val": ["c"]}]': r'has \[1, 2\] as "train" of fold 0',
    '[{"train": [["a"]], "val": ["c"]}]': r"has \[\['a'\]\] as \"train\"",
    '[{"train": [], "val": ["c"]}]': "trains fold 0 on no case",
    '[{"train": ["a"], "val": ["c", "c"]}]': "holds out case c of fold 0 twice",
    '[{"train": ["a.nii.gz"], "val": ["c"]}]': "names case a.nii.gz, which",
}


@pytest.mark.parametrize("text", SPLITS, ids=range(len(SPLITS)))
def test_a_split_that_cannot_be_used_is_one_sentence(text, tmp_path):
    data = Dataset(nnunet_folder(tmp_path))
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(UserError, match=f"splits_final.json {SPLITS[text]}"):
        data.split(0)
    assert [finding.file for finding in unusable_splits(data)] == ["splits_final.json"]


def test_a_split_may_hold_out_none_and_say_more(tmp_path):
    folder = nnunet_folder(tmp_path)
    text = json.dumps([{"train": ["a", "a", "b"], "val": [], "seed": 3}])
    (tmp_path / "splits_final.json").write_text("\ufeff" + text, encoding="utf-8")  # as some editors begin a file
    assert [case["case"] for case in Dataset(folder).training_cases(0)] == ["a", "a", "b"]


def decathlon_folder(tmp_path, training, **changes):
    description = {
        "modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "organ"}, "training": training, **changes
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return str(tmp_path)


def test_several_images_of_a_decathlon_case_are_its_channels(tmp_path):
    listed = []
    for name in "ab":
        for channel in range(2):
            save(tmp_path / f"imagesTr/{name}_{channel:04d}.nii.gz", np.full((4, 4, 4), channel, np.int16))
        save(tmp_path / f"labelsTr/{name}.nii.gz", np.ones((4, 4, 4), np.uint8))
        images = [f"imagesTr/{name}_{channel:04d}.nii.gz" for channel in range(2)]
        listed.append({"image": images, "label": f"labelsTr/{name}.nii.gz"})
    data = Dataset(decathlon_folder(tmp_path, listed))
    assert [case["case"] for case in data.cases] == ["a", "b"]
    record = fingerprint_case(data.cases[0], 2, data.labels)
    assert [channel and channel["mean"] for channel in record["channels"]] == [None, 1.0]


@pytest.mark.parametrize(
    "entry",
    ["a.nii.gz", 7, None, {}, {"image": "a"}, {"image": 1, "label": "a"}, {"image": [], "label": "a"},
     {"image": ["a", 1], "label": "a"}, {"image": "a", "label": ["a"]}, {"image": "", "label": "a"}],
)  # fmt: skip
def test_a_case_that_cannot_be_read_is_named_by_its_place(entry, tmp_path):
    folder = decathlon_folder(tmp_path, [{"image": "a.nii", "label": "b.nii"}, entry])
    with pytest.raises(UserError, match='as "training" case 1; expected'):
        _ = Dataset(folder).listed_cases


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": {"first": "T1"}}, 'gives "modality"'),
        ({"modality": {"0": "T1", "00": "T2"}}, "expected a name a channel"),
        ({"modality": {"0": ["T1"]}}, "expected a name a channel"),
        ({"modality": {}}, "expected a name a channel"),
        ({"labels": {"0": "background", "1": ["organ"]}}, "expected a name for each value"),
        ({"labels": {"²": "background", "1": "organ"}}, "expected an integer a name"),
        ({"labels": {"9" * 5000: "background", "1": "organ"}}, "expected an integer a name"),
        ({"labels": {"background": 0, "organ": 1, "ignore": [2, 3]}}, '"ignore" the value'),
        ({"labels": {"background": 0, "organ": 1, "ignore": 10**9}}, '"ignore" the value'),
        (
            {"labels": {"background": 0, "a": [1, 2], "b": [2]}, "regions_class_order": [[1], 2]},
            '"regions_class_order"',
        ),
    ],
)
def test_channels_and_labels_of_any_type_are_one_sentence(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Dataset(decathlon_folder(tmp_path, [], **changes))


@pytest.mark.parametrize("text", ["[]", "3", "null", '"labels"', "{]", "[" * 100_000, '{"a": "\\ud800"}', "9" * 5000])
def test_any_other_text_of_dataset_json_is_one_sentence(text, tmp_path):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset.json (holds a|is not valid JSON)"):
        Dataset(tmp_path)
