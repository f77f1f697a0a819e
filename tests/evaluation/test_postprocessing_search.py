"""Components are removed where held-out cases say that it helps, and nowhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from monai.bundle import ConfigParser

from scripts.data.labels import Labels
from scripts.evaluation.postprocessing_search import ALL, decide_steps, gains, search_postprocessing
from scripts.inference.postprocessing import read_steps
from scripts.utils.errors import UserError

TWO = {"organ": [1], "tumour": [2]}
NESTED = {"whole": [1, 2], "core": [2]}
LABELS = ["background", "organ", "tumour"]


def planes(text: str) -> np.ndarray:
    """One label a plane of 2 x 2 voxels: "1102" is two planes of 1, one of background, one of 2."""
    return np.repeat([int(c) for c in text], 4).astype(np.uint8).reshape(-1, 2, 2)


def pairs(*texts: tuple[str, str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, reference) of each case."""
    return [(planes(prediction), planes(reference)) for prediction, reference in texts]


def steps(*texts: tuple[str, str], classes=None, ignore=None) -> dict:
    return decide_steps(lambda: pairs(*texts), classes or TWO, ignore)["steps"]


def test_all_foreground_is_one_object_where_a_class_improves_and_none_becomes_worse():
    assert steps(("11122001", "11122000")) == {ALL: [1, 2]}


def test_all_foreground_is_not_one_object_where_a_class_becomes_worse():
    # the lone 1 is wrong, the lone 22 is right: all foreground loses both, label 1 alone loses what is wrong
    assert steps(("1112010022", "1112000022")) == {"organ": [1]}


def test_a_gain_in_the_mean_counts_although_a_case_loses():
    gains, loses = ("1110001100", "1110000000"), ("1111110001", "1111110001")
    assert steps(gains, gains, loses, classes={"organ": [1]}) == {ALL: [1]}
    assert steps(gains, *[loses] * 9, classes={"organ": [1]}) == {}


def test_nothing_is_done_where_nothing_changes():
    assert steps(("11122000", "11220000")) == {}


def test_classes_are_tried_each_on_the_result_of_all_foreground():
    # all foreground drops the last 2; then label 1 has a second part that touches 2
    found = decide_steps(lambda: pairs(("111122100002", "111122000000")), TWO)
    assert found["steps"] == {ALL: [1, 2], "organ": [1]}
    assert found["tried"]["organ"] == {"organ": {"before": pytest.approx(8 / 9), "after": 1.0}}
    assert found["tried"]["tumour"] == {"tumour": {"before": 1.0, "after": 1.0}}
    assert found["gain"]["organ"] == {
        "without": pytest.approx(8 / 9), "with": 1.0, "gain": pytest.approx(1 / 9),
    }  # fmt: skip
    assert found["gain"]["tumour"]["gain"] == pytest.approx(1 - 4 / 5)


def test_a_class_is_tried_without_what_all_foreground_removed():
    # of the prediction itself, the largest part of 2 is the far one
    found = decide_steps(lambda: pairs(("1112022", "1112000")), TWO)
    assert found["steps"] == {ALL: [1, 2]}
    assert found["tried"]["tumour"] == {"tumour": {"before": 1.0, "after": 1.0}}


def test_a_step_that_is_not_taken_gains_nothing():
    gain = decide_steps(lambda: pairs(("111001", "111001")), {"organ": [1]})["gain"]
    assert gain == {"organ": {"without": 1.0, "with": 1.0, "gain": 0.0}}


@pytest.mark.parametrize(
    ("classes", "rounds"), [({"organ": [1]}, 1), (TWO, 2), (NESTED, 3)], ids=["single", "exclusive", "regions"]
)
def test_cases_are_read_once_a_round(classes, rounds):
    times = []

    def cases():
        times.append(1)
        yield from pairs(("111001", "111000"))

    decide_steps(cases, classes)
    assert len(times) == rounds


def test_a_class_absent_from_both_masks_does_not_count():
    found = decide_steps(lambda: pairs(("11101", "11100"), ("111000", "111000")), TWO)
    assert found["steps"] == {ALL: [1, 2]}
    assert math.isnan(found["gain"]["tumour"]["gain"])
    assert found["gain"]["organ"]["without"] == pytest.approx((6 / 7 + 1) / 2)


