"""Folds stay when a data set grows, and what was read and prepared of it is not read and prepared again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import python_m, save

from scripts.data.datasets import Dataset
from scripts.data.extend_folds import extend_folds
from scripts.data.phantom import phantom
from scripts.planning.fingerprint import fingerprint_case
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.preprocessing.cache import CachedDataset
from scripts.preprocessing.loading import LoadScand
from scripts.utils.errors import UserError


def grow(folder: Path, count: int, changed: bool = False) -> list[str]:
    """Add copies of cases to a data set, with other voxels if `changed`; return the names."""
    description = json.loads((folder / "dataset.json").read_text())
    names = [f"more_{number}" for number in range(count)]
    for number, name in enumerate(names):
        for part in ("images", "labels"):
            image = nib.load(folder / f"{part}Tr/phantom_{number % 3:02d}.nii.gz")
            voxels = np.asanyarray(image.dataobj)
            save(folder / f"{part}Tr/{name}.nii.gz", voxels[::-1] if changed else voxels, image.affine)
        files = {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        description["training"].append(files)
    (folder / "dataset.json").write_text(json.dumps(description))
    return names


@pytest.fixture
def folder(phantom_dir, tmp_path):
    return shutil.copytree(phantom_dir, tmp_path / "data")


def held_out(folder) -> list[list[str]]:
    folds = Dataset(folder).folds
    for fold in folds:  # each case is either trained on or held out
        assert sorted([*fold["train"], *fold["val"]]) == [case["case"] for case in Dataset(folder).cases]
    return [fold["val"] for fold in folds]


def test_earlier_cases_stay_in_their_fold_and_new_ones_spread(folder, capsys):
    before = held_out(folder)
    python_m("scripts", "extend_folds", "--dataset_dir", folder)  # before they come
    assert held_out(folder) == before
    names = grow(folder, 7)
    extend_folds(str(folder))
    after = held_out(folder)
    assert [new[: len(old)] for new, old in zip(after, before, strict=True)] == before
    assert sorted(name for fold in after for name in fold if name.startswith("more")) == names
    assert max(map(len, after)) - min(map(len, after)) <= 1
    assert (
        "5 folds of 5 cases that stay where they were, 7 new ones\nmore_0: held out by fold 0"
        in capsys.readouterr().out
    )
    extend_folds(str(folder))
    assert held_out(folder) == after


@pytest.mark.parametrize("count", [1, 6])
def test_cases_that_came_before_the_split_was_written_are_named(count, folder):
    before = held_out(folder)
    names = grow(folder, count)
    changed = [sorted(fold) for fold in held_out(folder)]
    extend_folds(str(folder), names)
    after = held_out(folder)
    assert [new[: len(old)] for new, old in zip(after, before, strict=True)] == before
    assert changed != [sorted(fold) for fold in after]  # nnU-Net's rule shuffles anew


def test_a_single_fold_holds_out_what_it_did(folder):
    names = [f"phantom_0{number}" for number in range(5)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:3], "val": names[3:]}]))
    grow(folder, 2)
    extend_folds(str(folder))
    (fold,) = Dataset(folder).folds
    assert fold == {"train": [*names[:3], "more_0", "more_1"], "val": names[3:]}


@pytest.mark.parametrize(
    ("split", "new", "said"),
    [
        (False, ["gone"], "new names case gone, which .* does not have"),
        (True, ["phantom_01"], "new names case phantom_01, which .*splits_final.json has already"),
        (False, [f"phantom_0{number}" for number in range(4)], "new names 4 of 5 cases; expected at least 2"),
        (False, {"a": 1}, "new is .*; expected"),
    ],
)
def test_what_cannot_be_extended_is_said(split, new, said, folder):
    if split:
        extend_folds(str(folder))
    with pytest.raises(UserError, match=said):
        extend_folds(str(folder), new)
    assert (folder / "splits_final.json").is_file() == split


def test_only_new_cases_are_read_and_prepared(tmp_path):
    folder = Path(phantom(str(tmp_path / "data"), training=3, test=0))

    def written() -> dict[str, int]:
        """Read and prepare all cases; return what lies there, with its time."""
        data = Dataset(folder)
        records = fingerprint_cases(data.cases, 1, data.labels, str(tmp_path / "checked.json"))
        CachedDataset(data.cases, [[LoadScand("image")]], str(tmp_path / "cache"), (1, 1, 1)).prepare()
        assert [record["case"] for record in records] == [case["case"] for case in data.cases]
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*.pt")}

    before = written()
    grow(folder, 1, changed=True)
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "scripts.planning.fingerprint_file.fingerprint_case",
            lambda case, *rest: read.append(case["case"]) or fingerprint_case(case, *rest),
        )
        after = written()
    assert read == ["more_0"]
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
