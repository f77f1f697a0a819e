"""The files of a training run: the best weights, and all it takes to go on after an interruption."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..utils.errors import UserError
from ..weights.checkpoints import check_fits, load_checkpoint, save_checkpoint, save_weights
from ..weights.model_settings import settings_file
from .optim import take_up

logger = logging.getLogger("mednext")


class TrainingRun:
    """Keeps the best or the last weights of a training run, and all it takes to go on after an interruption.

    In `folder`: `model.pt` (plain state dict of the best or of the last validation) with `model.json` beside it, and
    `training/checkpoint.pt` (network, optimizer, schedule, scaler, epoch, best score) after every epoch. A new run
    first sets aside what an earlier one left there, into `previous/`; nothing is overwritten. Files appear whole or
    not at all.

    Where no case is held out, or no held-out case can be scored, the last weights are kept, with a sentence.

    Args:
        folder: where to keep things.
        network: the network, not wrapped for distribution.
        optimizer: its optimizer.
        lr_scheduler: its learning rate schedule, see `training.optim`.
        evaluator: engine whose key metric decides what is best (higher is better).
        settings: the values of the config that belong to the weights.
        checkpoint_selection: "best", or "last" as published, whose scores on the held-out cases are not those it was
            chosen by.
        resume: go on from `training/checkpoint.pt`.

    Raises:
        UserError: another `checkpoint_selection`; `resume` without a checkpoint, or with one of another network.
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        evaluator: Engine,
        settings: dict,
        checkpoint_selection: str = "best",
        resume: bool = False,
    ) -> None:
        if checkpoint_selection not in ("best", "last"):
            raise UserError(f"checkpoint_selection is {checkpoint_selection!r}; expected best or last.")
        self.folder, self.checkpoint_selection = Path(folder), checkpoint_selection
        self.network, self.optimizer, self.lr_scheduler, self.evaluator = network, optimizer, lr_scheduler, evaluator
        self.settings, self.resume = settings, resume
        self.weights = self.folder / "model.pt"
        self.checkpoint = self.folder / "training" / "checkpoint.pt"
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        self.best_metric, self.best_epoch = float("-inf"), 0
        self.held_out = True  # whether there are cases to validate on
        self.started = False
        self.state: dict[str, Any] | None = None
        if resume:
            if not self.checkpoint.is_file():
                raise UserError(f"{self.checkpoint} not found; nothing to resume: start without --resume.")
            self.state = load_checkpoint(self.checkpoint)
            check_fits(self.state["model"], network, self.checkpoint)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        loader: Any = getattr(self.evaluator, "data_loader", None)  # whose part of the cases may be empty on a process
        cases = getattr(loader, "dataset", None)
        self.held_out = cases is None or len(cases) > 0
        if self.held_out:
            self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.save_validated)
        else:
            logger.warning("no case is held out: nothing is validated, and the last weights are kept.")
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_last)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_state)

    def start(self, engine: SupervisedTrainer) -> None:
        """Go on from the checkpoint, or set aside what an earlier run left; a trainer that is run again goes on."""
        if self.started:
            return
        self.started = True
        state, self.state = self.state, None
        if state is not None:
            self._restore(engine, state)
        elif self.writes:
            self._set_aside()

    def _restore(self, engine: SupervisedTrainer, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        rates = self.lr_scheduler.base_lrs  # of this command, which may be others
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        except (ValueError, KeyError) as e:  # other groups of weights; a schedule of version 0.2
            raise UserError(
                f"{self.checkpoint} does not fit ({e}): resume with the --freeze and --layer_decay it was started with,"
                " and with the same version of this bundle, or start without --resume."
            ) from e
        self.lr_scheduler.base_lrs = rates
        take_up(self.lr_scheduler)
        if engine.scaler is not None and state["scaler"]:
            engine.scaler.load_state_dict(state["scaler"])
        self.best_metric, self.best_epoch = state["best_metric"], state["best_epoch"]
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        logger.info("resuming after epoch %d of %d", state["epoch"], engine.state.max_epochs)

    def _set_aside(self) -> None:
        stamp = next((time.localtime(p.stat().st_mtime) for p in (self.checkpoint, self.weights) if p.exists()), None)
        if stamp is None:
            return
        kept = self.folder / "previous" / time.strftime("%Y%m%d-%H%M%S", stamp)
        kept.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.parent.exists() and not (kept / "training").exists():
            self.checkpoint.parent.rename(kept / "training")
        if (decided := self.folder / "postprocessing.json").exists():  # for the earlier weights, not for new ones
            decided.rename(kept / decided.name)
        for file in (settings_file(self.weights), self.weights):
            if file.exists():  # copied, since it stays in use until better weights replace it
                shutil.copy2(file, kept / file.name)
        logger.info("the earlier training in %s is kept in %s", self.folder, kept)

    def save_state(self, engine: SupervisedTrainer) -> None:
        """Save all it takes to go on after this epoch."""
        if not self.writes:
            return
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": engine.scaler.state_dict() if engine.scaler is not None else {},
            "epoch": engine.state.epoch,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
        }
        save_checkpoint(state, self.checkpoint)

    def save_last(self, engine: Engine) -> None:
        """Save the weights of this epoch, which nothing has validated."""
        self.best_epoch = engine.state.epoch
        self._save_weights({"epoch": self.best_epoch})

    def save_validated(self, evaluator: Engine) -> None:
        """Save the weights that were validated, if they are those to keep."""
        validated: Any = evaluator.state  # MONAI's, with more attributes than Ignite's
        name = validated.key_metric_name
        metric = float(validated.metrics[name])
        chosen = self.checkpoint_selection == "best" and self.best_metric > float("-inf")
        if chosen and not metric > self.best_metric:
            return
        if metric != metric and self.checkpoint_selection == "best" and not self.best_epoch:
            logger.warning("no held-out case has foreground: the last weights are kept until one can be scored.")
        self.best_metric = metric if metric == metric else float("-inf")
        self.best_epoch = validated.epoch
        self._save_weights({"epoch": self.best_epoch, name: round(metric, 4)})

    def _save_weights(self, found: dict[str, Any]) -> None:
        """Save the weights with their settings, and what was found of them."""
        if self.writes:
            save_weights(self.network.state_dict(), self.weights, {**self.settings, **found})
