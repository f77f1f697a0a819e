"""Seeds, clipping, the validation schedule and the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import RandGaussianNoised

from scripts.training.handlers import EpochSeeds, GradientClipping, LastEpochToo


def batches_of(epochs: range, workers: int) -> list[list[float]]:
    """List what a seeded engine draws in `epochs`: first noise value and case of each batch."""
    dataset = CacheDataset(
        [{"image": torch.full((1, 2), float(i))} for i in range(4)],
        RandGaussianNoised("image", prob=1.0, std=0.1),
        progress=False,
    )
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=3)
    loader = DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=workers)
    drawn: list[list[float]] = []
    engine = Engine(lambda _, batch: drawn[-1].append(float(batch["image"][0, 0, 0])))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda _: drawn.append([]))
    EpochSeeds(seed=7, dataset=dataset).attach(engine)
    engine.state.epoch, engine.state.iteration = epochs.start - 1, 3 * (epochs.start - 1)
    engine.state.max_epochs, engine.state.epoch_length = epochs.stop - 1, 3
    engine.run(loader, max_epochs=epochs.stop - 1)
    return drawn


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_draws_the_same_whether_or_not_the_run_was_interrupted(workers):
    torch.manual_seed(3)
    whole = batches_of(range(1, 4), workers)
    torch.manual_seed(4)  # what a new process would have
    assert batches_of(range(2, 4), workers) == whole[1:]
    assert whole[1] != whole[2]


def trainer_of(network, loss, handlers, epochs=1, batches=1):
    loader = [{"image": torch.ones(1, 2), "label": torch.zeros(1, 1)}] * batches
    return SupervisedTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=loader, network=network, loss_function=loss,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0), train_handlers=handlers, decollate=False,
    )  # fmt: skip


@pytest.mark.parametrize(("factor", "length"), [(1e6, 12.0), (1e-3, None)], ids=["long", "short"])
def test_gradients_are_scaled_to_at_most_the_norm(factor, length):
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    trainer_of(network, lambda pred, label: factor * pred.sum(), [GradientClipping(12.0)]).run()
    expected = length or factor * np.sqrt(2)
    assert network.weight.norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("epochs", "due"), [(7, [3, 6, 7]), (6, [3, 6]), (2, [2])])
def test_validation_comes_at_the_interval_and_after_the_last_epoch(epochs, due):
    seen = []

    class Validator(SupervisedEvaluator):
        def __init__(self):
            pass

        def run(self, epoch):
            seen.append(epoch)

    network = torch.nn.Linear(2, 1)
    trainer_of(network, lambda pred, label: pred.sum(), [LastEpochToo(3, Validator())], epochs=epochs).run()
    assert seen == due
