"""The end that SIGINT or SIGTERM asks for: within an iteration, in all processes of a training, with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from ..utils import signals
from ..utils.signals import asked


class Agreement:
    """Lets all processes know that one of them was asked to stop, without waiting for a GPU."""

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        return dist.new_group(backend="gloo") if dist.is_initialized() else None

    def __call__(self) -> int:
        """Return the number of the signal that any process has received, or 0; all of them have to ask."""
        if self.group is None:
            return asked()
        number = torch.tensor(asked())
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return int(number)


class Stopping:
    """Ends a training where a signal came, after a step, after an epoch or within a validation, which is made again.

    Several processes validate different numbers of cases, and end a validation first.

    Args:
        save: writes a checkpoint of a trainer that is within an epoch.
    """

    def __init__(self, save: Callable[[Engine], None]) -> None:
        self.save, self.agreed = save, Agreement()
        self.number = 0  # of the signal that ended the training

    def attach(self, trainer: Engine, evaluator: Engine | None) -> None:
        """Listen from now on; `evaluator` is None where nothing is validated."""
        self.trainer = trainer
        trainer.add_event_handler(Events.STARTED, lambda _: signals.finish())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end)
        trainer.add_event_handler(Events.COMPLETED, lambda _: signals.finish(False))
        if evaluator is not None:
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._within_validation)

    def _after_step(self, trainer: Engine) -> None:
        if number := self.agreed():
            self.save(trainer)
            self._end(trainer, number)

    def _within_validation(self, evaluator: Engine) -> None:
        if not dist.is_initialized() and (number := self.agreed()):
            evaluator.terminate()
            self._end(self.trainer, number)

    def _end(self, trainer: Any, number: int | None = None) -> None:
        if self.number:
            return
        self.number = trainer.state.stopped = self.agreed() if number is None else number
        if self.number:
            trainer.terminate()


def leave(trainer: Engine) -> None:
    """End the process with the exit code of the signal that ended the run of `trainer`, if one did."""
    state: Any = trainer.state
    if number := getattr(state, "stopped", 0):
        first = not dist.is_initialized() or dist.get_rank() == 0
        if dist.is_initialized():
            dist.destroy_process_group()
        done = f"epoch {state.epoch}, iteration {state.iteration}; --resume auto goes on: ended"
        signals.leave(number, done if first else "ended")
