"""Steps whose loss or gradient is not finite change nothing; they are named, counted, and end a run if many."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys

from ..utils.errors import UserError

logger = logging.getLogger("mednext")


class DivergedError(UserError):
    """So many steps in a row were not finite that a run is ended."""


class _Step(NamedTuple):
    """The numbers of a step, on their way from the device."""

    epoch: int
    iteration: int
    cases: list[str]
    numbers: torch.Tensor  # loss and norm of the gradient
    arrived: Any  # event of the device, or None


class FiniteSteps:
    """Leaves out each step whose loss or gradient is not finite, names it, and ends a run after `patience` in a row.

    It stands behind GradientClipping, whose norm of the gradient it looks at. A GPU is not waited for: the optimizer
    itself leaves the step out there, and the numbers are looked at one step later. Overflows that a GradScaler makes
    while it looks for its scale are its own business. A loss that is not finite spreads to all processes by the
    gradient, so that all of them leave the step out.

    Args:
        patience: so many steps in a row may be left out.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.steps: deque[_Step] = deque()
        self.skipped = 0  # in this epoch

    def attach(self, engine: Engine) -> None:
        state: Any = engine.state
        state.not_finite = 0  # steps in a row, up to now
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.spread)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.leave_out)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)

    def spread(self, engine: SupervisedTrainer) -> None:
        """Make the whole gradient of a loss that is not finite NaN, and leave any other as it is."""
        output: Any = engine.state.output
        loss = output[CommonKeys.LOSS]
        output[CommonKeys.LOSS] = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def leave_out(self, engine: SupervisedTrainer) -> None:
        """Keep the optimizer from taking a step that is not finite."""
        optimizer: Any = engine.optimizer
        bad = ~engine.state.gradient_norm.isfinite()
        if _scales(engine):
            return  # its scaler has seen the same, and leaves it out
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()
        elif bad:
            optimizer.zero_grad(set_to_none=True)

    def look(self, engine: SupervisedTrainer) -> None:
        """Look at the numbers of the step before on a GPU, of this step elsewhere."""
        state: Any = engine.state
        numbers = torch.stack([state.output[CommonKeys.LOSS].detach().float(), state.gradient_norm.detach().float()])
        arrived = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        cases = list(state.batch.get("case", []))
        self.steps.append(_Step(state.epoch, state.iteration, cases, numbers, arrived))
        while len(self.steps) > (arrived is not None):
            self._judge(engine, self.steps.popleft())

    def _start(self, engine: Engine) -> None:
        self.skipped = 0

    def _end(self, engine: SupervisedTrainer) -> None:
        while self.steps:
            self._judge(engine, self.steps.popleft())
        if self.skipped:
            logger.warning("epoch %d: %d steps were left out", engine.state.epoch, self.skipped)

    def _judge(self, engine: SupervisedTrainer, step: _Step) -> None:
        if step.arrived is not None:
            step.arrived.synchronize()
        loss, norm = step.numbers.tolist()
        state: Any = engine.state
        if math.isfinite(norm):
            state.not_finite = 0
            return
        if math.isfinite(loss) and engine.scaler is not None and _scales(engine) and engine.scaler.get_scale() > 1:
            return
        state.not_finite += 1
        self.skipped += 1
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first or not math.isfinite(loss):
            logger.warning(
                "epoch %d, iteration %d: the %s is not finite, the step is left out; cases %s",
                step.epoch, (step.iteration - 1) % state.epoch_length + 1,
                "gradient" if math.isfinite(loss) else "loss", ", ".join(step.cases) or "unknown",
            )  # fmt: skip
        if state.not_finite >= self.patience:
            raise DivergedError(
                f"the last {state.not_finite} steps, up to iteration {(step.iteration - 1) % state.epoch_length + 1} of"
                f" epoch {step.epoch}, had a loss or gradient that is not finite; the checkpoint before them is kept:"
                " look at the cases named above, and go on with --resume auto and a smaller --learning_rate."
            )


def _scales(engine: SupervisedTrainer) -> bool:
    return bool(engine.amp and engine.scaler is not None and engine.scaler.is_enabled())
