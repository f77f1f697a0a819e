"""The place within an epoch at which a checkpoint is written, and going on from there, bit for bit on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events


def place(engine: Engine) -> dict[str, Any]:
    """Return what a checkpoint within an epoch has besides the weights; all processes have to ask."""
    state: Any = engine.state
    random: list[Any] = [torch.get_rng_state()]
    if dist.is_initialized():
        random = [None] * dist.get_world_size()
        dist.all_gather_object(random, torch.get_rng_state())
    return {
        "epoch": state.epoch - 1,
        "step": state.iteration - (state.epoch - 1) * state.epoch_length,
        "random": random,
        "loss": state.loss,
        "losses": state.losses,
        "not_finite": state.not_finite,
    }


class Rest:
    """The rest of an epoch: its first steps' batches are drawn and dropped, so that the next is the one that is due.

    Args:
        found: what `place` returned.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def attach(self, engine: Engine) -> None:
        """Take over the epoch that comes next, or end it where all its steps were done."""
        state: Any = engine.state
        step = min(self.found["step"], state.epoch_length)
        state.iteration += step
        if step == state.epoch_length:
            state.epoch += 1
            self._take_up(engine)
            engine.fire_event(Events.EPOCH_COMPLETED)
            return
        self.handlers = [
            engine.add_event_handler(Events.EPOCH_STARTED, self._take_up),
            engine.add_event_handler(Events.GET_BATCH_STARTED, self._drop),
        ]

    def _take_up(self, engine: Engine) -> None:
        state: Any = engine.state
        state.loss = self.found["loss"]
        state.losses, state.not_finite = self.found["losses"], self.found["not_finite"]

    def _drop(self, engine: Engine) -> None:
        for handler in self.handlers:  # once is enough
            handler.remove()
        assert engine._dataloader_iter is not None
        for _ in range(self.found["step"]):
            next(engine._dataloader_iter)
        rank, random = dist.get_rank() if dist.is_initialized() else 0, self.found["random"]
        if rank < len(random):
            torch.set_rng_state(random[rank])
