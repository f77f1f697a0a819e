"""Lists of cases in CSV and JSON, for inference and for training folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import save

from scripts.data.datasets import Dataset
from scripts.data.scans import find_scans
from scripts.utils.errors import UserError


def found(path, content, channels=1) -> list[tuple[str, object]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [(case["case"], case["image"]) for case in find_scans(str(path), channels)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "case,image\nb,x/1.nii.gz\na,/abs/2.nrrd\n"),
        ("list.CSV", '\ufeff"image","age","case"\r\nx/1.nii.gz,7,b\r\n/abs/2.nrrd,8,a\r\n'),
        ("list.json", [{"case": "b", "image": "x/1.nii.gz"}, {"case": "a", "image": ["/abs/2.nrrd"]}]),
        ("list.json", {"testing": [{"case": "b", "image": "x/1.nii.gz"}, {"case": "a", "image": "/abs/2.nrrd"}]}),
    ],
)
def test_cases_are_those_of_the_list(tmp_path, name, content):
    assert found(tmp_path / name, content) == [("a", "/abs/2.nrrd"), ("b", str(tmp_path / "x/1.nii.gz"))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "image\nx/1.nii.gz\ny/2.nrrd\n"),
        ("list.json", ["y/2.nrrd", "x/1.nii.gz"]),
        ("list.json", [["x/1.nii.gz"], ["y/2.nrrd"]]),
        ("dataset.json", {"labels": {}, "test": ["./y/2.nrrd", "./x/1.nii.gz"]}),
    ],
)
def test_names_are_those_of_the_files_where_the_list_has_none(tmp_path, name, content):
    assert found(tmp_path / name, content) == [("1", str(tmp_path / "x/1.nii.gz")), ("2", str(tmp_path / "y/2.nrrd"))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "image_0001,case,image_0000\nt2.nii,a,t1.nii\n"),
        ("list.json", [{"image": ["t1.nii", "t2.nii"], "case": "a"}]),
    ],
)
def test_channels_are_in_their_order(tmp_path, name, content):
    assert found(tmp_path / name, content, 2) == [("a", [str(tmp_path / "t1.nii"), str(tmp_path / "t2.nii")])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "lists no cases; expected a CSV file with"),
        ({"training": ["a.nii"]}, "lists no cases"),
        ([7], "has 7 as case 0; expected"),
        (["a.nii", ""], "has '' as case 1"),
        ([{"case": "a"}], "as case 0"),
        ([{"case": 7, "image": "a.nii"}], "as case 0"),
        ([{"image": ["a.nii", None]}], "as case 0"),
        (["x/ct.nii", "y/ct.nrrd"], "lists ct more than once; give each case its own name"),
        ([{"case": "../a", "image": "a.nii"}], "has a case '../a'; expected a name that a file can have"),
        ([{"case": "/a", "image": "a.nii"}], "has a case '/a'"),
        ([{"case": "a\0", "image": "a.nii"}], "has a case"),
        ("[", "is not valid JSON"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        found(tmp_path / "list.json", content)


@pytest.mark.parametrize("content", ["", "case;image\na;b\n", "case,image\na\n", "scan\na.nii\n", "image\n\n"])
def test_what_is_no_table_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"list.csv (lists no cases|has .* as case 0|is not a table in CSV)"):
        found(tmp_path / "list.csv", content)


@pytest.mark.parametrize("name", ["cases.csv", "cases.json"])
def test_a_training_folder_may_have_its_cases_in_a_list(tmp_path, name):
    rows = []
    for case in ("one", "two"):
        for file in ("ct.nii.gz", "label.nii.gz"):
            save(tmp_path / f"elsewhere/{case}/{file}", np.zeros((3, 3, 3), np.uint8))
        rows.append({"case": case, "image": f"../elsewhere/{case}/ct.nii.gz"})
        rows[-1]["label"] = str(tmp_path / f"elsewhere/{case}/label.nii.gz")
    data = tmp_path / "data"
    data.mkdir()
    table = "".join(",".join(row) + "\n" for row in (rows[0], *(row.values() for row in rows)))
    (data / name).write_text(table if name.endswith("csv") else json.dumps(rows))
    (data / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "x"}, "training": name})
    )
    cases = Dataset(data).cases
    assert [case["case"] for case in cases] == ["one", "two"]
    assert cases[0]["image"] == str(data / "../elsewhere/one/ct.nii.gz")
    assert cases[0]["label"] == str(tmp_path / "elsewhere/one/label.nii.gz")
    (data / name).write_text("image\nx.nii\n" if name.endswith("csv") else '["x.nii"]')
    with pytest.raises(UserError, match='as case 0; expected .*, and its "label": correct it'):
        _ = Dataset(data).listed_cases


def test_a_case_of_a_training_folder_has_a_name_that_a_file_can_have(tmp_path):
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}}
    for name in ("../a", "a/b", ""):
        description["dataset"] = {name: {"images": ["a.nii"], "label": "b.nii"}}
        (tmp_path / "dataset.json").write_text(json.dumps(description))
        with pytest.raises(UserError, match=r"expected a name that a file can have"):
            _ = Dataset(tmp_path).listed_cases
