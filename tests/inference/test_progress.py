"""Progress is counted in windows, as a bar or as lines of a log."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer

from scripts.inference import progress
from scripts.inference.progress import WindowProgress
from scripts.inference.sliding_window import SlidingWindowInferer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def evaluator(sizes: list[int], inferer=None) -> SupervisedEvaluator:
    scans = [{"image": torch.zeros(1, 1, 16, 16, n)} for n in sizes]
    return SupervisedEvaluator(
        device="cpu", val_data_loader=scans, network=torch.nn.Identity(), decollate=False,
        inferer=inferer or SlidingWindowInferer((16, 16, 16), 0.5), val_handlers=[WindowProgress("segmenting")],
    )  # fmt: skip


@pytest.fixture
def every_window(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "BAR_EVERY", 0.0)


@pytest.mark.usefixtures("every_window")
def test_a_log_has_a_line_with_windows_and_the_time_that_is_left(caplog):
    with caplog.at_level(logging.INFO, "mednext"):
        caplog.clear()
        evaluator([40, 24]).run()
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said if "window" in line][:7] == [
        *[f"segmenting scan 1 of 2, window {i} of 4" for i in (1, 2, 3, 4, 4)],
        *[f"segmenting scan 2 of 2, window {i} of 2" for i in (0, 1)],
    ]
    assert "12 %, 00:00 gone, about 00:00 left" in said[0]
    assert not any("\r" in line for line in said)


@pytest.mark.usefixtures("every_window")
def test_a_terminal_has_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    evaluator([40]).run()
    shown = sys.stderr.getvalue().split("\r")
    assert [line.split("%")[0].strip() for line in shown if "window 3" in line] == ["segmenting window 3 of 4  75"]
    assert not shown[-1].strip()


@pytest.mark.usefixtures("every_window")
def test_another_sliding_window_is_counted_by_scans(caplog):
    with caplog.at_level(logging.INFO, "mednext"):
        evaluator([16, 16], SimpleInferer()).run()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["segmenting: 50 %", "segmenting: 100 %"]


def test_few_lines_are_written_and_the_sliding_window_is_left_as_it_was(caplog):
    inferer = SlidingWindowInferer((16, 16, 16), 0.5)
    with caplog.at_level(logging.INFO, "mednext"):
        evaluator([200], inferer).run()
    assert not caplog.records  # a line takes half a minute
    assert inferer.watch is None
