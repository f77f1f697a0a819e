"""The summary averages what has a score, counts what has none, and survives JSON."""

from __future__ import annotations

import json
import math

import pytest

from scripts.evaluation.tables import summarise, with_nan, without_nan

PERFECT = {"dice": 1.0, "nsd": 1.0, "hd95_mm": 0.0, "predicted_voxels": 5, "reference_voxels": 5}
MISSED = {"dice": 0.0, "nsd": 0.0, "hd95_mm": math.inf, "predicted_voxels": 0, "reference_voxels": 5}
ABSENT = {"dice": math.nan, "nsd": math.nan, "hd95_mm": math.nan, "predicted_voxels": 0, "reference_voxels": 0}


def test_summary_counts_what_is_empty_and_averages_the_rest():
    scores = {"organ": [PERFECT, MISSED, ABSENT], "tumour": [ABSENT] * 3}
    rows = [{"case": f"c{i}", "label": name, **s} for name, cases in scores.items() for i, s in enumerate(cases)]
    organ, tumour, mean = summarise(rows, list(scores))
    assert (organ["dice"], organ["cases"], organ["empty_in_both"], organ["empty_in_one"]) == (0.5, 3, 1, 1)
    assert organ["dice_std"] == 0.5
    assert organ["hd95_mm"] == 0.0  # of the one case that has a distance
    assert math.isnan(tumour["dice"])
    assert tumour["empty_in_both"] == 3
    assert (mean["label"], mean["cases"], mean["dice"], mean["empty_in_one"]) == ("mean", 3, 0.5, 1)


@pytest.mark.parametrize("score", [ABSENT, MISSED, PERFECT], ids=["nan", "infinite", "finite"])
def test_scores_survive_json(score):
    text = json.dumps(without_nan([score]), allow_nan=False)
    (back,) = json.loads(text)
    assert {name: with_nan(value) for name, value in back.items()} == pytest.approx(score, nan_ok=True)
