"""The picture of a training log: loss, Dice of every class, seconds and learning rate over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.visualization import COLOURS

SMOOTHING = 0.9  # share of the past an epoch in nnU-Net's moving average of the Dice (nnunet_logger.py)
NAMED = 20  # classes that the legend has room for
LONGEST = 26  # characters of a name in the legend
GREY = (0.8, 0.8, 0.8)

Row = Mapping[str, float]
Colour = str | tuple[float, float, float]


def draw_log(rows: Sequence[Row], path: Path) -> None:
    """Draw loss, Dice of every class, seconds and learning rate over the epochs.

    Dice appears as measured (bold) and as nnU-Net's moving average (thin), which lags behind it. Of more classes than
    the legend has room for, those with the lowest Dice at the end are named, the others are grey.

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
        _dice_lines(dice, rows)
        measured = "Dice of the validation cases, as measured (bold) and smoothed (thin)"
        titles = {loss: "Loss", dice: measured, seconds: "Seconds an epoch", rate: "Learning rate"}
        for panel, title in titles.items():
            panel.set_title(title, loc="left")
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
        for panel, awaited in ((loss, "the first epoch"), (dice, "the first validation, see val_interval")):
            if panel.lines:
                size = 9 if len(panel.get_legend_handles_labels()[1]) < 20 else 7.5
                panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=size)
            else:
                at = {"transform": panel.transAxes, "ha": "center", "color": "0.4"}
                panel.text(0.5, 0.5, f"empty until {awaited}", **at)
        dice.set_ylim(0, 1)
        for panel in (seconds, rate):
            panel.set_ylim(0, 1.1 * max((y for line in panel.lines for y in line.get_ydata()), default=1) or 1)
        rate.yaxis.set_major_formatter("{x:.1e}")
        rate.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
        rate.set(xlabel="epoch", xlim=(0.5, rows[-1]["epoch"] + 0.5))
        figure.suptitle(_headline(rows), x=0.08, ha="left", fontsize=13)
        figure.savefig(path, format="png", dpi=100)


def _dice_lines(panel: Axes, rows: Sequence[Row]) -> None:
    """Draw a line for each class and one for their mean."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("validation/dice_")))
    last = {name: values[-1] for name in names if (values := _points(rows, name)[1])}
    named = sorted(last, key=lambda name: last[name])[:NAMED] if len(names) > NAMED else names
    for name in set(names) - set(named):
        panel.plot(*_points(rows, name), color=GREY, linewidth=0.5)
    for number, name in enumerate(named):
        red, green, blue = COLOURS[number % len(COLOURS)] / 255 * 0.85  # darker than on a scan: the page is white
        style = ("-", "--", ":")[number // len(COLOURS) % 3]
        _smoothed_line(panel, rows, name, _short(name.removeprefix("validation/dice_")), (red, green, blue), style)
    _smoothed_line(panel, rows, "validation/dice", "mean", "black", "-")
    if others := len(names) - len(named):
        panel.plot([], [], color=GREY, label=f"{others} with higher Dice")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 2]}.."


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
    if values:
        panel.plot(epochs, smooth(values, epochs), color=colour, linewidth=0.7, alpha=0.6)
        panel.plot(
            epochs, values, color=colour, linewidth=1.6, linestyle=style, label=label or None, marker=_marker(values)
        )


def smooth(values: Sequence[float], epochs: Sequence[int]) -> list[float]:
    """Compute the moving average that begins with the first value; nnU-Net has a value every epoch."""
    kept = [SMOOTHING ** (after - before) for before, after in pairwise(epochs)]
    steps = iter(kept)

    def step(past: float, new: float) -> float:
        share = next(steps)
        return share * past + (1 - share) * new

    return list(accumulate(values, step))


def _marker(values: Sequence[float]) -> str | None:
    return "." if len(values) < 50 else None  # a line of one point has no length
