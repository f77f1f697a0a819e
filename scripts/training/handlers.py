"""Handlers that Ignite's engines need besides MONAI's own: seeds, clipping, progress bar, last validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class EpochSeeds:
    """Seeds everything random of an epoch from (seed, epoch, rank), so that a resumed run repeats what would have been.

    Args:
        seed: the run's seed.
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
    """Scales the gradients to a global norm of at most `max_norm` before the optimizer's step, and keeps that norm."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        state: Any = engine.state
        state.gradient_norm = torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)


class StockOutput:
    """Makes of a step's output what MONAI's own handlers read, a list of dictionaries, for the handlers behind it.

    The handlers of this bundle stand before it and read the step's dictionary; trackers that MONAI or a user appends to
    the list stand behind it.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        state.output = [state.output]


class Progress(ProgressBar):
    """Ignite's progress bar, in the first process only and gone when the epoch is."""

    def __init__(self, desc: str) -> None:
        super().__init__(
            persist=False,
            desc=desc,
            bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
        )

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # as Ignite's own
        if _rank() == 0:
            super().attach(engine, *args, **kwargs)


class LastEpochToo(ValidationHandler):
    """MONAI's ValidationHandler that also validates after the last epoch, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        due = lambda e, epoch: epoch % self.interval == 0 or epoch == e.state.max_epochs  # noqa: E731
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)
