"""The comparison of two evaluations, case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import python_m
from scipy.stats import wilcoxon

from scripts.evaluation.comparison import compare_scores
from scripts.evaluation.tables import write_tables
from scripts.utils.errors import UserError
from scripts.utils.files import read_table


def evaluation(folder, dice, label: str = "liver") -> str:
    """Write the tables of an evaluation with these Dice scores of cases 0, 1, .. and half of them as NSD."""
    rows = [
        {"case": f"case {n}", "label": label, "dice": d, "nsd": d / 2, "hd95_mm": math.inf if d == 0 else 1.0,
         "predicted_voxels": 1, "reference_voxels": 1}
        for n, d in enumerate(dice)
    ]  # fmt: skip
    write_tables(folder, rows, [label], 1.0)
    return str(folder)


@pytest.fixture
def dice():
    draws = np.random.default_rng(1)
    one = draws.uniform(0.5, 0.9, 30)
    return one, one + draws.normal(0.02, 0.03, 30)


def test_differences_are_paired_with_their_interval_and_p_value(dice, tmp_path, capsys):
    one, other = (evaluation(tmp_path / name, values) for name, values in zip("ab", dice, strict=True))
    compare_scores(one, other, str(tmp_path / "c"))
    row = read_table(tmp_path / "c/differences.csv")[0]
    difference = dice[1] - dice[0]
    assert (row["label"], row["score"], row["cases"], row["left_out"]) == ("liver", "dice", "30", "0")
    assert float(row["difference"]) == pytest.approx(difference.mean())
    assert float(row["other"]) - float(row["one"]) == pytest.approx(difference.mean())
    assert float(row["wilcoxon_p"]) == pytest.approx(wilcoxon(dice[0], dice[1]).pvalue)
    assert (int(row["higher"]), int(row["lower"])) == ((difference > 0).sum(), (difference < 0).sum())
    error = difference.std(ddof=1) / math.sqrt(30)  # the interval is near that of a normal mean
    assert float(row["interval_low"]) == pytest.approx(difference.mean() - 1.96 * error, abs=0.3 * error)
    assert float(row["interval_high"]) == pytest.approx(difference.mean() + 1.96 * error, abs=0.3 * error)
    assert (tmp_path / "c/differences.png").stat().st_size > 5000
    assert "30 cases, 0 left out" in capsys.readouterr().out


def test_pairs_without_two_finite_scores_are_counted_and_not_averaged(tmp_path):
    one, other = evaluation(tmp_path / "a", [0.5, 0.0, 0.7]), evaluation(tmp_path / "b", [0.6, 0.4, math.nan])
    compare_scores(one, other, str(tmp_path / "c"))
    rows = {row["score"]: row for row in read_table(tmp_path / "c/differences.csv")}
    assert (rows["dice"]["cases"], rows["dice"]["left_out"]) == ("2", "1")
    assert float(rows["dice"]["difference"]) == pytest.approx(0.25)
    assert (rows["hd95_mm"]["cases"], rows["hd95_mm"]["left_out"]) == ("2", "1")


@pytest.mark.parametrize("dice", [[0.5], [0.5, 0.5, 0.5]])
def test_equal_scores_and_one_case_alone_have_no_false_certainty(dice, tmp_path):
    one, other = evaluation(tmp_path / "a", dice), evaluation(tmp_path / "b", dice)
    compare_scores(one, other, str(tmp_path / "c"))
    row = read_table(tmp_path / "c/differences.csv")[0]
    assert float(row["difference"]) == 0
    assert row["wilcoxon_p"] == ("nan" if len(dice) == 1 else "1.0")


def test_other_cases_are_left_out_and_said_and_none_in_common_is_an_error(tmp_path, capsys):
    one, other = evaluation(tmp_path / "a", [0.5, 0.6]), evaluation(tmp_path / "b", [0.5])
    compare_scores(one, other, str(tmp_path / "c"))
    assert "1 scores are in one of the two alone" in capsys.readouterr().out
    with pytest.raises(UserError, match="scored no case and class in common"):
        compare_scores(one, evaluation(tmp_path / "d", [0.5], "spleen"), str(tmp_path / "c"))


def test_what_is_no_evaluation_is_named(tmp_path):
    one = evaluation(tmp_path / "a", [0.5])
    with pytest.raises(UserError, match=r"nowhere/cases.csv not found; give the folder of an evaluation"):
        compare_scores(one, str(tmp_path / "nowhere"))
    (tmp_path / "a/cases.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a table of scores"):
        compare_scores(one, one)


def test_the_command_says_what_it_found(tmp_path):
    one, other = evaluation(tmp_path / "a", [0.5, 0.6, 0.7]), evaluation(tmp_path / "b", [0.6, 0.6, 0.8])
    done = python_m("scripts", "compare_scores", "--one", one, "--other", other, "--output_dir", tmp_path / "c")
    assert "liver                Dice          0.6000 ->    0.6667  +0.0667" in done.stdout
