"""The log of a training: the numbers of every epoch, for the terminal, TensorBoard, a table and a picture."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from ..data.images import first_channel
from ..data.visualization import draw_overlay
from ..utils.errors import UserError
from ..utils.files import read_table, write_table, write_whole
from .log_figure import draw_log

logger = logging.getLogger("mednext")


class TrainingLog:
    """One row of numbers an epoch, kept in `folder`: `progress.csv`, `progress.png` and TensorBoard's files.

    An epoch that is run again replaces its row and all behind it, so that a resumed run goes on in the same table. Only
    the first process keeps anything.

    Args:
        folder: where to keep things; what lies there is read when the first numbers come, not before.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.files = (self.folder / "progress.csv", self.folder / "progress.png")
        self.rows: list[dict[str, float]] = []
        self.writer: SummaryWriter | None = None

    @idist.one_rank_only()
    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add `values`, which have TensorBoard's names ("train/loss"), to the row of `epoch`, counted from 1."""
        if self.writer is None:
            self.rows = [row for row in self._earlier() if row["epoch"] < epoch]
            self.writer = SummaryWriter(self.folder, purge_step=epoch)
        if not self.rows or self.rows[-1]["epoch"] < epoch:
            self.rows.append({"epoch": epoch})
        self.rows[-1] |= values
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def _earlier(self) -> list[dict[str, float]]:
        """Read the table of an earlier run; one that cannot be read is kept under another name."""
        file = self.files[0]
        try:
            return read_log(file)
        except UserError as e:
            kept = file.with_name(f"progress_damaged_{time.strftime('%Y%m%d-%H%M%S')}.csv")
            file.rename(kept)
            logger.warning("%s; it is kept as %s, and a new table begins.", str(e).rstrip("."), kept.name)
            return []

    @idist.one_rank_only()
    def add_picture(self, epoch: int, name: str, picture: np.ndarray) -> None:
        """Show `picture` (height, width, 3) in TensorBoard, after numbers of that epoch."""
        assert self.writer is not None, "numbers come first"
        self.writer.add_image(name, picture, epoch, dataformats="HWC")

    @idist.one_rank_only()
    def write_files(self) -> None:
        """Bring the files up to date."""
        assert self.writer is not None, "numbers come first"
        self.writer.flush()
        columns = dict.fromkeys(name for row in self.rows for name in row)
        write_table(self.files[0], list(columns), self.rows)
        write_whole(self.files[1], lambda partial: draw_log(self.rows, partial))


class WriteTrainingLog:
    """Writes the files of a log after every epoch; it stands behind the validation, whose numbers belong to it."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self.log.write_files())


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the rows of a `progress.csv`, without the cells that are empty; none where there is no file.

    Raises:
        UserError: it is no such table.
    """
    if not os.path.lexists(path):
        return []
    try:
        rows = [{name: float(value) for name, value in row.items() if value} for row in read_table(path)]
        return [{**row, "epoch": int(row["epoch"])} for row in rows]
    except (KeyError, ValueError, OverflowError) as e:
        reason = e if isinstance(e, UserError) else f"{path} is no table of a training ({e!r})"
        raise UserError(str(reason)) from e


class EpochReport:
    """One plain line an epoch, and the same numbers for the log.

    Args:
        log: where the numbers go.
        optimizer: whose learning rate is reported.
        batch_size: samples an iteration and process.
    """

    def __init__(self, log: TrainingLog, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self.log, self.optimizer, self.batch_size = log, optimizer, batch_size

    def attach(self, engine: Engine) -> None:
        for event in (Events.STARTED, Events.EPOCH_STARTED):
            engine.add_event_handler(event, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._receive)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self.started, self.waited, self.iterations = time.perf_counter(), 0.0, 0
        state: Any = engine.state
        state.loss, state.losses = torch.zeros(()), torch.zeros(())  # sum and number, of those that are finite

    def _ask(self, engine: Engine) -> None:
        self.asked = time.perf_counter()

    def _receive(self, engine: Engine) -> None:
        self.waited += time.perf_counter() - self.asked

    def _add(self, engine: Engine) -> None:
        state: Any = engine.state
        loss = state.output["loss"].detach()
        state.loss = state.loss.to(loss.device) + loss.nan_to_num(0.0, 0.0, 0.0)
        state.losses = state.losses.to(loss.device) + loss.isfinite()
        self.iterations += 1

    @idist.one_rank_only()
    def _report(self, engine: Engine) -> None:
        state: Any = engine.state
        seconds = time.perf_counter() - self.started
        values = {
            "loss": float(state.loss) / float(state.losses) if state.losses else float("nan"),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "samples_per_second": self.iterations * self.batch_size * idist.get_world_size() / seconds,
            "waiting_for_data": self.waited / seconds,
        }
        logger.info(
            "epoch %d/%d  loss %.4f  lr %.2e  %.1f s  %.2f samples/s  waiting for data %.1f %%",
            state.epoch, state.max_epochs, values["loss"], values["learning_rate"],
            seconds, values["samples_per_second"], 100 * values["waiting_for_data"],
        )  # fmt: skip
        self.log.add(state.epoch, {f"train/{name}": value for name, value in values.items()})


class ValidationReport:
    """One plain line a validation; all its metrics, Dice per class and a picture of the first case for the log.

    Args:
        log: where the numbers go.
        names: names of the classes that are scored.
        ignore: label of voxels that nobody annotated, or None; the picture does not show them.
    """

    def __init__(self, log: TrainingLog, names: Sequence[str], ignore: int | None = None) -> None:
        self.log, self.names, self.ignore = log, list(names), ignore
        self.first: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep_first)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _start(self, engine: Engine) -> None:
        self.started, self.first = time.perf_counter(), None

    def _keep_first(self, engine: Engine) -> None:
        if self.first is None:
            output = cast(list[dict], engine.state.output)[0]
            self.first = {k: np.asarray(output[k][0].cpu()) for k in ("label", "pred")}
            self.first["file"] = output["image"].meta["filename_or_obj"]

    @idist.one_rank_only()
    def _report(self, engine: Engine) -> None:
        state: Any = engine.state  # MONAI's, with more attributes than Ignite's
        epoch, name = state.epoch, state.key_metric_name
        per_class = torch.as_tensor(state.metric_details[name]).float().nanmean(dim=0).tolist()
        dice = dict(zip(self.names, per_class, strict=True))
        logger.info(
            "validation after epoch %d  Dice %.4f (%s)  %.1f s",
            epoch,
            state.metrics[name],
            ", ".join(f"{label} {value:.4f}" for label, value in dice.items()),
            time.perf_counter() - self.started,
        )
        values = {**state.metrics, **{f"{name}_{label}": value for label, value in dice.items()}}
        self.log.add(epoch, {f"validation/{key}": float(value) for key, value in values.items()})
        if self.first is not None:
            self.log.add_picture(epoch, "validation/scan_label_prediction", self._picture(**self.first))

    def _picture(self, file: str, label: np.ndarray, pred: np.ndarray) -> np.ndarray:
        """Draw label and prediction over the scan as it is stored, of several channels the first."""
        scan = first_channel(file)
        return draw_overlay(scan.values, np.where(label == self.ignore, 0, label), pred, scan.geometry.spacing)
