"""Names that nothing reads are refused with the nearest known one; a user's own, and MONAI's, are not."""

from __future__ import annotations

import json
import logging

import pytest
from conftest import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from scripts.utils.errors import UserError
from scripts.utils.settings import RENAMED, give, prepare
from scripts.utils.settings_names import refuse_unknown


def prepared(*names: str, **given) -> ConfigParser:
    made = ConfigParser()
    made.read_config([str(ROOT / f"configs/{name}.json") for name in names])
    give(made, given)
    prepare(made)
    return made


@pytest.mark.parametrize(
    ("names", "name", "near"),
    [
        (["train"], "epoch", "epochs"),
        (["train"], "learnig_rate", "learning_rate"),
        (["train"], "Epochs", "epochs"),
        (["train"], "freze", "fine_tuning#freeze"),
        (["train"], "checkpoint_styl", "network_def#checkpoint_style"),
        (["train"], "upkern_form", "init_weights"),
        (["train", "evaluate"], "save_prediction", "save_predictions"),
        (["train", "pool"], "nsd_tolerance", "nsd_tolerance_mm"),
        (["inference"], "overlaps", "overlap"),
        (["inference"], "datasetdir", "dataset_dir"),
        (["inference"], "disable_progress_bar", None),
        (["plan"], "memory_gib", "memory_gb"),
        (["fetch"], "tsk", "task"),
        (["train"], "fine_tuning#freze", "fine_tuning#freeze"),
        (["train"], "train#trainer#max_epoch", "train#trainer#max_epochs"),
        (["train"], "train#loss#loss#smoth", "train#loss#loss#smooth"),
        (["train"], "train#batch_dise", "train#batch_dice"),
        (["train"], "train#augmentation#transforms#0#zom", "train#augmentation#transforms#0#zoom"),
        (["train"], "model#spcing", "model#spacing"),
        (["train", "evaluate"], "validate#inferer#overlp", "validate#inferer#overlap"),
        (["inference"], "postprocessing#transforms#0#reference_", "postprocessing#transforms#0#reference"),
        (["plan"], "planning#siz", "planning#size"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(names, name, near):
    meant = f"; did you mean --{near}[?]" if near else "[.]"
    with pytest.raises(UserError, match=f"^--{name} is no setting{meant} docs"):
        prepared(*names, **{name: "x"})


@pytest.mark.parametrize("name", ["foo#bar", "fine_tuning#freeze#deeper", "train#handlers#99", "epochs#x#y"])
def test_a_name_that_leads_nowhere_is_refused(name):
    with pytest.raises(UserError, match=f"--{name} leads nowhere"):
        prepared("train", **{name: 1})


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["train"], {"train#trainer#max_epochs": 3}),
        (["train"], {"train#optimizer#weight_decay": 0}),
        (["train"], {"train#optimizer#betas": [0.9, 0.99]}),
        (["train"], {"train#loss#loss#smooth": 1}),
        (["train"], {"train#dataloader#prefetch_factor": 2}),
        (["train"], {"network_def#n_channels": 16}),
        (["train"], {"train#handlers": [], "validate#postprocessing#transforms": []}),
        (["train"], {"train#key_metric": None, "train#postprocessing": None}),
        (["inference"], {"evaluator#amp_kwargs": {}, "key_metric": None}),
        (["inference"], {"evaluator#key_val_metric": None}),
        (["inference"], {"transforms#native#0#_desc_": "mine", "_comment_": "mine"}),
        (["train"], {"my_rate": 0.1, "learning_rate": "$@my_rate / 10"}),
        (["train"], {"mine": {"rate": 0.1}, "learning_rate": "@mine#rate"}),
        (["train"], {"train#mine": 3, "epochs": "@train#mine"}),
        (["inference"], {"dataset": {"_target_": "Dataset", "data": []}}),
        (["train"], {"experiment_name": "x", "run_name": "y", "tracking_uri": "z", "save_execute_config": False}),
        (["train", "multi_gpu_train"], {}),
        (["train", "evaluate", "multi_gpu_evaluate"], {}),
        (["train", "demo"], {}),
    ],
)
def test_what_something_reads_is_taken(names, given):
    prepared(*names, **given)


def test_what_a_macro_copied_is_taken():
    made = ConfigParser()
    made.read_config(str(ROOT / "configs/train.json"))
    give(made, {"mine": {"_target_": "torch.optim.SGD", "params": [], "lr": 0.1}, "train#optimizer": "%mine"})
    made.parse()
    prepare(made)


def test_a_setting_of_another_command_is_said_to_have_no_effect(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    prepared("train", save_predictions=False)
    prepared("plan", keep="last")
    assert caplog.messages == [
        "--save_predictions has no effect here; it is a setting of another command.",
        "--keep has no effect here; it is a setting of another command.",
    ]


def test_a_configuration_that_is_not_the_bundles_may_have_any_name():
    refuse_unknown(ConfigParser({"initialize": [], "anything": 3}), RENAMED)


class TestWorkflow:
    """A host of MONAI's: overlays, overrides, tracking, steps of its own."""

    def workflow(self, tmp_path, *overlays: dict, **given) -> ConfigWorkflow:
        files = [str(ROOT / "configs/fetch.json")]
        for number, overlay in enumerate(overlays):
            (tmp_path / f"{number}.json").write_text(json.dumps(overlay))
            files.append(str(tmp_path / f"{number}.json"))
        return ConfigWorkflow(
            files, meta_file=str(ROOT / "configs/metadata.json"), logging_file=False, workflow_type=None, **given
        )

    def test_values_of_overlays_and_overrides_are_read(self, tmp_path):
        made = self.workflow(tmp_path, {"folder": 2024}, task=4)
        made.initialize()
        assert (made.parser["folder"], made.parser["task"]) == ("2024", "4")

    @pytest.mark.parametrize("where", ["overlay", "override"])
    def test_unknown_names_are_refused(self, where, tmp_path):
        overlays, given = ([{"foldr": "x"}], {}) if where == "overlay" else ([], {"foldr": "x"})
        with pytest.raises(RuntimeError) as told:
            self.workflow(tmp_path, *overlays, **given).initialize()
        assert "--foldr is no setting; did you mean --folder?" in str(told.value.__cause__)

    def test_steps_that_monai_was_told_to_run_are_known(self, tmp_path):
        made = self.workflow(tmp_path, {"mine": ["$3"], "end": []}, run_id="mine", final_id="end")
        made.initialize()
        assert made.run() == [3]

    def test_tracking_adds_names_of_its_own(self, tmp_path):
        settings = json.loads(json.dumps(DEFAULT_MLFLOW_SETTINGS))
        settings["configs"] |= {"save_execute_config": False, "tracking_uri": "x"}
        self.workflow(tmp_path, tracking=settings).initialize()
