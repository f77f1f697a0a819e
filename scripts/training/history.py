"""The course of a training: numbers of every epoch, for the terminal, TensorBoard, a table and a picture."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from ..data.visualization import COLOURS, overlay
from ..utils.files import write_whole

SMOOTHING = 0.9  # share of the past in nnU-Net's moving average of the Dice (nnunet_logger.py)

logger = logging.getLogger("mednext")


class History:
    """One row of numbers an epoch, kept in `folder`: `progress.csv`, `progress.png` and TensorBoard's files.

    An epoch that is run again replaces its row and all behind it, so that a resumed run goes on in the same table. Only
    the first process keeps anything.

    Args:
        folder: where to keep things; what lies there is read when the first numbers come, not before.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.rows: list[dict[str, float]] = []
        self.writer: SummaryWriter | None = None

    @idist.one_rank_only()
    def add(self, epoch: int, values: dict[str, float]) -> None:
        """Adds `values`, which have TensorBoard's names ("train/loss"), to the row of `epoch`, counted from 1."""
        if self.writer is None:
            self.rows = [row for row in read(self.folder / "progress.csv") if row["epoch"] < epoch]
            self.writer = SummaryWriter(self.folder, purge_step=epoch)
        if not self.rows or self.rows[-1]["epoch"] < epoch:
            self.rows.append({"epoch": epoch})
        self.rows[-1] |= values
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    @idist.one_rank_only()
    def add_picture(self, epoch: int, name: str, picture: np.ndarray) -> None:
        """Shows `picture` (height, width, 3) in TensorBoard."""
        self.writer.add_image(name, picture, epoch, dataformats="HWC")

    @idist.one_rank_only()
    def write(self) -> None:
        """Brings the files up to date."""
        self.writer.flush()
        write_whole(self.folder / "progress.csv", lambda partial: _save(self.rows, partial))
        write_whole(self.folder / "progress.png", lambda partial: draw(self.rows, partial))


class WriteHistory:
    """Writes the files of a history after every epoch; it stands behind the validation, whose numbers belong to it."""

    def __init__(self, history: History) -> None:
        self.history = history

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self.history.write())


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a `progress.csv`, without the cells that are empty; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"])} for row in rows]


def _save(rows: Sequence[dict[str, float]], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


class EpochReport:
    """One plain line an epoch, and the same numbers for the history.

    Args:
        history: where the numbers go.
        optimizer: whose learning rate is reported.
        batch_size: samples an iteration and process.
    """

    def __init__(self, history: History, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self.history, self.optimizer, self.batch_size = history, optimizer, batch_size

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._receive)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self.started, self.waited, self.loss, self.iterations = time.perf_counter(), 0.0, 0.0, 0

    def _ask(self, engine: Engine) -> None:
        self.asked = time.perf_counter()

    def _receive(self, engine: Engine) -> None:
        self.waited += time.perf_counter() - self.asked

    def _add(self, engine: Engine) -> None:
        self.loss = self.loss + engine.state.output["loss"].detach()
        self.iterations += 1

    @idist.one_rank_only()
    def _report(self, engine: Engine) -> None:
        seconds = time.perf_counter() - self.started
        values = {
            "loss": float(self.loss) / self.iterations,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "samples_per_second": self.iterations * self.batch_size * idist.get_world_size() / seconds,
            "waiting_for_data": self.waited / seconds,
        }
        logger.info(
            "epoch %d/%d  loss %.4f  lr %.2e  %.1f s  %.2f samples/s  waiting for data %.1f %%",
            engine.state.epoch, engine.state.max_epochs, values["loss"], values["learning_rate"],
            seconds, values["samples_per_second"], 100 * values["waiting_for_data"],
        )  # fmt: skip
        self.history.add(engine.state.epoch, {f"train/{name}": value for name, value in values.items()})


class ValidationReport:
    """One plain line a validation; all its metrics, Dice per class and a picture of the first case for the history.

    Args:
        history: where the numbers go.
        names: of the classes that are scored.
        ignore: label of voxels that nobody annotated, or None; the picture does not show them.
    """

    def __init__(self, history: History, names: Sequence[str], ignore: int | None = None) -> None:
        self.history, self.names, self.ignore = history, list(names), ignore
        self.first: dict | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep_first)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self.started, self.first = time.perf_counter(), None

    def _keep_first(self, engine: Engine) -> None:
        if self.first is None:
            output = engine.state.output[0]
            self.first = {k: np.asarray(output[k][0].cpu()) for k in ("label", "pred")}
            self.first["file"] = output["image"].meta["filename_or_obj"]

    @idist.one_rank_only()
    def _report(self, engine: Engine) -> None:
        epoch, name = engine.state.epoch, engine.state.key_metric_name
        per_class = torch.as_tensor(engine.state.metric_details[name]).float().nanmean(dim=0).tolist()
        dice = dict(zip(self.names, per_class, strict=True))
        logger.info(
            "validation after epoch %d  Dice %.4f (%s)  %.1f s",
            epoch,
            engine.state.metrics[name],
            ", ".join(f"{label} {value:.4f}" for label, value in dice.items()),
            time.perf_counter() - self.started,
        )
        values = {**engine.state.metrics, **{f"{name}_{label}": value for label, value in dice.items()}}
        self.history.add(epoch, {f"validation/{key}": float(value) for key, value in values.items()})
        if self.first is not None:
            scan = nib.load(self.first["file"])  # as stored; of several channels the first
            stored = np.asanyarray(scan.dataobj, dtype=np.float32)
            stored = stored[..., 0] if stored.ndim == 4 else stored
            label = np.where(self.first["label"] == self.ignore, 0, self.first["label"])
            picture = overlay(stored, label, self.first["pred"], scan.header.get_zooms())
            self.history.add_picture(epoch, "validation/scan_label_prediction", picture)


