"""Detection of small structures beside the overlap of all voxels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import save

from scripts.evaluation import report
from scripts.evaluation.comparison import compare_scores
from scripts.evaluation.cross_validation import pool_folds
from scripts.evaluation.lesions import COUNTS, lesion_scores
from scripts.evaluation.mask_scores import score_masks
from scripts.utils.files import read_table


def mask(*boxes: tuple[slice, ...], shape=(12, 12, 12)) -> np.ndarray:
    found = np.zeros(shape, bool)
    for box in boxes:
        found[box] = True
    return found


def box(*start: int, edge: int = 2) -> tuple[slice, ...]:
    return tuple(slice(s, s + edge) for s in start)


A, B, C, D = box(0, 0, 0), box(4, 4, 4), box(8, 8, 8), box(0, 8, 0)


@pytest.mark.parametrize(
    ("predicted", "reference", "f1", "counts"),
    [
        (mask(A, B), mask(A, B), 1, (2, 2, 2, 0)),
        (mask(A), mask(A, B, C), 0.5, (3, 1, 1, 0)),  # 2 / (2 + 2 missed)
        (mask(A, D), mask(A, B), 0.5, (2, 1, 2, 1)),
        (mask(box(1, 1, 1)), mask(A), 1, (1, 1, 1, 0)),  # a voxel is enough
        (mask(box(0, 0, 0, edge=12)), mask(A, B, C), 1, (3, 3, 1, 0)),  # one blob finds all
        (mask(A, B, C), mask(box(0, 0, 0, edge=12)), 1, (1, 1, 3, 0)),  # in pieces
        (mask(A), mask(B), 0, (1, 0, 1, 1)),
        (mask(), mask(B), 0, (1, 0, 0, 0)),
        (mask(A), mask(), 0, (0, 0, 1, 1)),
        (mask(), mask(), math.nan, (0, 0, 0, 0)),
        (mask(box(0, 0, 0), box(2, 2, 2)), mask(), 0, (0, 0, 1, 1)),  # a corner connects
        (mask(A[:2], shape=(12, 12)), mask(A[:2], shape=(12, 12)), 1, (1, 1, 1, 0)),  # a slice
    ],
)
def test_a_lesion_is_found_where_a_voxel_of_it_is(predicted, reference, f1, counts):
    found = lesion_scores(predicted, reference)
    assert found["lesion_f1"] == pytest.approx(f1, nan_ok=True)
    assert tuple(found[name] for name in COUNTS) == counts


@pytest.fixture
def folders(tmp_path):
    for case, (predicted, reference) in {
        "a": (mask(A, D), mask(A, B)),
        "b": (mask(A), mask(A, B, C)),
        "c": (mask(), mask()),
    }.items():
        save(tmp_path / f"labelsTs/{case}.nii.gz", reference.astype(np.uint8), np.eye(4))
        save(tmp_path / f"masks/{case}.nii.gz", predicted.astype(np.uint8), np.eye(4))
    return tmp_path


def score(folder, output="scores", **options) -> list[dict]:
    score_masks(str(folder / "masks"), str(folder / "labelsTs"), str(folder / output), **options)
    return read_table(folder / output / "summary.csv")


def test_tables_have_f1_and_the_sums_of_the_counts_where_they_are_asked_for(folders):
    assert not any("lesion" in name for name in score(folders, "plain")[0])
    for row in score(folders, lesion_scores=True):
        assert float(row["lesion_f1"]) == 0.5  # of two cases, the third has none
        assert [row[name] for name in COUNTS] == ["5", "2", "3", "1"]
    cases = read_table(folders / "scores/cases.csv")
    assert [row["found_lesions"] for row in cases] == ["1", "1", "0"]
    assert json.loads((folders / "scores/summary.json").read_text())["cases"][2]["lesion_f1"] is None


def test_pooled_and_compared_tables_have_them_too(folders):
    (folders / "all").mkdir()
    score(folders, "all/fold_0", lesion_scores=True)
    (folders / "all/fold_0/predictions").mkdir()
    for case in "abc":
        (folders / f"all/fold_0/predictions/{case}_seg.nii.gz").write_bytes(b"")
    pool_folds(str(folders / "all"), ["label 1"], 1.0)
    assert read_table(folders / "all/summary.csv")[0]["false_lesions"] == "1"
    compare_scores(str(folders / "all"), str(folders / "all/fold_0"), str(folders / "comparison"))
    rows = {row["score"]: row for row in read_table(folders / "comparison/differences.csv")}
    assert rows["lesion_f1"]["cases"] == "2"
    score(folders, "plain")
    compare_scores(str(folders / "all"), str(folders / "plain"), str(folders / "comparison"))
    assert {row["score"] for row in read_table(folders / "comparison/differences.csv")} == {"dice", "nsd", "hd95_mm"}


@pytest.mark.parametrize("lesion_scores", [False, True])
def test_the_report_shows_them(folders, lesion_scores):
    score(folders, lesion_scores=lesion_scores)
    (folders / "scores/model.pt").write_bytes(b"weights")
    report.write_report(
        str(folders / "scores"), [], {"label 1": [1]}, [0, 1], 1.0, False, "data", str(folders / "scores/model.pt"),
        "cpu", {},
    )  # fmt: skip
    page = (folders / "scores/report.html").read_text()
    assert ("Lesions found" in page, "<td>2 of 5</td>" in page, "Lesion F1: 1 is best" in page) == (lesion_scores,) * 3
    assert f"nth-child({3 + lesion_scores}n+3)" in page
    assert page.count('<th scope="col" aria-sort="none">Lesion F1') == lesion_scores
