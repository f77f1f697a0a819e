"""Training, resuming, scoring and inference as a user runs them: the command line and real files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import COARSE, GRIDS, ROOT, TINY, bundle, grid, overlays, python_m, save, world
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.data.datasets import Dataset
from scripts.planning import fingerprint_file


def rows(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def evaluated(trained, phantom_dir, tmp_path_factory) -> Path:
    """Score the trained weights; return the `output_dir`."""
    folder = tmp_path_factory.mktemp("evaluated")
    bundle(
        "evaluating", *overlays("train", "evaluate"), "--dataset_dir", phantom_dir, "--ckpt_dir", trained,
        "--output_dir", folder, "--num_workers", 0,
    )  # fmt: skip
    return folder


def test_masks_that_were_scored_by_a_training_have_the_same_scores_by_themselves(evaluated, phantom_dir, tmp_path):
    for mask in (evaluated / "predictions").glob("*_seg.nii.gz"):
        shutil.copy(phantom_dir / "labelsTr" / f"{mask.name.removesuffix('_seg.nii.gz')}.nii.gz", tmp_path)
    python_m(
        "scripts", "score_masks", "--masks", evaluated / "predictions", "--references", tmp_path,
        "--dataset", phantom_dir, "--output_dir", tmp_path / "scores",
    )  # fmt: skip
    for one, other in zip(rows(tmp_path / "scores/cases.csv"), rows(evaluated / "cases.csv"), strict=True):
        assert [one.pop(name) for name in ("case", "label")] == [other.pop(name) for name in ("case", "label")]
        exact = {name: float(value) for name, value in other.items()}  # spacings are rounded to a header's digits
        assert {name: float(value) for name, value in one.items()} == pytest.approx(exact, rel=1e-5, nan_ok=True)


@pytest.fixture(scope="module")
def bundle_copy(trained, tmp_path_factory) -> Path:
    """Copy the bundle somewhere else, with trained weights in its `models`."""
    copy = tmp_path_factory.mktemp("bundles") / "mednext_segmentation"
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "models").mkdir()
    for name in ("model.pt", "model.json"):
        shutil.copy(trained / name, copy / "models" / name)
    return copy


@pytest.fixture(scope="module")
def masks(trained, tmp_path_factory) -> tuple[Path, Path]:
    """Segment a folder of scans on all kinds of grids and a truncated file; return it and the folder of masks."""
    folder = tmp_path_factory.mktemp("scans")
    for number, kind in enumerate(GRIDS):
        shape, affine = grid(kind)
        distance = np.linalg.norm(world(shape, affine) - world(shape, affine).mean(axis=(0, 1, 2)), axis=-1)
        voxels = ((distance < 12) * 1000).astype((np.int16, np.float32, np.uint8)[number % 3])
        save(folder / f"{kind}.nii.gz", voxels, affine)
    save(folder / "one_slice.nii.gz", np.ones((40, 40, 1), np.float32), np.diag([1, 1, 5, 1]))
    whole = (folder / "oblique.nii.gz").read_bytes()
    (folder / "m_truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    output = folder / "masks"
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", folder, "--ckpt_dir", trained,
        "--output_dir", output, "--num_workers", 0, fails=True,
    )  # fmt: skip
    (folder / "stderr").write_text(done.stderr)
    return folder, output


class TestTraining:
    """What two epochs leave behind."""

    def test_every_epoch_has_one_plain_line(self, trained):
        lines = re.findall(r"^epoch .*$", (trained / "log").read_text(), flags=re.MULTILINE)
        pattern = r"epoch (\d)/2  loss \d\.\d{4}  lr \S+  [\d.]+ s  [\d.]+ samples/s  waiting for data [\d.]+ %"
        assert [re.fullmatch(pattern, line)[1] for line in lines] == ["1", "2"]
        assert "lr 1.00e-03" in lines[0]
        assert f"lr {1e-3 * 0.5**0.9:.2e}" in lines[1]  # poly 0.9

    def test_best_weights_are_a_plain_state_dict_with_their_settings(self, trained):
        weights = torch.load(trained / "model.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
        settings = json.loads((trained / "model.json").read_text())
        assert settings["labels"] == ["background", "low", "middle", "high"]
        assert (settings["size"], settings["patch_size"], settings["out_channels"]) == ("S", [32, 32, 32], 4)

    def test_tensorboard_has_scalars_and_a_picture(self, trained):
        events = EventAccumulator(str(trained / "training"), size_guidance={"images": 0}).Reload()
        assert {"train/loss", "train/learning_rate", "train/waiting_for_data", "validation/dice"} <= set(
            events.Tags()["scalars"]
        )
        assert [e.step for e in events.Scalars("train/loss")] == [1, 2]
        assert events.Images("validation/scan_label_prediction")[0].width > 300

    def test_large_kernels_start_from_small_ones_in_one_command(self, trained, phantom_dir, tmp_path):
        done = bundle(
            "training", *overlays("train"), "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path,
            "--output_dir", tmp_path, "--epochs", 1, *TINY, *COARSE,
            "--kernel_size", 5, "--init_weights", trained / "model.pt", "--learning_rate", 1e-30,
        )  # fmt: skip
        assert "model.pt: 210 tensors copied, 26 resized from kernel 3 to 5\n" in done.stdout
        small, large = (torch.load(folder / "model.pt", weights_only=True) for folder in (trained, tmp_path))
        for key, value in small.items():  # so slowly that everything stays as it started
            if value.shape != large[key].shape:
                value = torch.nn.functional.interpolate(value, size=(5, 5, 5), mode="trilinear")
            assert torch.allclose(large[key], value, rtol=0, atol=1e-25), key

    def test_without_deep_supervision_it_trains_and_says_so_to_inference(self, phantom_dir, tmp_path):
        bundle(
            "training", *overlays("train"), "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path,
            "--output_dir", tmp_path, "--epochs", 1, *TINY, *COARSE, "--deep_supervision", "False",
        )  # fmt: skip
        assert json.loads((tmp_path / "model.json").read_text())["deep_supervision"] is False
        assert not any(key.startswith("out_1") for key in torch.load(tmp_path / "model.pt", weights_only=True))
        scan = phantom_dir / "imagesTs" / "phantom_05.nii.gz"
        bundle(*overlays("inference"), "--dataset_dir", scan, "--ckpt_dir", tmp_path, "--output_dir", tmp_path)
        assert (tmp_path / "phantom_05_seg.nii.gz").is_file()

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, trained, phantom_dir, tmp_path):
        arguments = (
            "training", *overlays("train"), "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path,
            "--output_dir", tmp_path, "--epochs", 2, *TINY,
        )  # fmt: skip
        bundle(*arguments, "--train#trainer#max_epochs", 1)  # stops half way through its schedule
        assert torch.load(tmp_path / "training/checkpoint.pt", weights_only=True)["epoch"] == 1
        done = bundle(*arguments, "--resume", "True")
        assert "resuming after epoch 1 of 2" in done.stdout
        assert "epoch 1/2" not in done.stdout
        one, other = (torch.load(f / "training/checkpoint.pt", weights_only=True) for f in (trained, tmp_path))
        assert all(torch.equal(one["model"][k], other["model"][k]) for k in one["model"])
        assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]


class TestEvaluating:
    """Scores of the trained weights on the held-out case."""

    def test_every_case_and_label_is_scored_and_summarised(self, evaluated, phantom_dir):
        held_out = [case["case"] for case in Dataset(phantom_dir).validation_cases(0)]
        scored = rows(evaluated / "cases.csv")
        assert [(r["case"], r["label"]) for r in scored] == [
            (case, label) for case in held_out for label in ("low", "middle", "high")
        ]
        assert {"dice", "nsd", "hd95_mm"} <= set(scored[0])
        assert [r["label"] for r in rows(evaluated / "summary.csv")] == ["low", "middle", "high", "mean"]

    def test_scores_are_those_of_the_saved_masks_against_the_untouched_labels(self, evaluated, phantom_dir):
        for case in Dataset(phantom_dir).validation_cases(0):
            predicted = np.asarray(nib.load(evaluated / "predictions" / f"{case['case']}_seg.nii.gz").dataobj)
            wanted = np.asarray(nib.load(case["label"]).dataobj)
            scored = {r["label"]: r for r in rows(evaluated / "cases.csv") if r["case"] == case["case"]}
            for value, label in enumerate(("low", "middle", "high"), start=1):
                a, b = predicted == value, wanted == value
                assert float(scored[label]["dice"]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)

    def test_validation_while_training_gives_the_same_dice(self, evaluated, trained):
        logged = float(re.search(r"validation after epoch 2  Dice ([\d.]+)", (trained / "log").read_text())[1])
        mean = next(r for r in rows(evaluated / "summary.csv") if r["label"] == "mean")
        assert float(mean["dice"]) == pytest.approx(logged, abs=1e-3)


class TestInference:
    """Masks lie on the grid of their scan, whatever it is."""

    @pytest.mark.parametrize("name", [*GRIDS, "one_slice"])
    def test_mask_has_the_shape_affine_and_header_of_its_scan(self, name, masks):
        scan, mask = nib.load(masks[0] / f"{name}.nii.gz"), nib.load(masks[1] / f"{name}_seg.nii.gz")
        assert mask.shape == scan.shape
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)  # float32 in the header
        assert np.issubdtype(mask.get_data_dtype(), np.integer)
        for name in ("qform_code", "sform_code"):
            assert mask.header[name] == scan.header[name]
        np.testing.assert_array_equal(mask.get_qform(), scan.get_qform())
        assert mask.header.get_xyzt_units() == scan.header.get_xyzt_units()
        assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3}

    def test_a_bad_scan_is_listed_last_and_the_others_are_done(self, masks):
        stderr = (masks[0] / "stderr").read_text()
        assert "Traceback" not in stderr
        assert re.search(r"error: 1 of 7 scans could not be segmented:\n  .*m_truncated.nii.gz", stderr)
        assert len(list(masks[1].glob("*_seg.nii.gz"))) == 6

    def test_one_file_from_another_directory(self, trained, phantom_dir, tmp_path):
        scan = sorted((phantom_dir / "imagesTs").iterdir())[0]
        bundle(
            "--config_file", ROOT / "configs/inference.json", "--dataset_dir", scan, "--ckpt_dir", trained,
            "--output_dir", "masks", cwd=tmp_path,
        )  # fmt: skip
        written = {p.name for p in (tmp_path / "masks").iterdir()}
        assert written == {scan.name.replace(".nii", "_seg.nii"), "report.csv", "masks.json"}


class TestMonaiTools:
    """What MONAI and the model zoo do with a bundle, from another directory."""

    def run(self, code: str, bundle_copy: Path, cwd: Path) -> str:
        environment = {"PYTHONPATH": str(bundle_copy), "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def test_load_returns_the_network_with_its_weights(self, bundle_copy, tmp_path):
        code = f"""
