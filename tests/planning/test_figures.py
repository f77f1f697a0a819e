"""The picture of a fingerprint: channels by name, labels that can be read, numbers that are numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from planning.test_planner import record
from scripts.planning import figures


@pytest.mark.parametrize("labels", [1, 4, 142])
@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_it_can_be_read_with_any_number_of_labels(labels, tmp_path):
    names = ["background", *(f"region {n} with a name that is longer than the margin is wide" for n in range(labels))]
    cases = [{**record(), "labels": [9, *(10 ** (1 + (case + n) % 4) for n in range(labels))]} for case in range(3)]
    figure = figures._draw(cases, names, ["T1 $^$"], (1.0, 1.0, 1.0))
    figure.canvas.draw()
    volumes = next(panel for panel in figure.axes if panel.get_title().startswith("Volume"))
    boxes = [text.get_window_extent() for text in volumes.get_yticklabels()]
    assert len(boxes) == labels
    edges = sorted((box.y0, box.y1) for box in boxes)
    assert all(low[1] <= high[0] + 1 for low, high in pairwise(edges))  # none over another
    assert all("math" not in text.get_text() for text in volumes.get_xticklabels())
    shown = {text.get_text() for panel in figure.axes if panel.get_legend() for text in panel.get_legend().get_texts()}
    assert "T1 $^$" in shown
    counts = next(panel for panel in figure.axes if panel.get_title().startswith("Shapes"))
    assert all(tick == round(tick) for tick in counts.get_yticks())
    figures.draw_fingerprint(cases, names, ["T1 $^$"], (1.0, 1.0, 1.0), tmp_path / "f.png")
    assert np.frombuffer((tmp_path / "f.png").read_bytes()[:4], np.uint8)[1] == ord("P")
