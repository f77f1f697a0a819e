"""Names of labels, channels and cases are text: MONAI evaluates none of them, in no file that the bundle writes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY, bundle
from monai.bundle import ConfigParser

from scripts.data.datasets import Dataset
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.planning.planner import plan_training
from scripts.training.settings_checks import Given, check_plan
from scripts.utils.errors import UserError
from scripts.utils.files import read_table
from scripts.weights.model_settings import ModelSettings

CALL = "$__import__('os').system('touch {file}')"
NAMES = [CALL, "@train", "%x", "_target_", "a#b", "@#x", "%##iterations", "a::b",
         "$1$ \\frac{$", "<script>alert(1)</script>",
         "\\x24import", "%configs/train.json::epochs", "_disabled_", "=1+1", "a,\"b\"", "$@labels"]  # fmt: skip
CASES = ["$open('X','w')", "@train", "%x", "a#b", "$$(touch X)"]
WRITTEN = {  # every file that planning, checking, training, scoring and inference leave
    "plan.json", "fingerprint.json", "fingerprint.png", "checked.json", "check.json", "model.pt", "model.json",
    "training/progress.csv", "training/progress.png", "training/checkpoint.pt",
    "cases.csv", "summary.csv", "summary.json", "report.html", "report.csv", "masks.json",
}  # fmt: skip


def hostile(phantom_dir: Path, folder: Path, x: Path) -> Path:
    """Copy the phantom with hostile names of labels, channel and cases."""
    description = json.loads((phantom_dir / "dataset.json").read_text())
    names = [name.format(file=x) if name == CALL else name for name in NAMES]
    description["labels"] = {"0": "background", **{str(i): name for i, name in enumerate(names, 1)}}
    description["modality"] = {"0": names[0]}
    listed = description["training"]
    for name, entry in zip(CASES, listed, strict=True):
        for part in ("image", "label"):
            target = folder / entry[part].split("/")[-2] / f"{name}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(phantom_dir / entry[part], target)
            entry[part] = str(target.relative_to(folder))
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def ran(phantom_dir, tmp_path_factory):
    """Plan, check, train with the plan, score and segment: the folder of all outputs, and the data set's."""
    root = tmp_path_factory.mktemp("hostile")
    data, out = hostile(phantom_dir, root / "data", root / "X"), root / "out"
    common = ("--dataset_dir", data, "--output_dir", out)
    bundle("planning", "--config_file", "configs/plan.json", *common, "--output", out / "plan.json")
    bundle("checking", "--config_file", "configs/plan.json", *common)
    planned = ("configs/train.json", str(out / "plan.json"))
    bundle(
        "training", "--config_file", str([*planned]), *common, "--ckpt_dir", out, "--epochs", 1, *TINY,
        "--patch_size", "[32,32,32]",
    )  # fmt: skip
    scored = [*planned, "configs/evaluate.json"]
    bundle("evaluating", "--config_file", str(scored), *common, "--ckpt_dir", out, "--num_workers", 0)
    bundle("--config_file", "configs/inference.json", "--dataset_dir", data, "--ckpt_dir", out, "--output_dir", out)
    return out, data


def test_nothing_was_evaluated(ran):
    out, _ = ran
    assert not [*out.parent.glob("X*")]
    assert not Path("X").exists()


def test_the_list_of_files_is_whole(ran):
    out, _ = ran
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    found = {name for name in found if "tfevents" not in name}  # where TensorBoard is installed
    assert {name for name in found if not name.endswith(".nii.gz")} == WRITTEN
    assert {name for name in found if name.endswith(".nii.gz")} >= {f"{case}_seg.nii.gz" for case in CASES}


def test_the_plan_is_a_config_that_holds_no_name_monai_knows(ran):
    out, data = ran
    config = ConfigParser()
    config.read_config([str(ROOT / "configs/train.json"), str(out / "plan.json")])
    parsed = config.get_parsed_content("checks#planned_for")
    assert parsed == json.loads((out / "plan.json").read_text())["checks#planned_for"]
    assert Dataset(data).labels.names[1].startswith("$__import__")


def test_every_other_file_holds_the_names_as_they_are(ran):
    out, data = ran
    labels = Dataset(data).labels
    assert json.loads((out / "model.json").read_text())["labels"] == labels.names
    assert {row["label"] for row in read_table(out / "cases.csv")} == set(labels.names[1:])
    assert {row["case"] for row in read_table(out / "report.csv")} == set(CASES)
    assert set(json.loads((out / "masks.json").read_text())["masks"]) == set(CASES)
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    assert re.search(r'<th scope="row">precision</th><td>(b?float\d\d)</td>', page)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_plan_is_taken_for_its_own_names_and_no_other(name, phantom_dir, tmp_path):
    data = Dataset(phantom_dir)
    data.labels.names[1], data.channels[0] = name, name
    records = fingerprint_cases(data.cases, 1, data.labels, str(tmp_path / "checked.json"))
    (tmp_path / "plan.json").write_text(json.dumps(plan_training(data, records)))
    config = ConfigParser()
    config.read_config([str(ROOT / "configs/train.json"), str(tmp_path / "plan.json")])
    planned = config.get_parsed_content("checks#planned_for")
    check_plan(Given(data, ModelSettings(), planned))
    data.labels.names[1] = f"{name} "
    with pytest.raises(UserError, match="the plan is for the labels"):
        check_plan(Given(data, ModelSettings(), planned))
