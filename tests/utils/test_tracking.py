"""Trackers that MONAI appends to the handlers get settings and files, and their runs end."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.handlers import MLFlowHandler, StatsHandler, TensorBoardStatsHandler, from_engine

from scripts.training.finite import FiniteSteps
from scripts.training.handlers import GradientClipping, StockOutput
from scripts.utils import tracking


def tracker(**attributes) -> MLFlowHandler:
    """Make MONAI's handler without the package mlflow."""
    made = object.__new__(MLFlowHandler)
    vars(made).update(
        client=mock.Mock(tracking_uri=""), cur_run=SimpleNamespace(info=SimpleNamespace(run_id="run")),
        experiment_param=None, artifacts=(None,), run_finish_status="FINISHED", **attributes,
    )  # fmt: skip
    return made


def test_settings_and_files_are_added_to_every_tracker_and_to_no_other_handler(tmp_path):
    (tmp_path / "report.csv").write_text("")
    one, other = tracker(), tracker()
    other.experiment_param = {"mine": 1}
    tracking.add([one, StatsHandler(), other], {"spacing": [1.0, 1.0, 1.0]}, tmp_path / "report.csv")
    assert one.experiment_param == {"spacing": [1.0, 1.0, 1.0]}
    assert other.experiment_param == {"mine": 1, "spacing": [1.0, 1.0, 1.0]}
    one.complete()
    assert [call.args for call in one.client.log_artifact.call_args_list] == [("run", str(tmp_path / "report.csv"))]


def test_the_executed_configuration_is_found_where_monai_wrote_it(tmp_path):
    config = tmp_path / "config_20261125_181215.json"
    config.write_text("{}")
    for name in (f"{tmp_path} + '/{config.name}'", str(config)):
        one = tracker()
        one.artifacts = (name,)
        tracking.add([one], {})
        one.complete()
        one.client.log_artifact.assert_called_once_with("run", str(config))


def test_files_that_appear_after_the_engine_are_kept_and_the_run_ends(tmp_path):
    (tmp_path / "report.html").write_text("")
    one = tracker()
    tracking.finish([StatsHandler(), one], tmp_path, "report.html")
    one.client.log_artifact.assert_called_once_with("run", str(tmp_path / "report.html"))
    one.client.set_terminated.assert_called_once_with("run", "FINISHED")
    assert one.cur_run is None


def test_handlers_of_monai_read_the_loss_behind_those_of_this_bundle(tmp_path):
    network, losses = torch.nn.Linear(2, 1), []
    writer = mock.Mock()
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=1, network=network, optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        train_data_loader=[{"image": torch.ones(3, 2), "label": torch.zeros(3, 1), "case": ["a", "b", "c"]}] * 2,
        loss_function=lambda pred, label: 0 * pred.sum() + 0.25, decollate=False,
        train_handlers=[
            GradientClipping(12.0), FiniteSteps(3), StockOutput(),
            StatsHandler(output_transform=from_engine(["loss"], first=True)),
            TensorBoardStatsHandler(writer, output_transform=from_engine(["loss"], first=True)),
        ],
    )  # fmt: skip
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: losses.append(from_engine("loss", first=True)(e.state.output))
    )
    trainer.run()
    assert [float(loss.detach()) for loss in losses] == [0.25, 0.25]
    logged = [call.args[1] for call in writer.add_scalar.call_args_list]
    assert [float(torch.as_tensor(value).detach()) for value in logged] == [0.25, 0.25]
