"""Scores have their textbook values, with true spacing, and empty masks are reported as what they are."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor

from scripts.evaluation import metrics
from scripts.evaluation.metrics import CaseScores, ClassDice, score_case
from scripts.evaluation.tables import summarise

CLASSES = {"organ": [1], "tumour": [2]}


def box(low: int, high: int, value: int = 1) -> torch.Tensor:
    """Draw a box over the full y and z extent of 24 x 6 x 6 voxels, from row `low` to before row `high`."""
    mask = torch.zeros(1, 24, 6, 6)
    mask[:, low:high] = value
    return mask


def test_dice_of_a_shifted_box():
    row = score_case(box(4, 14), box(6, 16), (1, 1, 1), CLASSES)[0]
    assert row["dice"] == pytest.approx(8 / 10)
    assert (row["predicted_voxels"], row["reference_voxels"]) == (360, 360)


def test_hd95_is_in_millimetres_of_the_scan():
    row = score_case(box(4, 14), box(6, 16), (1.5, 1, 1), CLASSES)[0]
    assert row["hd95_mm"] == pytest.approx(2 * 1.5)


def test_nsd_counts_surface_within_the_tolerance_of_the_scan():
    one_voxel_off = box(4, 14), box(5, 14)
    assert score_case(*one_voxel_off, (0.9, 1, 1), CLASSES)[0]["nsd"] == pytest.approx(1.0)
    assert score_case(*one_voxel_off, (4.0, 1, 1), CLASSES)[0]["nsd"] < 0.98  # one of two end faces is off
    assert score_case(*one_voxel_off, (4.0, 1, 1), CLASSES, tolerance=4.0)[0]["nsd"] == pytest.approx(1.0)


def test_perfect_prediction():
    row = score_case(box(4, 14), box(4, 14), (1, 2, 3), CLASSES)[0]
    assert (row["dice"], row["nsd"], row["hd95_mm"]) == (1.0, 1.0, 0.0)


def test_label_absent_from_both_is_nan():
    row = score_case(box(4, 14), box(4, 14), (1, 1, 1), CLASSES)[1]
    assert all(math.isnan(row[m]) for m in ("dice", "nsd", "hd95_mm"))


@pytest.mark.parametrize("masks", [(box(0, 0), box(4, 14)), (box(4, 14), box(0, 0))], ids=["missed", "invented"])
def test_label_absent_from_one_is_zero_and_infinitely_far(masks):
    row = score_case(*masks, (1, 1, 1), CLASSES)[0]
    assert (row["dice"], row["nsd"], row["hd95_mm"]) == (0.0, 0.0, math.inf)


def test_tables_are_written_and_json_is_strict(tmp_path):
    handler = CaseScores(str(tmp_path), CLASSES)
    for name, prediction in (("b", box(0, 0)), ("a", box(4, 14))):
        state = SimpleNamespace(
            batch=[{"case": name}],
            output=[{"pred": MetaTensor(prediction), "label": MetaTensor(box(4, 14), affine=torch.eye(4))}],
        )
        handler.add(SimpleNamespace(state=state))
    handler.write(None)
    rows = list(csv.DictReader((tmp_path / "cases.csv").read_text().splitlines()))
    assert [(r["case"], r["label"], r["dice"]) for r in rows] == [
        ("a", "organ", "1.0"), ("a", "tumour", "nan"), ("b", "organ", "0.0"), ("b", "tumour", "nan")
    ]  # fmt: skip
    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert content["cases"][1]["dice"] is None
    assert content["cases"][2]["hd95_mm"] == "inf"
    assert {r["label"]: r["dice"] for r in csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())}[
        "organ"
    ] == "0.5"


def test_a_region_is_scored_as_the_union_of_its_labels():
    prediction, reference = box(4, 8, 1) + box(8, 14, 2), box(4, 10, 2) + box(10, 16, 1)
    whole, part = score_case(prediction, reference, (1, 1, 1), {"whole": [1, 2], "part": [2]})
    assert whole["dice"] == pytest.approx(2 * 10 / 22)
    assert part["dice"] == pytest.approx(2 * 2 / 12)


def test_ignored_voxels_count_nowhere():
    prediction, reference = box(4, 14), box(4, 9) + box(9, 20, 3)
    row = score_case(prediction, reference, (1, 1, 1), {"organ": [1]}, ignore=3)[0]
    assert (row["dice"], row["predicted_voxels"]) == (1.0, 5 * 36)
    assert score_case(prediction, reference, (1, 1, 1), {"organ": [1]})[0]["dice"] == pytest.approx(2 * 5 / 15)


def test_the_metric_of_training_is_the_summary_of_scoring():
    masks = [(box(4, 14), box(6, 16)), (box(4, 8, 2), box(4, 9, 2)), (box(0, 0), box(4, 14)), (box(0, 0), box(0, 0))]
    metric = ClassDice(CLASSES)
    for prediction, reference in masks:
        metric(prediction[None], reference[None])
    rows = [{"case": str(i), **row} for i, m in enumerate(masks) for row in score_case(*m, (1, 1, 1), CLASSES)]
    summary = {row["label"]: row["dice"] for row in summarise(rows, list(CLASSES))}
    assert metric.get_buffer().nanmean(dim=0).tolist() == pytest.approx([summary["organ"], summary["tumour"]])
    assert metric.aggregate().item() == pytest.approx(summary["mean"])


@pytest.mark.parametrize("ignore", [None, 7, 2])
def test_dice_of_many_labels_is_that_of_their_masks(ignore, monkeypatch):
    monkeypatch.setattr(metrics, "AT_ONCE", 100)
    torch.manual_seed(0)
    prediction, reference = torch.randint(0, 12, (2, 2, 1, 9, 8, 7))  # 10 and 11 belong to no class
    classes = {**{str(i): [i] for i in range(1, 10)}, "some": [1, 3, 9], "absent": [300]}
    found = ClassDice(classes, ignore)(prediction, reference)
    counted = torch.ones_like(reference, dtype=torch.bool) if ignore is None else reference != ignore
    for case in range(2):
        for column, members in enumerate(classes.values()):
            a, b = ((sum(mask[case] == m for m in members) > 0) & counted[case] for mask in (prediction, reference))
            both = (a.sum() + b.sum()).item()
            expected = 2 * (a & b).sum().item() / both if both else math.nan
            assert found[case, column].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("low", [0, 4])
def test_scores_do_not_depend_on_how_much_lies_around(low):
    """At the border of a scan, too, where the surface is what it is inside."""
    masks = [F.pad(box(low, 14), (3, 0) * 3), F.pad(box(low, 12), (3, 0) * 3)]
    wider = [F.pad(mask, (5, 5) * 3) for mask in masks]
    assert score_case(*masks, (1, 2, 1), CLASSES) == score_case(*wider, (1, 2, 1), CLASSES)