import torch
from monai.bundle import load
network = load(name="{bundle_copy.name}", bundle_dir="{bundle_copy.parent}", workflow_type="inference", device="cpu")
weights = torch.load("{bundle_copy}/models/model.pt", weights_only=True)
assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
print(type(network).__name__, tuple(network.eval()(torch.zeros(1, 1, 32, 32, 32)).shape))
"""
        assert self.run(code, bundle_copy, tmp_path).endswith("MedNeXt (1, 4, 32, 32, 32)\n")

    def test_a_workflow_runs(self, bundle_copy, phantom_dir, tmp_path):
        code = f"""
from monai.bundle import create_workflow
workflow = create_workflow(
    config_file="{bundle_copy}/configs/inference.json", workflow_type="infer", dataset_dir="{phantom_dir}",
    output_dir="out",
)
workflow.run()
workflow.finalize()
"""
        self.run(code, bundle_copy, tmp_path)
        assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 2

    def test_network_fits_its_metadata_and_exports_to_torchscript(self, bundle_copy, shipped, tmp_path):
        bundle_copy = shutil.copytree(bundle_copy, tmp_path / "mednext")
        shutil.copytree(shipped, bundle_copy / "models", dirs_exist_ok=True)
        code = f"""
from monai.bundle import ckpt_export, verify_net_in_out
files = dict(meta_file="{bundle_copy}/configs/metadata.json", config_file="{bundle_copy}/configs/inference.json")
verify_net_in_out(net_id="network_def", device="cpu", **files)
ckpt_export("network_def", filepath="model.ts", ckpt_file="{bundle_copy}/models/model.pt", **files)
"""
        self.run(code, bundle_copy, tmp_path)
        scripted = torch.jit.load(tmp_path / "model.ts", map_location="cpu")
        assert scripted(torch.zeros(1, 1, 32, 40, 32)).shape == (1, 3, 32, 40, 32)


KILLED = {  # the second process ends itself before the second epoch, the first time that it is started
    "+imports": ["$import os", "$import ignite.engine as ignite"],
    "kill": "$lambda: os.kill(os.getpid(), 9) if (os.environ['RANK'], @attempt) == ('1', '0') else None",
    "attempt": "$os.environ['TORCHELASTIC_RESTART_COUNT']",
    "run": [
        "$@train#trainer.add_event_handler(ignite.Events.EPOCH_STARTED(once=2), @kill)",
        "$@train#trainer.run()",
    ],
}


def test_two_processes_train_one_network_also_when_one_is_killed_and_score_every_case_once(
    phantom_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/how-to/restarting.md
    summed = "sum(p.double().sum().item() for p in @network.parameters())"
    keep_sum = f"$open(@output_dir + '/sum' + str(dist.get_rank()), 'w').write(str({summed}))"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    (tmp_path / "killed.json").write_text(json.dumps(KILLED))
    configs = [*(f"configs/{name}.json" for name in ("train", "multi_gpu_train")), str(tmp_path / "killed.json")]
    done = bundle(
        "training", "--config_file", configs, "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path,
        "--output_dir", tmp_path, "--fold", "all", "--epochs", 2, *TINY, *COARSE, "--resume", "auto",
        "--finalize", [keep_sum, "$dist.destroy_process_group()"], launcher=(*launcher, "--max-restarts=1"),
    )  # fmt: skip
    assert (tmp_path / "sum0").read_text() == (tmp_path / "sum1").read_text() != ""
    for epoch in (1, 2):
        assert len(re.findall(rf"^epoch {epoch}/2", done.stdout, flags=re.MULTILINE)) == 1
    assert "resuming after epoch 1 of 2" in done.stdout
    assert not any(key.startswith("module.") for key in torch.load(tmp_path / "model.pt", weights_only=True))

    bundle(
        "evaluating", *overlays("train", "evaluate", "multi_gpu_evaluate"), "--dataset_dir", phantom_dir,
        "--ckpt_dir", tmp_path, "--output_dir", tmp_path, "--fold", "all", "--num_workers", 1, launcher=launcher,
    )  # fmt: skip
    scored = [(r["case"], r["label"]) for r in rows(tmp_path / "cases.csv")]
    assert scored == [(f"phantom_0{i}", label) for i in range(5) for label in ("low", "middle", "high")]


def with_values(phantom_dir: Path, folder: Path, values: np.ndarray, ignored: slice, **changes) -> Path:
    """Copy the phantom, with other `values` of its labels, the last of them in the planes `ignored`."""
    shutil.copytree(phantom_dir, folder)
    for path in (folder / "labelsTr").iterdir():
        image = nib.load(path)
        voxels = values[np.asarray(image.dataobj).astype(int)].astype(np.int16)
        voxels[ignored] = values[-1]
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, **changes}))
    return folder


def test_gaps_in_label_values_are_closed_inside_and_back_in_every_mask(phantom_dir, tmp_path):
    """As in BraTS, whose labels are 0, 1, 2, 4."""
    names = {"0": "background", "2": "low", "5": "middle", "300": "high"}
    values = np.array(list(map(int, names)))
    folder = with_values(phantom_dir, tmp_path / "data", values, slice(0), labels=names)
    common = ("--dataset_dir", folder, "--ckpt_dir", tmp_path / "models", "--output_dir", tmp_path / "out")
    bundle("training", *overlays("train"), *common, "--epochs", 1, *TINY, *COARSE, "--iterations", 4)
    assert json.loads((tmp_path / "models/model.json").read_text())["label_values"] == values.tolist()

    bundle("evaluating", *overlays("train", "evaluate"), *common, "--num_workers", 0)
    scored = {(row["case"], row["label"]): float(row["dice"]) for row in rows(tmp_path / "out/cases.csv")}
    for case in Dataset(folder).validation_cases(0):
        mask = np.asarray(nib.load(tmp_path / "out/predictions" / f"{case['case']}_seg.nii.gz").dataobj)
        truth = np.asarray(nib.load(case["label"]).dataobj)
        assert set(np.unique(mask)) <= set(values)
        for value, name in zip(values[1:], list(names.values())[1:], strict=True):
            both = 2 * ((mask == value) & (truth == value)).sum() / ((mask == value).sum() + (truth == value).sum())
            assert scored[case["case"], name] == pytest.approx(both, abs=1e-4)

    scan = folder / "imagesTs/phantom_05.nii.gz"
    bundle(*overlays("inference"), *common[2:], "--dataset_dir", scan)
    assert set(np.unique(nib.load(tmp_path / "out/phantom_05_seg.nii.gz").dataobj)) <= set(values)


def test_regions_and_voxels_to_ignore_pass_through_training_scoring_and_inference(phantom_dir, tmp_path):
    """As in BraTS: labels 0, 1, 2, 4, trained and scored as three overlapping regions; 9 was not annotated."""
    regions = {"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}
    folder = with_values(
        phantom_dir, tmp_path / "data", np.array([0, 1, 2, 4, 9]), slice(5),
        labels={"background": 0, **regions, "ignore": 9}, regions_class_order=[2, 1, 4],
    )  # fmt: skip
    common = ("--dataset_dir", folder, "--ckpt_dir", tmp_path / "models", "--output_dir", tmp_path / "out")
    bundle("training", *overlays("train"), *common, "--epochs", 1, *TINY, *COARSE, "--iterations", 12)
    settings = json.loads((tmp_path / "models/model.json").read_text())
    assert (settings["out_channels"], settings["regions_class_order"], settings["eval_classes"]) == (
        3,
        [2, 1, 4],
        regions,
    )

    bundle("evaluating", *overlays("train", "evaluate"), *common, "--num_workers", 0)
    scored = rows(tmp_path / "out/cases.csv")
    cases = Dataset(folder).validation_cases(0)
    assert [(row["case"], row["label"]) for row in scored] == [(c["case"], r) for c in cases for r in regions]
    for case in cases:
        mask = np.asarray(nib.load(tmp_path / "out/predictions" / f"{case['case']}_seg.nii.gz").dataobj)
        truth = np.asarray(nib.load(case["label"]).dataobj)
        assert set(np.unique(mask)) <= {0, 1, 2, 4}
        assert np.isin(mask, regions["whole"]).any()
        for name, members in regions.items():
            a, b = (np.isin(volume, members) & (truth != 9) for volume in (mask, truth))
            row = next(r for r in scored if (r["case"], r["label"]) == (case["case"], name))
            assert float(row["dice"]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)

    scan = next(c["image"] for c in cases)
    bundle(*overlays("inference"), *common[2:], "--dataset_dir", scan)
    name = f"{cases[0]['case']}_seg.nii.gz"
    masks = [np.asarray(nib.load(f / name).dataobj) for f in (tmp_path / "out", tmp_path / "out/predictions")]
    assert np.array_equal(*masks)


def test_slices_train_a_2d_network_and_come_back_as_volumes(phantom_dir, tmp_path):
    common = ("--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path, "--output_dir", tmp_path)
    flat = ("--patch_size", "[32,32,1]", "--batch_size", 3, "--iterations", 2, "--num_workers", 0, "--epochs", 1)
    bundle("training", *overlays("train", "recipes/2d"), *common, *flat, *COARSE)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert weights["stem.weight"].ndim == 4
    assert json.loads((tmp_path / "model.json").read_text())["dim"] == "2d"
    bundle("evaluating", *overlays("train", "evaluate"), *common, "--num_workers", 0)
    assert len(rows(tmp_path / "cases.csv")) == 3
    scan = phantom_dir / "imagesTs" / "phantom_05.nii.gz"
    bundle(*overlays("inference"), *common[2:], "--dataset_dir", scan)
    mask, image = nib.load(tmp_path / "phantom_05_seg.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)


def test_a_training_parses_dataset_json_once_and_measures_each_case_once(phantom_dir, tmp_path, monkeypatch):
    opened, measured, read_text = [], [], Path.read_text
    measure = fingerprint_file.fingerprint_case

    def counted(path: Path, *args, **kwargs) -> str:
        opened.append(path.name)
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    monkeypatch.setattr(
        fingerprint_file, "fingerprint_case", lambda case, *args: measured.append(case["case"]) or measure(case, *args)
    )
    common = ("--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path, "--output_dir", tmp_path, *TINY, *COARSE)
    bundle("training", *overlays("train"), *common, "--epochs", 1, "--iterations", 1)
    assert opened.count("dataset.json") == 1
    assert sorted(measured) == [f"phantom_0{number}" for number in range(5)]
    bundle("evaluating", *overlays("train", "evaluate"), *common)
    assert len(measured) == 5  # what scoring needs to know was remembered


def test_fine_tuning_keeps_a_frozen_encoder_and_learns_new_heads(trained, phantom_dir, tmp_path):
    bundle(
        "training", *overlays("train"), "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path, "--output_dir", tmp_path,
        *TINY, *COARSE, "--epochs", 1, "--init_weights", trained / "model.pt", "--skip_heads", "True",
        "--freeze", "encoder", "--layer_decay", 0.5, "--warmup_epochs", 1,
    )  # fmt: skip
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (trained, tmp_path))
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert {"out_0", "dec_block_0", "bottleneck"} <= changed
    assert not any(name.startswith(("stem", "enc_block", "down")) for name in changed)
