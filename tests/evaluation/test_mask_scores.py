"""Scores of a folder of masks beside a folder of references."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import save
from scipy.spatial import KDTree

from scripts.evaluation.mask_scores import score_masks
from scripts.utils.errors import UserError
from scripts.utils.files import read_table

AFFINE = np.diag([2.0, -1.5, 1.0, 1.0])
AFFINE[:3, 3] = [5, -7, 11]


@pytest.fixture
def folders(tmp_path):
    """Two cases of labels 0, 1, 3 with a mask each, one of them moved by a voxel along the first axis."""
    label = np.zeros((12, 14, 16), np.uint8)
    label[3:7, 4:9, 5:10], label[8:11, 4:9, 5:10] = 1, 3
    for case, mask in {"a.b": label, "c 1": np.roll(label, 1, 0)}.items():
        save(tmp_path / f"labelsTs/{case}.nii.gz", label, AFFINE)
        save(tmp_path / f"masks/{case}_seg.nii.gz", mask, AFFINE)
    return tmp_path


def score(folder, **options) -> dict:
    score_masks(str(folder / "masks"), str(folder / "labelsTs"), str(folder / "scores"), **options)
    return {(row["case"], row["label"]): row for row in read_table(folder / "scores/cases.csv")}


def describe(folder, labels, **more) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))


def test_scores_are_those_of_the_voxels_in_mm(folders):
    rows = score(folders)
    assert list(rows) == [("a.b", "label 1"), ("a.b", "label 3"), ("c 1", "label 1"), ("c 1", "label 3")]
    assert [float(rows["a.b", "label 3"][m]) for m in ("dice", "nsd", "hd95_mm")] == [1, 1, 0]
    assert float(rows["c 1", "label 1"]["dice"]) == pytest.approx(3 / 4)
    assert float(rows["c 1", "label 3"]["dice"]) == pytest.approx(2 / 3)
    assert float(rows["c 1", "label 3"]["hd95_mm"]) == pytest.approx(farthest(3))
    mean = read_table(folders / "scores/summary.csv")[-1]
    assert float(mean["dice"]) == pytest.approx((1 + 1 + 3 / 4 + 2 / 3) / 4)


def farthest(edge: int) -> float:
    """HD95 of a box of `edge` x 5 x 5 voxels and itself moved by a voxel of 2 mm: by SciPy, of surface voxels."""
    box = np.zeros((edge + 2, 7, 7), bool)
    box[1 : edge + 1, 1:6, 1:6] = True
    inner = box[:-2, 1:-1, 1:-1] & box[2:, 1:-1, 1:-1] & box[1:-1, :-2, 1:-1] & box[1:-1, 2:, 1:-1]
    box[1:-1, 1:-1, 1:-1] &= ~(inner & box[1:-1, 1:-1, :-2] & box[1:-1, 1:-1, 2:])
    one = np.argwhere(box) * [2.0, 1.5, 1.0]
    other = np.add(one, [2.0, 0, 0])
    return max(np.percentile(KDTree(a).query(b)[0], 95) for a, b in ((one, other), (other, one)))


def test_names_regions_and_voxels_to_ignore_are_those_of_dataset_json(folders):
    describe(folders, {"background": 0, "whole": [1, 3], "core": [3], "ignore": 4}, regions_class_order=[1, 3])
    ignored = np.zeros((12, 14, 16), np.uint8)
    ignored[3:7, 4:9, 5:10], ignored[8:11, 4:9, 5:10], ignored[11] = 1, 3, 4
    save(folders / "labelsTs/c 1.nii.gz", ignored, AFFINE)
    rows = score(folders)
    assert {label for _, label in rows} == {"whole", "core"}
    assert float(rows["c 1", "core"]["dice"]) == pytest.approx(2 * 2 / (3 + 2))  # the plane behind it counts nowhere


def test_gaps_between_values_and_big_endian_files_are_read(folders):
    label = np.zeros((12, 14, 16), ">i2")
    label[2:5, 2:5, 2:5] = 3
    save(folders / "masks/c 1_seg.nii.gz", label, AFFINE)
    describe(folders, {"background": 0, "one": 1, "three": 3})
    assert float(score(folders)["c 1", "one"]["dice"]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "masks/c 1_seg.nii.gz").unlink(), r"has no mask of c 1 \(1 of the 2 references"),
        (lambda f: save(f / "masks/c 1.nii", np.zeros((12, 14, 16), np.uint8)), "are both of case c 1"),
        (lambda f: save(f / "masks/c 1_seg.nii.gz", np.zeros((12, 14, 15), np.uint8), AFFINE), "voxels but"),
        (lambda f: save(f / "masks/c 1_seg.nii.gz", np.zeros((12, 14, 16), np.uint8)), "lies elsewhere than"),
        (lambda f: save(f / "masks/c 1_seg.nii.gz", np.zeros((12, 14, 16, 2), np.uint8), AFFINE), "one label a voxel"),
        (lambda f: (f / "masks/c 1_seg.nii.gz").write_bytes(b"mask"), "is not a complete NIfTI file|NIfTI"),
        (lambda f: describe(f, {"background": 0, "one": 1}), "has the label value 3; dataset.json names 0 to 1"),
        (lambda f: describe(f, ["one"]), 'has no "labels" dictionary'),
        (lambda f: (f / "labelsTs").rename(f / "elsewhere"), "does not exist or is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named_and_nothing_is_written(folders, change, said):
    change(folders)
    with pytest.raises(UserError, match=said):
        score(folders)
    assert not (folders / "scores").exists()


def test_a_dataset_json_that_is_not_there_is_named(folders):
    with pytest.raises(UserError, match=r"nowhere.json not found; give a dataset.json"):
        score(folders, dataset=str(folders / "nowhere.json"))


def test_masks_of_nothing_but_background_are_said(folders):
    for file in [*folders.glob("masks/*"), *folders.glob("labelsTs/*")]:
        save(file, np.zeros((12, 14, 16), np.uint8), AFFINE)
    with pytest.raises(UserError, match="all files hold 0 alone"):
        score(folders)


def test_masks_without_a_reference_are_left_out_and_said(folders, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    (folders / "labelsTs/a.b.nii.gz").unlink()
    assert {case for case, _ in score(folders)} == {"c 1"}
    assert "without a reference: a.b" in caplog.text
