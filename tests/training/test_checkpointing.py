"""What a training run keeps on disk, and the settings beside the weights."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from scripts.training.checkpointing import TrainingRun, resumes
from scripts.training.optim import polynomial
from scripts.utils.errors import UserError
from scripts.utils.files import sha256
from scripts.weights.checkpoints import check_weights, load_checkpoint
from scripts.weights.model_settings import read_model_settings


class TestTrainingRun:
    """The life of a small network's files."""

    def run_of(self, folder, resume=False, epochs=10, selection="best"):
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1.0)
        scheduler = polynomial(optimizer, epochs)
        evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}, key_metric_name="dice", epoch=0))
        trainer = SimpleNamespace(
            state=SimpleNamespace(epoch=0, iteration=0, epoch_length=5, max_epochs=epochs), scaler=None
        )
        return TrainingRun(folder, network, optimizer, scheduler, evaluator, {"size": "S"}, selection, resume), trainer

    def validate(self, run, epoch, dice):
        run.evaluator.state.epoch, run.evaluator.state.metrics = epoch, {"dice": dice}
        run.save_validated(run.evaluator)

    def test_only_better_weights_replace_the_best(self, tmp_path):
        run, _ = self.run_of(tmp_path)
        for epoch, dice in ((1, 0.5), (2, 0.7), (3, 0.6), (4, float("nan"))):
            torch.nn.init.constant_(run.network.weight, epoch)
            self.validate(run, epoch, dice)
        assert load_checkpoint(tmp_path / "model.pt")["weight"].unique() == 2
        assert read_model_settings(tmp_path / "model.pt") == {"size": "S", "epoch": 2, "dice": 0.7}
        assert json.loads((tmp_path / "model.json").read_text())["sha256"] == sha256(tmp_path / "model.pt")

    @pytest.mark.parametrize("first", [True, False], ids=["the first weights", "later ones"])
    @pytest.mark.parametrize("stopped", [1, 2])
    def test_a_run_killed_between_weights_and_settings_leaves_weights_that_load(
        self, stopped, first, tmp_path, monkeypatch
    ):
        run, _ = self.run_of(tmp_path)
        if not first:
            self.validate(run, 1, 0.5)
        whole, renamed = Path.replace, []

        def replace(path, target):
            if len(renamed) == stopped - 1:
                raise KeyboardInterrupt
            renamed.append(target)
            return whole(path, target)

        torch.nn.init.constant_(run.network.weight, 7.0)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                self.validate(run, 2, 0.7)
        assert [path.name for path in renamed] == ["model.json"][: stopped - 1]
        if not first:
            check_weights(tmp_path / "model.pt", run.network)
        self.validate(run, 3, 0.8)
        check_weights(tmp_path / "model.pt", run.network)

    def test_the_weights_of_the_release_before_load_when_a_run_that_replaces_them_is_killed(self, tmp_path):
        run, _ = self.run_of(tmp_path)
        torch.save(run.network.state_dict(), tmp_path / "model.pt")
        (tmp_path / "model.json").write_text('{"size": "S"}')
        before = sha256(tmp_path / "model.pt")
        torch.nn.init.constant_(run.network.weight, 7.0)
        self.validate(run, 1, 0.7)
        written = json.loads((tmp_path / "model.json").read_text())
        assert (written["sha256"], written["sha256_before"]) == (sha256(tmp_path / "model.pt"), before)

    def test_the_last_weights_are_kept_if_asked_for(self, tmp_path):
        run, _ = self.run_of(tmp_path, selection="last")
        for epoch, dice in ((1, 0.7), (2, 0.5)):
            torch.nn.init.constant_(run.network.weight, epoch)
            self.validate(run, epoch, dice)
        assert load_checkpoint(tmp_path / "model.pt")["weight"].unique() == 2
        assert json.loads((tmp_path / "model.json").read_text())["dice"] == 0.5
        with pytest.raises(UserError, match="checkpoint_selection is 'first'; expected best or last"):
            self.run_of(tmp_path, selection="first")

    def test_weights_are_kept_even_if_no_case_can_be_scored(self, tmp_path):
        run, _ = self.run_of(tmp_path)
        self.validate(run, 1, float("nan"))
        assert (tmp_path / "model.pt").is_file()
        self.validate(run, 2, 0.1)
        assert json.loads((tmp_path / "model.json").read_text())["epoch"] == 2

    def test_the_last_weights_are_kept_while_no_case_can_be_scored(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
        run, _ = self.run_of(tmp_path)
        for epoch in (1, 2, 3):
            torch.nn.init.constant_(run.network.weight, epoch)
            self.validate(run, epoch, float("nan"))
        assert load_checkpoint(tmp_path / "model.pt")["weight"].unique() == 3
        assert caplog.messages == [
            "no held-out case has foreground: the last weights are kept until one can be scored."
        ]

    @pytest.mark.parametrize("selection", ["best", "last"])
    def test_the_last_weights_are_kept_where_no_case_is_held_out(self, selection, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
        run, _ = self.run_of(tmp_path, selection=selection)
        run.evaluator = Engine(lambda *_: None)
        run.evaluator.data_loader = SimpleNamespace(dataset=[])
        trainer = Engine(lambda engine, _: torch.nn.init.constant_(run.network.weight, engine.state.epoch))
        trainer.scaler = None
        run.attach(trainer)
        trainer.run([0], max_epochs=3)
        assert load_checkpoint(tmp_path / "model.pt")["weight"].unique() == 3
        assert read_model_settings(tmp_path / "model.pt") == {"size": "S", "epoch": 3}
        assert caplog.messages == ["no case is held out: nothing is validated, and the last weights are kept."]

    def test_a_resumed_run_has_everything_back(self, tmp_path):
        run, trainer = self.run_of(tmp_path)
        self.validate(run, 1, 0.7)
        run.network(torch.ones(1, 2)).sum().backward()
        run.optimizer.step()
        run.lr_scheduler.step()
        trainer.state.epoch = 3
        run.save_state(trainer)

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
        run.save_state(trainer)
        again, restarted = self.run_of(tmp_path, resume=True, epochs=20)
        again.start(restarted)
        assert again.optimizer.param_groups[0]["lr"] == pytest.approx((1 - 5 / 20) ** 0.9)
        again.optimizer.step()
        again.lr_scheduler.step()
        assert again.optimizer.param_groups[0]["lr"] == pytest.approx((1 - 6 / 20) ** 0.9)

    def test_resuming_takes_the_learning_rate_of_the_command(self, tmp_path):
        run, trainer = self.run_of(tmp_path)
        run.save_state(trainer)
        again, restarted = self.run_of(tmp_path, resume=True)
        again.lr_scheduler.base_lrs = [0.25]
        again.start(restarted)
        assert again.optimizer.param_groups[0]["lr"] == 0.25

    def test_resuming_with_other_groups_of_weights_is_refused(self, tmp_path):
        run, trainer = self.run_of(tmp_path)
        run.save_state(trainer)
        again, restarted = self.run_of(tmp_path, resume=True)
        again.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        with pytest.raises(UserError, match="checkpoint.pt does not fit .*resume with the --freeze and --layer_decay"):
            again.start(restarted)

    def test_a_new_run_keeps_what_an_earlier_one_left(self, tmp_path):
        run, trainer = self.run_of(tmp_path)
        self.validate(run, 1, 0.7)
        run.save_state(trainer)
        old = load_checkpoint(tmp_path / "model.pt")["weight"]
        (tmp_path / "postprocessing.json").write_text("{}")
        new, restarted = self.run_of(tmp_path)
        new.start(restarted)
        self.validate(new, 1, 0.1)
        kept = next((tmp_path / "previous").iterdir())
        assert torch.equal(load_checkpoint(kept / "model.pt")["weight"], old)
        assert (kept / "model.json").is_file()
        assert (kept / "postprocessing.json").is_file()
        assert not (tmp_path / "postprocessing.json").exists()
        assert (kept / "training" / "checkpoint.pt").is_file()
        assert not (tmp_path / "training").exists()

    def test_a_disk_without_room_for_two_checkpoints_is_named_before_the_first_step(self, tmp_path, monkeypatch):
        self.after(tmp_path, 1)
        weights = 4 * (2 + 1)  # bytes of a linear layer, which AdamW keeps two moments of
        for resume, copies in ((False, 2 * (1 + 2) + (1 + 2) + 1), (True, (1 + 2) + 1)):
            for free, enough in ((copies * weights, True), (copies * weights - 1, False)):
                monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
                with nullcontext() if enough else pytest.raises(UserError, match=f"{tmp_path} has 0 MB of free space"):
                    self.run_of(tmp_path, resume=resume)

    def after(self, folder, epoch, resume=False):
        """Save the checkpoint of an epoch, whose number all weights have."""
        run, trainer = self.run_of(folder, resume=resume)
        run.start(trainer)
        trainer.state.epoch, trainer.state.iteration = epoch, 5 * epoch
        torch.nn.init.constant_(run.network.weight, epoch)
        run.save_state(trainer)
        return run, trainer

    def test_a_damaged_newest_checkpoint_is_passed_over(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
        self.after(tmp_path, 1)
        run, trainer = self.after(tmp_path, 2, resume=True)
        run.save_state(trainer)  # of the same epoch: does not push the other out
        newest, before = (tmp_path / "training" / name for name in ("checkpoint.pt", "checkpoint_before.pt"))
        for damage in (
            lambda: newest.write_bytes(newest.read_bytes()[:-99]),
            lambda: torch.save({**load_checkpoint(before), "model": {"weight": torch.tensor(float("nan"))}}, newest),
            lambda: torch.save({"epoch": 7}, newest),
            newest.unlink,
        ):
            damage()
            assert resumes(tmp_path, "auto")
            again, restarted = self.run_of(tmp_path, resume=True)
            again.start(restarted)
            assert again.network.weight.unique() == 1
            assert restarted.state.epoch == 1
        assert len([m for m in caplog.messages if f"taking {before}, after epoch 1" in m]) == 3
        before.write_bytes(b"")
        with pytest.raises(UserError, match="checkpoint_before.pt is not a readable weights file"):
            self.run_of(tmp_path, resume=True)

    def test_weights_that_are_not_finite_and_what_led_there_are_not_saved(self, tmp_path):
        run, trainer = self.after(tmp_path, 1)
        trainer.state.epoch, trainer.state.not_finite = 2, 1
        torch.nn.init.constant_(run.network.weight, 2)
        run.save_state(trainer)
        self.validate(run, 2, 0.9)
        torch.nn.init.constant_(run.network.weight, float("inf"))
        trainer.state.not_finite = 0
        with pytest.raises(UserError, match="weight of the network is not finite any more; the last checkpoint in"):
            run.save_state(trainer)
        with pytest.raises(UserError, match="weight of the network is not finite any more"):
            self.validate(run, 3, 0.9)
        assert load_checkpoint(tmp_path / "training/checkpoint.pt")["epoch"] == 1

    def test_killed_before_its_first_checkpoint_a_run_gives_the_earlier_one_back(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
        run, _ = self.after(tmp_path, 3)
        self.validate(run, 3, 0.7)
        (tmp_path / "postprocessing.json").write_text("{}")
        new, trainer = self.run_of(tmp_path)
        new.start(trainer)  # and is killed here
        assert not resumes(tmp_path, "auto")  # which starts again
        assert not resumes(tmp_path, False)
        assert resumes(tmp_path, True)
        assert "the run that was set aside in" in caplog.text
        again, restarted = self.run_of(tmp_path, resume=True)
        again.start(restarted)
        assert restarted.state.epoch == 3
        assert (tmp_path / "postprocessing.json").is_file()
        with pytest.raises(UserError, match="nothing to resume: start without --resume, or with auto"):
            resumes(tmp_path / "other", True)

    def test_resuming_from_nothing_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="checkpoint.pt not found; nothing to resume"):
            self.run_of(tmp_path, resume=True)
