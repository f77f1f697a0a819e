"""What other programs do with the bundle, in their own words; the programs themselves are in tests/hosts."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CACHE, COARSE, ROOT, TINY, bundle, overlays, python_m
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.transforms import Compose
from monai.utils import ensure_tuple

from scripts.data.datasets import Dataset
from scripts.data.phantom import phantom
from scripts.publishing.package import package
from scripts.weights.model_settings import read_model_settings

VALUES = {0: "background", 2: "Left Shell", 5: "Core"}  # none of the phantom's, nor of the shipped weights'
CALLS = Path(__file__).with_name("monai_label_calls.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Make a data set with labels of its own."""
    folder = Path(phantom(str(tmp_path_factory.mktemp("own") / "own"), training=5, test=1))
    for file in [*folder.glob("labelsT?/*.nii.gz")]:
        label = nib.load(file)
        values = np.array([*VALUES, 0], np.uint8)[np.asarray(label.dataobj).astype(int)]
        nib.save(nib.Nifti1Image(values, label.affine), file)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {str(value): name for value, name in VALUES.items()}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def own(data, tmp_path_factory) -> Path:
    """Train on these labels and package the weights; return the bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    bundle(
        "training", *overlays("train"), "--dataset_dir", data, "--ckpt_dir", folder / "models",
        "--output_dir", folder / "eval", "--epochs", 1, *TINY, *COARSE,
    )  # fmt: skip
    package(str(folder), str(folder / "models"), name="own_segmentation")
    return folder / "own_segmentation"


def monai_label(root: Path, *requests) -> list[dict]:
    """Do what MONAI Label does, one request after the other, in one process as its server does."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CALLS), str(root), json.dumps(requests)],
        cwd=root.parent, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line[:6] in ("infer ", "train ")]


def mask_of_the_command(root: Path, scan: str, output: Path, *options) -> np.ndarray:
    bundle(
        "inferring", *overlays("inference"), "--dataset_dir", scan, "--ckpt_dir", root / "models",
        "--output_dir", output, *options,
    )  # fmt: skip
    return np.asarray(nib.load(next(output.glob("*_seg.nii.gz"))).dataobj)


def test_monai_label_infers_trains_and_infers_with_the_new_weights(own, data, tmp_path):
    root = shutil.copytree(own, tmp_path / own.name)
    weights = root / "models/model.pt"
    cases, before = Dataset(data).cases, read_model_settings(weights)
    scan = cases[0]["image"]
    first = mask_of_the_command(root, scan, tmp_path / "first")
    mirrored = mask_of_the_command(root, scan, tmp_path / "mirrored", "--tta", True, "--overlap", 0.25)
    answers = monai_label(
        root,
        ["infer", {"image": scan, "output": str(tmp_path / "first.npy")}],
        ["infer", {"image": scan, "output": str(tmp_path / "mirrored.npy"), "tta": True, "overlap": 0.25}],
        ["train", {"cases": cases, "max_epochs": 2}],
        ["infer", {"image": scan, "output": str(tmp_path / "second.npy")}],
    )
    assert answers[0]["labels"] == {"left shell": 2, "core": 5}
    assert answers[0]["options"] == ["keep_largest", "overlap", "tta"]
    assert set(answers[3]["values"]) <= set(VALUES)
    assert np.array_equal(np.load(tmp_path / "first.npy"), first)
    assert np.array_equal(np.load(tmp_path / "mirrored.npy"), mirrored)
    assert np.array_equal(np.load(tmp_path / "second.npy"), mask_of_the_command(root, scan, tmp_path / "second"))

    after = read_model_settings(weights)
    differing = {name for name in before if before[name] != after[name]}
    assert differing <= {"fold", "training_ranges", "epoch", "dice"}
    assert (after["fold"], after["labels"], after["patch_size"]) == ("all", list(VALUES.values()), [32, 32, 32])
    with open(root / "models/training/progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/learning_rate"]) for row in rows] == pytest.approx([1e-3, 1e-3 * 0.5**0.9])
    states = [torch.load(path, weights_only=True) for path in (weights, own / "models/model.pt")]
    assert not torch.equal(states[0]["out_0.conv_out.weight"], states[1]["out_0.conv_out.weight"])
    assert not (root / "phantom").exists()


@pytest.mark.parametrize("request_", [{"val_split": 0}, {"val_split": -1, "run_id": ""}], ids=["no split", "own split"])
def test_monai_label_trains_without_cases_held_out_and_by_its_panel_s_defaults(request_, own, data, tmp_path):
    root = shutil.copytree(own, tmp_path / own.name)
    monai_label(root, ["train", {"cases": Dataset(data).cases[:2], "max_epochs": 1, **request_}])
    found = read_model_settings(root / "models/model.pt")
    assert (found["epoch"], found["fold"], "dice" in found) == (1, "all", False)


def test_cases_without_a_data_set_and_without_weights_are_refused_in_one_sentence(data, tmp_path):
    cases = [{key: case[key] for key in ("image", "label")} for case in Dataset(data).cases]
    done = bundle(
        "training", *overlays("train"), "--ckpt_dir", tmp_path, "--train#dataset#data", cases, fails=True,
    )  # fmt: skip
    assert (
        f"error: {tmp_path}/model.json not found, and train#dataset#data gives cases without a data set" in done.stderr
    )
    assert "give --dataset_dir, or in --ckpt_dir weights with their model.json" in done.stderr


