"""The picture of a log is drawn whatever the classes are called and whatever is missing."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from scripts.training.log_figure import draw_log, smooth


def test_smoothing_is_nnunets_moving_average():
    assert smooth([0.5, 1.0, 1.0], [1, 2, 3]) == pytest.approx([0.5, 0.55, 0.595])
    assert smooth([], []) == []


def test_where_epochs_are_left_out_the_average_does_not_lag_more():
    assert smooth([0.5, 1.0], [10, 20]) == pytest.approx([0.5, 1 - 0.5 * 0.9**10])


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


def drawn(rows, tmp_path, monkeypatch) -> Figure:
    """Draw, and return the figure."""
    found = []
    save = Figure.savefig

    def keep(figure, *args, **options):
        found.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_log(rows, tmp_path / "progress.png")
    return found[0]


def legend(panel) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


@pytest.mark.parametrize(("classes", "entries"), [(1, 2), (4, 5), (20, 21), (142, 22)])
def test_the_legend_fits_whatever_the_number_of_classes(classes, entries, tmp_path, monkeypatch):
    names = [f"region {n} with a name that is longer than the margin is wide" for n in range(classes)]
    dice = {f"validation/dice_{name}": 0.9 - 0.005 * n for n, name in enumerate(names)}
    figure = drawn([{"epoch": e, "validation/dice": 0.5, **dice} for e in (10, 20)], tmp_path, monkeypatch)
    panel = figure.axes[1]
    assert len(legend(panel)) == entries
    box = panel.get_legend().get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.bbox.y0
    assert all(text.get_fontsize() >= 7 for text in panel.get_legend().get_texts())
    if classes == 142:
        assert legend(panel)[0].startswith("region 141 ")  # the lowest Dice first
        assert legend(panel)[-1] == "122 with higher Dice"


def test_the_bold_line_is_what_was_measured(tmp_path, monkeypatch):
    rows = [{"epoch": e, "validation/dice": d, "validation/dice_a": d} for e, d in ((10, 0.2), (20, 0.8))]
    bold = [line for line in drawn(rows, tmp_path, monkeypatch).axes[1].lines if line.get_linewidth() > 1]
    assert [list(line.get_ydata()) for line in bold] == [[0.2, 0.8]] * 2


def test_an_empty_panel_says_what_it_waits_for(tmp_path, monkeypatch):
    figure = drawn([{"epoch": 1, "train/loss": 1.0}], tmp_path, monkeypatch)
    assert [text.get_text() for text in figure.axes[1].texts] == ["empty until the first validation, see val_interval"]
    assert not figure.axes[0].texts
