"""Weights are recognised, refused where they do not fit, and a run's files are kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from scripts import settings
from scripts.architecture import describe
from scripts.checkpoints import check, load
from scripts.errors import UserError
from scripts.mednext import SIZES, create_mednext_v1
from scripts.runs import TrainingRun


@pytest.mark.parametrize("size", SIZES)
def test_a_state_dict_says_what_network_it_is_of(size):
    with torch.device("meta"):
        network = create_mednext_v1(2, 5, size, kernel_size=5)
    assert describe(network.state_dict()) == f"MedNeXt {size}, kernel 5, 2 channel(s), 5 classes"


def test_foreign_weights_are_called_foreign():
    assert describe({"conv.weight": torch.zeros(1)}) == "another network than MedNeXt"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((1, 3, "B"), "MedNeXt B, kernel 3"),
        ((1, 4, "S"), "4 classes"),
        ((2, 3, "S"), "2 channel"),
        ((1, 3, "S", 5), "kernel 5"),
    ],
    ids=["size", "classes", "channels", "kernel"],
)
def test_weights_of_another_network_are_refused_with_both_sides(arguments, found, tmp_path):
    torch.save(create_mednext_v1(*arguments, deep_supervision=True).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"{found}.*but the settings ask for MedNeXt S, kernel 3, 1 channel.*3 classes"):
        check(tmp_path / "model.pt", create_mednext_v1(1, 3, "S", deep_supervision=True))


def test_weights_without_deep_supervision_heads_are_refused(tmp_path):
    torch.save(create_mednext_v1(1, 3, "S").state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match="8 parameters differ, the first is out_1.conv_out.bias"):
        check(tmp_path / "model.pt", create_mednext_v1(1, 3, "S", deep_supervision=True))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="model.pt not found; train first"):
        load(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="model.pt is not a readable weights file"):
        load(tmp_path / "model.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("the file ran code",))

    torch.save({"weights": Payload()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="not a readable weights file"):
        load(tmp_path / "model.pt")


def test_settings_beside_weights_override_defaults(tmp_path):
    assert settings.read(tmp_path / "model.pt", size="S") == {"size": "S"}
    settings.write(tmp_path / "model.pt", {"size": "B", "spacing": [1.0, 1.0, 2.0]})
    assert settings.read(tmp_path / "model.pt", size="S", kernel_size=3) == {
        "size": "B", "spacing": [1.0, 1.0, 2.0], "kernel_size": 3
    }  # fmt: skip
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="model.json is not valid JSON"):
        settings.read(tmp_path / "model.pt")


class TestTrainingRun:
    """The life of a small network's files."""

    def run_of(self, folder, resume=False, epochs=10):
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=epochs, power=0.9)
        evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}, key_metric_name="dice", epoch=0))
        trainer = SimpleNamespace(
            state=SimpleNamespace(epoch=0, iteration=0, epoch_length=5, max_epochs=epochs), scaler=None
        )
        return TrainingRun(folder, network, optimizer, scheduler, evaluator, {"size": "S"}, resume), trainer

    def validate(self, run, epoch, dice):
        run.evaluator.state.epoch, run.evaluator.state.metrics = epoch, {"dice": dice}
        run.keep_best(run.evaluator)

    def test_only_better_weights_replace_the_best(self, tmp_path):
        run, _ = self.run_of(tmp_path)
        for epoch, dice in ((1, 0.5), (2, 0.7), (3, 0.6), (4, float("nan"))):
            torch.nn.init.constant_(run.network.weight, epoch)
            self.validate(run, epoch, dice)
        assert load(tmp_path / "model.pt")["weight"].unique() == 2
        assert json.loads((tmp_path / "model.json").read_text()) == {"size": "S", "epoch": 2, "dice": 0.7}

    def test_weights_are_kept_even_if_no_case_can_be_scored(self, tmp_path):
        run, _ = self.run_of(tmp_path)
        self.validate(run, 1, float("nan"))
        assert (tmp_path / "model.pt").is_file()
        self.validate(run, 2, 0.1)
        assert json.loads((tmp_path / "model.json").read_text())["epoch"] == 2

    def test_a_resumed_run_has_everything_back(self, tmp_path):
        run, trainer = self.run_of(tmp_path)
        self.validate(run, 1, 0.7)
        run.network(torch.ones(1, 2)).sum().backward()
        run.optimizer.step()
        run.lr_scheduler.step()
        trainer.state.epoch = 3
        run.save(trainer)

        again, restarted = self.run_of(tmp_path, resume=True)
        again.start(restarted)
        assert torch.equal(again.network.weight, run.network.weight)
        assert again.optimizer.state_dict()["param_groups"] == run.optimizer.state_dict()["param_groups"]
        assert torch.equal(
            again.optimizer.state_dict()["state"][0]["exp_avg"], run.optimizer.state_dict()["state"][0]["exp_avg"]
        )
        assert (restarted.state.epoch, restarted.state.iteration) == (3, 15)
        self.validate(again, 4, 0.6)  # not better than the 0.7 before the interruption
        assert json.loads((tmp_path / "model.json").read_text())["epoch"] == 1

    def test_resuming_with_more_epochs_stretches_the_schedule(self, tmp_path):
        run, trainer = self.run_of(tmp_path, epochs=10)
        for _ in range(5):
            run.optimizer.step()
            run.lr_scheduler.step()
        trainer.state.epoch = 5
        run.save(trainer)
        again, restarted = self.run_of(tmp_path, resume=True, epochs=20)
        again.start(restarted)
        assert again.optimizer.param_groups[0]["lr"] == pytest.approx((1 - 5 / 20) ** 0.9)
        again.optimizer.step()
        again.lr_scheduler.step()
        assert again.optimizer.param_groups[0]["lr"] == pytest.approx((1 - 6 / 20) ** 0.9)

    def test_a_new_run_keeps_what_an_earlier_one_left(self, tmp_path):
        run, trainer = self.run_of(tmp_path)
        self.validate(run, 1, 0.7)
        run.save(trainer)
        old = load(tmp_path / "model.pt")["weight"]
        new, restarted = self.run_of(tmp_path)
        new.start(restarted)
        self.validate(new, 1, 0.1)
        kept = next((tmp_path / "previous").iterdir())
        assert torch.equal(load(kept / "model.pt")["weight"], old)
        assert (kept / "model.json").is_file()
        assert (kept / "training" / "checkpoint.pt").is_file()
        assert not (tmp_path / "training").exists()

    def test_resuming_from_nothing_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="checkpoint.pt not found; nothing to resume"):
            self.run_of(tmp_path, resume=True)
