"""Steps that are not finite change nothing, are named, and end a run when there are many."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer

from scripts.training.finite import DivergedError, FiniteSteps, _Step
from scripts.training.handlers import GradientClipping
from scripts.utils.errors import UserError


def trainer_of(factors: list[float], fused: bool = False, epochs: int = 1) -> SupervisedTrainer:
    """Make a trainer each of whose losses is multiplied by a factor; its weights after each step are in `weights`."""
    network = torch.nn.Linear(2, 1)
    left = iter(factors * epochs)
    loader = [{"image": torch.ones(1, 2), "label": torch.zeros(1, 1), "case": [f"c{i}"]} for i in range(len(factors))]
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=loader, network=network,
        loss_function=lambda pred, label: pred.sum() * next(left),
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused),
        train_handlers=[GradientClipping(12.0), FiniteSteps(3)], decollate=False,
    )  # fmt: skip
    trainer.weights = [network.weight.detach().clone()]
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.weights.append(e.network.weight.detach().clone()))
    return trainer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(bad, fused, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    trainer = trainer_of([1.0, bad, 1.0], fused)
    trainer.run()
    start, first, second, third = trainer.weights
    assert torch.equal(first, second)
    assert not torch.equal(start, first)
    assert not torch.equal(second, third)
    assert caplog.messages == [
        "epoch 1, iteration 2: the loss is not finite, the step is left out; cases c1",
        "epoch 1: 1 steps were left out",
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is_finite(bad):
    trainer = trainer_of([1.0, 1.0])
    loss = trainer.loss_function
    trainer.loss_function = lambda *pair: loss(*pair) + (bad if trainer.state.iteration == 2 else 0.0)
    trainer.run()
    assert torch.equal(trainer.weights[1], trainer.weights[2])
    assert trainer.state.not_finite == 1


def test_a_gradient_that_is_not_finite_is_left_out(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    trainer = trainer_of([1.0, 1.0])
    trainer.network.weight.register_hook(lambda g: g * math.nan if trainer.state.iteration == 2 else g)
    trainer.run()
    assert torch.equal(trainer.weights[1], trainer.weights[2])
    assert "iteration 2: the gradient is not finite" in caplog.messages[0]


def test_overflows_while_a_scaler_looks_for_its_scale_are_not_counted():
    steps, step = FiniteSteps(1), _Step(1, 1, [], torch.tensor([0.5, math.inf]), None)
    state = SimpleNamespace(not_finite=0, epoch_length=9)
    for scale, counted in ((2.0, False), (1.0, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with pytest.raises(DivergedError) if counted else nullcontext():
            steps._judge(SimpleNamespace(state=state, amp=True, scaler=scaler), step)


def test_finite_steps_are_what_they_were():
    one, other = trainer_of([1.0, 2.0, -3.0]), trainer_of([1.0, 2.0, -3.0])
    other.network.load_state_dict(one.network.state_dict())
    FiniteSteps.spread, spread = (lambda *_: None), FiniteSteps.spread
    try:
        one.run()
    finally:
        FiniteSteps.spread = spread
    other.run()
    assert torch.equal(one.weights[-1], other.weights[-1])


def test_many_in_a_row_end_the_run_and_others_do_not():
    trainer_of([1.0, math.nan, math.nan], epochs=3).run()
    with pytest.raises(UserError, match="last 3 steps, up to iteration 4 of epoch 1"):
        trainer_of([1.0, *[math.nan] * 4]).run()