# ---- the picture


def draw(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draws loss, Dice of every class, seconds and learning rate over the epochs.

    Dice appears as measured (thin) and as nnU-Net's moving average (bold).

    Args:
        rows: of a history.
        path: PNG to write.
    """
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("validation/dice_"))
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a class may be named $1$
        figure = Figure(figsize=(11, 10))
        grid = {"left": 0.08, "right": 0.78, "top": 0.92, "bottom": 0.05, "height_ratios": (3, 4, 1.5, 1.5)}
        loss, dice, seconds, rate = figure.subplots(4, sharex=True, gridspec_kw={**grid, "hspace": 0.3})
        _line(loss, rows, "train/loss", "training", "C0")
        _line(seconds, rows, "train/seconds", "", "C0")
        _line(rate, rows, "train/learning_rate", "", "C0")
        for number, name in enumerate(names):
            colour = COLOURS[number % len(COLOURS)] / 255 * 0.85  # darker than on a scan: the page is white
            style = ("-", "--", ":")[number // len(COLOURS) % 3]
            _smoothed_line(dice, rows, name, name.removeprefix("validation/dice_"), colour, style)
        _smoothed_line(dice, rows, "validation/dice", "mean", "black", "-")
        measured = "Dice of the validation cases, as measured (thin) and smoothed (bold)"
        titles = {loss: "Loss", dice: measured, seconds: "Seconds an epoch", rate: "Learning rate"}
        for panel, title in titles.items():
            panel.set_title(title, loc="left")
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
        for panel, entries in ((loss, 2), (dice, len(names) + 1)):
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


def _headline(rows: Sequence[dict[str, float]]) -> str:
    epochs, dice = _points(rows, "validation/dice")
    if not dice:
        return f"Epoch {rows[-1]['epoch']}"
    best = int(np.argmax(dice))
    return f"Epoch {rows[-1]['epoch']}: Dice {dice[-1]:.3f}, best {dice[best]:.3f} after epoch {epochs[best]}"


def _points(rows: Sequence[dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    """Epochs and values where there is a finite one."""
    points = [(row["epoch"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _line(panel: Axes, rows: Sequence[dict], name: str, label: str, colour: str) -> None:
    epochs, values = _points(rows, name)
    if values:
        panel.plot(epochs, values, color=colour, label=label, marker=_marker(values))


def _smoothed_line(panel: Axes, rows: Sequence[dict], name: str, label: str, colour: object, style: str) -> None:
    epochs, values = _points(rows, name)
    panel.plot(epochs, values, color=colour, linewidth=0.7, marker=_marker(values), alpha=0.45)
    panel.plot(epochs, smooth(values), color=colour, linewidth=1.8, linestyle=style, label=label)


def smooth(values: Sequence[float]) -> list[float]:
    """The moving average that begins with the first value."""
    return list(accumulate(values, lambda past, new: SMOOTHING * past + (1 - SMOOTHING) * new))


def _marker(values: Sequence[float]) -> str | None:
    return "." if len(values) < 50 else None  # a line of one point has no length
