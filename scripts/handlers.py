"""What the Ignite engines need besides MONAI's own handlers: seeds, clipping, progress, reports."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data.utils import set_rnd
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from torch.utils.tensorboard import SummaryWriter

from .overlay import overlay

logger = logging.getLogger("mednext")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@functools.cache
def _writer(folder: str) -> SummaryWriter:
    return SummaryWriter(folder)


class EpochSeeds:
    """Seeds everything random of an epoch from (seed, epoch, rank), so that a resumed run repeats what would have been.

    Args:
        seed: of the run.
        dataset: whose transforms draw in this process when there are no loader workers.
    """

    def __init__(self, seed: int, dataset: object) -> None:
        self.seed, self.dataset = seed, dataset

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        entropy = np.random.SeedSequence([self.seed, engine.state.epoch, _rank()])
        seed = int(entropy.generate_state(1)[0])
        torch.manual_seed(seed)  # the sampler and the loader's workers draw their seeds from it
        set_rnd(self.dataset, seed)


class GradientClipping:
    """Scales the gradients to a global norm of at most `max_norm` before the optimizer's step."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)


class Progress(ProgressBar):
    """Ignite's progress bar, in the first process only and gone when the epoch is."""

    def __init__(self, desc: str) -> None:
        super().__init__(
            persist=False,
            desc=desc,
            bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
        )

    def attach(self, engine: Engine) -> None:
        if _rank() == 0:
            super().attach(engine)


class LastEpochToo(ValidationHandler):
    """MONAI's ValidationHandler that also validates after the last epoch, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        due = lambda e, epoch: epoch % self.interval == 0 or epoch == e.state.max_epochs  # noqa: E731
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)


class EpochReport:
    """One plain line an epoch, and the same numbers for TensorBoard.

    Args:
        log_dir: folder of the TensorBoard files.
        optimizer: whose learning rate is reported.
        batch_size: samples an iteration and process.
    """

    def __init__(self, log_dir: str, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self.log_dir, self.optimizer, self.batch_size = str(log_dir), optimizer, batch_size

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

    def _report(self, engine: Engine) -> None:
        if _rank() > 0:
            return
        seconds = time.perf_counter() - self.started
        processes = dist.get_world_size() if dist.is_initialized() else 1
        values = {
            "loss": float(self.loss) / self.iterations,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "samples_per_second": self.iterations * self.batch_size * processes / seconds,
            "waiting_for_data": self.waited / seconds,
        }
        logger.info(
            "epoch %d/%d  loss %.4f  lr %.2e  %.1f s  %.2f samples/s  waiting for data %.1f %%",
            engine.state.epoch, engine.state.max_epochs, values["loss"], values["learning_rate"],
            seconds, values["samples_per_second"], 100 * values["waiting_for_data"],
        )  # fmt: skip
        for name, value in values.items():
            _writer(self.log_dir).add_scalar(f"train/{name}", value, engine.state.epoch)
        _writer(self.log_dir).flush()


class ValidationReport:
    """One plain line a validation; Dice per label and a picture of the first case for TensorBoard.

    Args:
        log_dir: folder of the TensorBoard files.
        labels: names by value, background first.
    """

    def __init__(self, log_dir: str, labels: Sequence[str]) -> None:
        self.log_dir, self.labels = str(log_dir), list(labels)
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
            self.first = {k: output[k] for k in ("label", "pred")} | {"file": output["image"].meta["filename_or_obj"]}

    def _report(self, engine: Engine) -> None:
        if _rank() > 0:
            return
        epoch, name = engine.state.epoch, engine.state.key_metric_name
        per_label = torch.as_tensor(engine.state.metric_details[name]).float().nanmean(dim=0).tolist()
        details = ", ".join(f"{label} {dice:.4f}" for label, dice in zip(self.labels[1:], per_label, strict=True))
        mean = float(engine.state.metrics[name])
        logger.info(
            "validation after epoch %d  Dice %.4f (%s)  %.1f s",
            epoch,
            mean,
            details,
            time.perf_counter() - self.started,
        )
        writer = _writer(self.log_dir)
        writer.add_scalar("validation/dice", mean, epoch)
        for label, dice in zip(self.labels[1:], per_label, strict=True):
            writer.add_scalar(f"validation/dice_{label}", dice, epoch)
        if self.first is not None:
            scan = nib.load(self.first["file"])  # as stored; of several channels the first
            stored = np.asanyarray(scan.dataobj, dtype=np.float32)
            stored = stored[..., 0] if stored.ndim == 4 else stored
            label, prediction = (np.asarray(self.first[k][0]) for k in ("label", "pred"))
            picture = overlay(stored, label, prediction, scan.header.get_zooms())
            writer.add_image("validation/scan_label_prediction", picture, epoch, dataformats="HWC")
        writer.flush()
