"""The files of a training run: the best weights, and all it takes to go on after an interruption."""

from __future__ import annotations

import logging
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
from ..utils.files import check_writable, copy_file
from ..weights.checkpoint_pair import NAMES, has_checkpoint, last_set_aside, newest, save_newest
from ..weights.checkpoints import check_fits, not_finite, save_weights
from ..weights.model_settings import settings_file
from .finite import DivergedError
from .optim import take_up
from .stopping import Stopping
from .within_epoch import Rest, place

DIVERGED = "checkpoint_diverged.pt"  # the newest one, where no step after it was finite
UNFIT = (ValueError, KeyError, TypeError, AttributeError, IndexError)  # of other groups of weights, another schedule
CHECKPOINT = 3  # times the weights: with the two moments of AdamW

logger = logging.getLogger("mednext")


def resumes(folder: str | Path, resume: bool | str) -> bool:
    """Say whether a training goes on from what lies in `folder`.

    Args:
        folder: its `ckpt_dir`. Where an earlier run was set aside and the one after it was ended before its first
            checkpoint, the earlier one comes back.
        resume: True, False, or "auto", which goes on where there is a checkpoint and starts where there is none.

    Raises:
        UserError: `resume` is True and there is no checkpoint.
    """
    folder = Path(folder)
    training = folder / "training"
    if resume is not True or has_checkpoint(training):
        return bool(resume) and has_checkpoint(training)
    if (kept := last_set_aside(folder)) is None:
        raise UserError(f"{training / NAMES[0]} not found; nothing to resume: start without --resume, or with auto.")
    logger.warning("%s has no checkpoint: the run that was set aside in %s is taken back.", training, kept)
    files = [path for path in kept.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path.name in NAMES):  # what says that there is a run comes last
        copy_file(file, folder / file.relative_to(kept))
    return True


class TrainingRun:
    """Keeps the best or the last weights of a training run, and all it takes to go on after an interruption.

    In `folder`: `model.pt` (plain state dict of the best or of the last validation) with `model.json` beside it, and
    `training/checkpoint.pt` (network, optimizer, schedule, scaler, epoch, best score) after every epoch, before every
    validation, and where SIGINT or SIGTERM ends the run after a step; `checkpoint_before.pt` is that of the epoch
    before. What is not finite is not saved, nor what leads to it. A new run first sets aside what an earlier one left
    there, into `previous/`; nothing is overwritten. Files appear whole or not at all.

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
        resume: go on from the newest good checkpoint, see `resumes`.

    Raises:
        UserError: another `checkpoint_selection`; `resume` without a checkpoint, or with one of another network;
            weights that are not finite; no room for the checkpoints.
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
        self.checkpoint, self.before = (self.folder / "training" / name for name in NAMES)
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        self.best_metric, self.best_epoch = float("-inf"), 0
        self.held_out = True  # whether there are cases to validate on
        self.started = False
        self.state: dict[str, Any] | None = None
        self.saved = (0, 0)  # epoch and iteration of the newest checkpoint
        self.trainer: Engine | None = None
        self.stopping = Stopping(self._save_within)
        if self.writes:
            values = sum(value.numel() * value.element_size() for value in network.state_dict().values())
            kept = 0 if resume else 2  # checkpoints that are still to come, beside the one that is being written
            check_writable(self.folder, need=((kept + 1) * CHECKPOINT + 1) * values)
        if resume:
            found = newest(self.checkpoint.parent)
            if found is None:
                raise UserError(f"{self.checkpoint} not found; nothing to resume: start without --resume.")
            self.state = found.state
            check_fits(self.state["model"], network, found.path)

    def attach(self, engine: Engine) -> None:
        self.trainer = engine
        engine.add_event_handler(Events.STARTED, self.start)
        loader: Any = getattr(self.evaluator, "data_loader", None)  # whose part of the cases may be empty on a process
        cases = getattr(loader, "dataset", None)
        self.held_out = cases is None or len(cases) > 0
        if self.held_out:
            self.evaluator.add_event_handler(Events.STARTED, lambda _: self._save_within(engine))
            self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.save_validated)
        else:
            logger.warning("no case is held out: nothing is validated, and the last weights are kept.")
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_last)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_state)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.put_diverged_away)
        self.stopping.attach(engine, self.evaluator if self.held_out else None)

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
        except UNFIT as e:
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
        step = state.get("step", 0)
        self.saved = state["epoch"] + bool(step), engine.state.iteration + step
        within = f" and {step} iterations" if step else ""
        logger.info("resuming after epoch %d%s of %d", state["epoch"], within, engine.state.max_epochs)
        if within:
            Rest(state).attach(engine)

    def _set_aside(self) -> None:
        files = (self.checkpoint, self.before, self.weights)
        stamp = next((time.localtime(p.stat().st_mtime) for p in files if p.exists()), None)
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
                copy_file(file, kept / file.name)
        logger.info("the earlier training in %s is kept in %s", self.folder, kept)

    def save_state(self, engine: SupervisedTrainer) -> None:
        """Save all it takes to go on after this epoch."""
        if not self.stopping.number:  # within its validation
            self._save(engine, {"epoch": engine.state.epoch})

    def _save_within(self, engine: Engine) -> None:
        self._save(engine, place(engine))

    def _save(self, engine: Any, reached: dict[str, Any]) -> None:
        """Save a checkpoint, unless the last steps were not finite and more are to come.

        Raises:
            UserError: the weights are not finite; nothing is saved then.
        """
        if not self.writes or not self._good(engine):
            return
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": engine.scaler.state_dict() if engine.scaler is not None else {},
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
            **reached,
        }
        save_newest(self.checkpoint.parent, state, same_epoch=self.saved[0] == engine.state.epoch)
        self.saved = engine.state.epoch, engine.state.iteration

    def put_diverged_away(self, engine: Engine, error: Exception) -> None:
        """Raise what ended a run; where no step after the newest checkpoint was finite, the one before it counts."""
        state: Any = engine.state
        steps = state.iteration - self.saved[1]
        led_there = isinstance(error, DivergedError) and steps <= state.not_finite
        if led_there and self.writes and self.checkpoint.exists():
            self.checkpoint.replace(self.checkpoint.with_name(DIVERGED))
            logger.warning("no step after epoch %d was finite: its checkpoint is %s now", self.saved[0], DIVERGED)
        raise error

    def _good(self, engine: Engine | None) -> bool:
        """Say whether the network is worth keeping: not between steps that are not finite, unless it is the last."""
        if name := not_finite(self.network.state_dict()):
            raise UserError(
                f"{name} of the network is not finite any more; the last checkpoint in {self.checkpoint.parent}"
                " is as it was: go on with --resume auto and a smaller --learning_rate."
            )
        state: Any = engine.state if engine is not None else None
        return not getattr(state, "not_finite", 0) or state.epoch == state.max_epochs

    def save_last(self, engine: Engine) -> None:
        """Save the weights of this epoch, which nothing has validated."""
        if not self._good(engine):
            return
        self.best_epoch = engine.state.epoch
        self._save_weights({"epoch": self.best_epoch})

    def save_validated(self, evaluator: Engine) -> None:
        """Save the weights that were validated, if they are those to keep."""
        if not self._good(self.trainer):
            return
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