def test_cases_beside_a_data_set_have_its_labels(data, tmp_path):
    cases = [{key: Path(case[key]) for key in ("image", "label")} for case in Dataset(data).cases]
    bundle(
        "training", *overlays("train"), "--dataset_dir", data, "--ckpt_dir", tmp_path, "--output_dir", tmp_path,
        "--train#dataset#data", [{k: str(v) for k, v in case.items()} for case in cases[:2]],
        "--validate#dataset#data", [{k: str(v) for k, v in case.items()} for case in cases[2:3]],
        "--train#trainer#max_epochs", 1, *TINY, *COARSE,
    )  # fmt: skip
    found = read_model_settings(tmp_path / "model.pt")
    assert (found["labels"], found["fold"], found["epoch"]) == (list(VALUES.values()), 0, 1)


def client(data: Path, folder: Path) -> MonaiAlgo:
    """Make a federated client as NVFlare does, with a folder of its own."""
    settings = {"dataset_dir": str(data), "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "eval")}
    settings |= {"cache_dir": CACHE.name, "spacing": [1.5, 1.5, 1.5], "patch_size": [32, 32, 32], "num_workers": 0}
    made = MonaiAlgo(
        bundle_root=str(ROOT), local_epochs=1, train_kwargs={**settings, "iterations": 1}, eval_kwargs=dict(settings),
        best_model_filepath=str(folder / "models/model.pt"),
    )  # fmt: skip
    made.initialize(extra={ExtraItems.CLIENT_NAME: folder.name})
    return made


@pytest.mark.filterwarnings("ignore:.*GHSA:UserWarning")  # MONAI's advice to run trusted configurations only
def test_a_federated_client_evaluates_and_trains_in_three_rounds(data, tmp_path):
    clients = [client(data, tmp_path / name) for name in ("one", "other")]
    (tmp_path / "one/models").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "models/model.pt", tmp_path / "one/models")  # an earlier training, to be set aside once
    weights = {name: value.cpu().clone() for name, value in clients[0].trainer.network.state_dict().items()}
    metrics = []
    for _ in range(3):
        scored = [c.evaluate(ExchangeObject(weights=weights)).metrics for c in clients]
        metrics.append([found["dice"] for found in scored])
        assert scored[0] == scored[1]  # the same weights on the same cases
        differences = []
        for c in clients:
            c.train(ExchangeObject(weights=weights))
            differences.append(c.get_weights().weights)
        assert all(d.keys() == weights.keys() for d in differences)
        assert any(d.any() for d in differences[0].values())
        weights = {name: value + (differences[0][name] + differences[1][name]) / 2 for name, value in weights.items()}
    assert np.isfinite(metrics).all()
    for c, folder in zip(clients, ("one", "other"), strict=True):
        written = read_model_settings(tmp_path / folder / "models/model.pt")
        assert (written["labels"], written["label_values"]) == (list(VALUES.values()), list(VALUES))
        with open(tmp_path / folder / "models/training/progress.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["epoch"], float(row["train/learning_rate"])) for row in rows] == [(n, 1e-3) for n in "123"]
        best = c.get_weights(extra={ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
        assert best.keys() == weights.keys()
        c.finalize()
    assert len(list((tmp_path / "one/models/previous").iterdir())) == 1
    assert not (tmp_path / "other/models/previous").exists()


def test_a_scan_in_memory_as_monai_deploy_gives_it_has_the_mask_of_the_command(own, data, tmp_path):
    scan = Dataset(data).cases[0]["image"]
    config = ConfigParser()
    config.read_config(str(ROOT / "configs/inference.json"))
    config["ckpt_dir"] = str(own / "models")
    config.parse()
    before, after = (  # what MonaiBundleInferenceOperator leaves of the two
        Compose(
            [t for t in config.get_parsed_content(name).transforms if not re.search("(Load|Save)Image", str(type(t)))]
        )
        for name in ("preprocessing", "postprocessing")
    )
    loaded = nib.load(scan)
    meta = {"original_channel_dim": "no_channel", "affine": loaded.affine, "original_affine": loaded.affine}
    case = before({"image": MetaTensor.ensure_torch_and_prune_meta(np.asarray(loaded.dataobj), meta)})
    network = config.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(own / "models/model.pt", weights_only=True))
    with torch.no_grad():
        scores = config.get_parsed_content("inferer")(inputs=case["image"][None], network=network)
    mask = after({"pred": ensure_tuple(scores)[0], **case})["pred"]
    assert np.array_equal(mask[0].numpy(), mask_of_the_command(own, scan, tmp_path))


def test_the_four_commands_of_the_readme_lead_to_a_mask_in_monai_label(data, tmp_path):
    block = next(
        b for b in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "start_server" in b
    )
    plan, train, pack, serve = [
        shlex.split(line) for line in block.replace("\\\n", "").splitlines() if "python" in line
    ]
    models = tmp_path / "apps/monaibundle/model"
    places = {"$D": str(data), "apps/monaibundle/model": str(models)}
    plan, train, pack = ([places.get(word, word) for word in command] for command in (plan, train, pack))
    train = [word.replace("plan.json", str(tmp_path / "plan.json")) for word in train]
    assert [command[:3] for command in (plan, train, pack)] == [
        ["python", "-m", "monai.bundle"], ["python", "-m", "monai.bundle"], ["python", "-m", "scripts"]
    ]  # fmt: skip
    folders = ("--ckpt_dir", tmp_path / "models")
    bundle(*plan[4:], *COARSE, "--output_dir", tmp_path / "eval", "--output", tmp_path / "plan.json")
    short = ("--epochs", 1, "--iterations", 1, "--num_workers", 0, "--output_dir", tmp_path / "eval")
    bundle(*train[4:], *folders, *short)
    python_m("scripts", *pack[3:], *folders)
    root = models / serve[serve.index("models") + 1]
    (answer,) = monai_label(root, ["infer", {"image": Dataset(data).cases[0]["image"], "output": str(tmp_path / "m")}])
    assert answer["labels"] == {"left shell": 2, "core": 5}
