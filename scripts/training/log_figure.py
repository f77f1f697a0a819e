"""The picture of a training log: loss, Dice of every class, seconds and learning rate over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.visualization import COLOURS

SMOOTHING = 0.9  # share of the past in nnU-Net's moving average of the Dice (nnunet_logger.py)

Row = Mapping[str, float]
Colour = str | tuple[float, float, float]


def draw_log(rows: Sequence[Row], path: Path) -> None:
    """Draw loss, Dice of every class, seconds and learning rate over the epochs.

    Dice appears as measured (thin) and as nnU-Net's moving average (bold).

    Args:
        rows: what a TrainingLog has, one an epoch.
        path: PNG to write.
    """
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a class may be named $1$
        figure = Figure(figsize=(11, 10))
        grid = {"left": 0.08, "right": 0.78, "top": 0.92, "bottom": 0.05, "height_ratios": (3, 4, 1.5, 1.5)}
        loss, dice, seconds, rate = figure.subplots(4, sharex=True, gridspec_kw={**grid, "hspace": 0.3})
        _line(loss, rows, "train/loss", "training", "C0")
        _line(seconds, rows, "train/seconds", "", "C0")
        _line(rate, rows, "train/learning_rate", "", "C0")
        lines = _dice_lines(dice, rows)
        measured = "Dice of the validation cases, as measured (thin) and smoothed (bold)"
        titles = {loss: "Loss", dice: measured, seconds: "Seconds an epoch", rate: "Learning rate"}
        for panel, title in titles.items():
            panel.set_title(title, loc="left")
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
        for panel, entries in ((loss, 2), (dice, lines)):
            if not panel.lines:
                continue
            size = min(9, 300 / entries)  # a hundred classes reach down to the last panel
            panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=size)
        dice.set_ylim(0, 1)
        for panel in (seconds, rate):
            panel.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter("{x:.1e}")
        rate.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
        rate.set(xlabel="epoch", xlim=(0.5, rows[-1]["epoch"] + 0.5))
        figure.suptitle(_headline(rows), x=0.08, ha="left", fontsize=13)
        figure.savefig(path, format="png", dpi=100)


def _dice_lines(panel: Axes, rows: Sequence[Row]) -> int:
    """Draw a line for each class and one for their mean, and count them."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("validation/dice_"))
    for number, name in enumerate(names):
        red, green, blue = COLOURS[number % len(COLOURS)] / 255 * 0.85  # darker than on a scan: the page is white
        style = ("-", "--", ":")[number // len(COLOURS) % 3]
        _smoothed_line(panel, rows, name, name.removeprefix("validation/dice_"), (red, green, blue), style)
    _smoothed_line(panel, rows, "validation/dice", "mean", "black", "-")
    return len(names) + 1


def _headline(rows: Sequence[Row]) -> str:
    epochs, dice = _points(rows, "validation/dice")
    if not dice:
        return f"Epoch {rows[-1]['epoch']}"
    best = int(np.argmax(dice))
    return f"Epoch {rows[-1]['epoch']}: Dice {dice[-1]:.3f}, best {dice[best]:.3f} after epoch {epochs[best]}"


def _points(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """List the epochs that have a finite value, and these values."""
    points = [(int(row["epoch"]), row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _line(panel: Axes, rows: Sequence[Row], name: str, label: str, colour: str) -> None:
    epochs, values = _points(rows, name)
    if values:
        panel.plot(epochs, values, color=colour, label=label, marker=_marker(values))


def _smoothed_line(panel: Axes, rows: Sequence[Row], name: str, label: str, colour: Colour, style: str) -> None:
    epochs, values = _points(rows, name)
    panel.plot(epochs, values, color=colour, linewidth=0.7, marker=_marker(values), alpha=0.45)
    panel.plot(epochs, smooth(values), color=colour, linewidth=1.8, linestyle=style, label=label)


def smooth(values: Sequence[float]) -> list[float]:
    """Compute the moving average that begins with the first value."""
    return list(accumulate(values, lambda past, new: SMOOTHING * past + (1 - SMOOTHING) * new))


def _marker(values: Sequence[float]) -> str | None:
    return "." if len(values) < 50 else None  # a line of one point has no length