def test_components_of_equal_size_are_all_kept():
    assert steps(("110011", "110000")) == {}


def test_a_region_that_a_smaller_one_would_tear_a_hole_into_keeps_it():
    # the part 2 at the end is wrong as 2 but right as part of the whole
    assert steps(("122212", "122211"), classes=NESTED) == {}
    assert steps(("122212", "122210"), classes=NESTED) == {"core": [2]}


def test_regions_are_decided_one_after_the_other():
    # once 3 has lost its far part, 2 and 3 together are in order and nothing else is to gain
    three = {"whole": [1, 2, 3], "core": [2, 3], "active": [3]}
    assert list(steps(("3313", "3310"), classes=three)) == ["core"]


def test_ignored_voxels_count_nowhere():
    # what stands alone lies where nobody annotated: removing it gains nothing
    assert steps(("111001", "111003"), ignore=3) == {}
    assert steps(("111001", "111000"), ignore=3) == {ALL: [1, 2]}
    # what stays over ignored voxels does not count against the step either
    assert decide_steps(lambda: pairs(("1111001", "1113000")), TWO, ignore=3)["gain"]["organ"]["with"] == 1.0


def decided(tmp_path, reference: str = "4440045", ignore: int | None = 5) -> str:
    """Search with one case whose files hold 0, 2 and 4, by a config as the bundle would."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    save(tmp_path / "predictions" / "a_seg.nii.gz", planes("4440044"), affine)
    label = save(tmp_path / "labels" / "a.nii.gz", planes(reference), affine)
    config = {
        "_target_": "scripts.evaluation.postprocessing_search.search_postprocessing",
        "predictions": str(tmp_path / "predictions"),
        "items": [{"case": "a", "label": str(label)}],
        "classes": TWO,
        "labels": Labels(LABELS, [0, 2, 4], ignore_value=ignore),
        "output": str(tmp_path / "models" / "postprocessing.json"),
    }
    parser = ConfigParser({"decide": config})
    parser.get_parsed_content("decide")
    return config["output"]


def test_a_decision_from_files_is_written_beside_the_weights_and_read_back(tmp_path, capsys):
    path = decided(tmp_path, "4440000")
    assert read_steps(path, LABELS) == [[1, 2]]
    content = json.loads(Path(path).read_text())
    assert (content["labels"], content["cases"]) == (LABELS, 1)
    assert content["gain"]["tumour"]["gain"] == pytest.approx(1 - 6 / 8)
    assert content["gain"]["organ"]["gain"] is None
    assert gains(path) == {"largest component of": [ALL], **content["gain"]}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[1:3]] == [
        ["organ", "nan", "nan", "+nan"], ["tumour", "0.7500", "1.0000", "+0.2500"],
    ]  # fmt: skip
    assert "all foreground" in printed[-1]


def test_voxels_to_ignore_in_files_are_ignored(tmp_path):
    assert read_steps(decided(tmp_path, "4440055"), LABELS) == []


@pytest.mark.parametrize(
    ("reference", "ignore", "message"),
    [("4440045", None, "a.nii.gz has the label value 5; dataset.json names 0, 2, 4"), ("44400", 5, "a_seg.nii.gz has")],
    ids=["unknown value", "other grid"],
)
def test_masks_that_do_not_fit_their_labels_are_refused(reference, ignore, message, tmp_path):
    with pytest.raises(Exception, match="search_postprocessing") as error:
        decided(tmp_path, reference, ignore)
    cause = error.value
    while not isinstance(cause, UserError):
        cause = cause.__cause__
    assert message in str(cause)


def test_a_missing_prediction_is_named(tmp_path):
    cases = [{"case": "a", "label": str(save(tmp_path / "a.nii.gz", planes("1100")))}]
    with pytest.raises(UserError, match=r"a_seg.nii.gz not found"):
        search_postprocessing(str(tmp_path), cases, TWO, Labels(LABELS, [0, 1, 2]), str(tmp_path / "p.json"))
    assert not (tmp_path / "p.json").exists()
