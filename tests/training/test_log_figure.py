"""The picture of a log is drawn whatever the classes are called and whatever is missing."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from scripts.training.log_figure import draw_log, smooth


def test_smoothing_is_nnunets_moving_average():
    assert smooth([0.5, 1.0, 1.0]) == pytest.approx([0.5, 0.55, 0.595])
    assert smooth([]) == []


@pytest.mark.parametrize("name", ["T$^$1", "a/b", "神经"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_class_name_is_drawn(name, tmp_path):
    draw_log([{"epoch": 1, "validation/dice": 0.5, f"validation/dice_{name}": 0.5}], tmp_path / "progress.png")
    assert imread(tmp_path / "progress.png").shape[2] == 4


def test_a_score_that_is_nan_is_drawn_as_none(tmp_path):
    dice = [{"epoch": epoch, "validation/dice": value} for epoch, value in ((1, 0.5), (2, np.nan), (3, 0.7))]
    draw_log(dice, tmp_path / "nan.png")
    draw_log([dice[0], {"epoch": 2}, dice[2]], tmp_path / "none.png")
    assert (tmp_path / "nan.png").read_bytes() == (tmp_path / "none.png").read_bytes()
