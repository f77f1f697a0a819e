"""Every epoch's numbers are computed once and are the same on the terminal, in the table and in TensorBoard."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from conftest import save
from matplotlib.image import imread
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.transforms import AsDiscreted, LoadImaged
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.training.handlers import LastEpochToo
from scripts.training.history import EpochReport, TrainingLog, ValidationReport, WriteTrainingLog, read_log


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """Save a scan and its label of two classes."""
    folder = tmp_path_factory.mktemp("files")
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:6, 2:6] = 1
    label[6:] = 2
    paths = {"image": label.astype(np.float32) * 100, "label": label}
    return {name: str(save(folder / f"{name}.nii.gz", voxels)) for name, voxels in paths.items()}


def train(folder, files, epochs: int, start: int = 0) -> None:
    """Train a network of one voxel from behind epoch `start`, validating every other epoch."""
    torch.manual_seed(0)
    network, log = torch.nn.Conv3d(1, 3, 1), TrainingLog(str(folder))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.25)
    loader = DataLoader(Dataset([files], LoadImaged(("image", "label"), ensure_channel_first=True)), batch_size=1)
    dice = MeanDice(include_background=False, num_classes=3, output_transform=from_engine(["pred", "label"]))
    evaluator = SupervisedEvaluator(
        "cpu", loader, network, postprocessing=AsDiscreted("pred", argmax=True), key_val_metric={"dice": dice},
        val_handlers=[ValidationReport(log, ["organ", "tumour"])],
    )  # fmt: skip
    report, validation = EpochReport(log, optimizer, batch_size=2), LastEpochToo(2, evaluator)
    batch = {"image": torch.ones(1, 1, 2, 2, 2), "label": torch.zeros(1)}
    trainer = SupervisedTrainer(
        "cpu", epochs, [batch] * 3, network, optimizer, loss_function=lambda pred, _: 0 * pred.sum() + 1.5,
        train_handlers=[report, validation, WriteTrainingLog(log)], decollate=False,
    )  # fmt: skip
    trainer.state.epoch, trainer.state.iteration = start, 3 * start
    trainer.run()


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """Folder and log lines of three epochs."""
    folder = tmp_path_factory.mktemp("training")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("mednext")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    train(folder, files, epochs=3)
    logger.removeHandler(handler)
    return folder, lines


def test_the_lines_have_the_numbers_of_the_table(run):
    folder, lines = run
    rows = read_log(folder / "progress.csv")
    assert [line.split()[0] for line in lines] == ["epoch", "epoch", "validation", "epoch", "validation"]
    assert re.fullmatch(r"epoch 1/3  loss 1\.5000  lr 2\.50e-01  .* s  .* samples/s  waiting for data .* %", lines[0])
    assert rows[0]["train/loss"] == 1.5
    dice = [rows[1][f"validation/dice{name}"] for name in ("", "_organ", "_tumour")]
    said = "validation after epoch 2  Dice {:.4f} (organ {:.4f}, tumour {:.4f})  ".format(*dice)
    assert lines[2].startswith(said)
    assert np.mean(dice[1:]) == pytest.approx(dice[0])


def test_every_epoch_has_a_row_and_those_with_a_validation_its_dice(run):
    rows = read_log(run[0] / "progress.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert ["validation/dice" in row for row in rows] == [False, True, True]
    assert rows[0]["train/samples_per_second"] == pytest.approx(3 * 2 / rows[0]["train/seconds"])


def test_tensorboard_has_the_table_and_a_picture_of_every_validation(run):
    folder, _ = run
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    rows = read_log(folder / "progress.csv")
    names = {name for row in rows for name in row} - {"epoch"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        wanted = [(row["epoch"], row[name]) for row in rows if name in row]
        np.testing.assert_allclose([(e.step, e.value) for e in events.Scalars(name)], wanted, rtol=1e-6)  # float32
    assert [e.step for e in events.Images("validation/scan_label_prediction")] == [2, 3]


def test_the_picture_is_drawn(run):
    assert imread(run[0] / "progress.png").shape[2] == 4


def test_a_resumed_run_goes_on_in_the_table_and_forgets_what_came_after_its_checkpoint(files, tmp_path):
    train(tmp_path, files, epochs=3)
    before = read_log(tmp_path / "progress.csv")
    train(tmp_path, files, epochs=4, start=1)
    after = read_log(tmp_path / "progress.csv")
    assert [row["epoch"] for row in after] == [1, 2, 3, 4]
    assert after[0] == before[0]
    assert after[1] != before[1]  # its own seconds
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_run_from_the_start_forgets_all_that_was_there(files, tmp_path):
    train(tmp_path, files, epochs=3)
    train(tmp_path, files, epochs=1)
    assert [row["epoch"] for row in read_log(tmp_path / "progress.csv")] == [1]
