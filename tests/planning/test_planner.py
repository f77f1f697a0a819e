"""A data set in, the control panel's constants out: nnU-Net's rules on MedNeXt's grid."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, SHARED, TINY, bundle, overlays

from scripts.data.datasets import Dataset
from scripts.planning.fingerprint import QUANTILES, dataset_fingerprint
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.planning.memory import Network, largest_batch
from scripts.planning.planner import intensity_schemes, plan_training
from scripts.planning.spacing import target_patch_size
from scripts.utils.errors import UserError


def record(spacing=(1.0, 1.0, 1.0), shape=(200, 200, 200), cropped=None, values=None) -> dict:
    values = np.linspace(-200.0, 400.0, 1000) if values is None else values
    moments = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    return {
        "file": "case.nii.gz",
        "channels": [moments],
        "shape": list(shape),
        "spacing": list(spacing),
        "cropped": list(cropped or shape),
        "labels": [100] * 4,
        "foreground": [{**moments, "quantiles": np.quantile(values, QUANTILES).tolist()}],
    }


def test_pooled_intensities_are_those_of_all_voxels_where_cases_have_equally_many():
    generator = np.random.default_rng(0)
    groups = [generator.normal(mean, 20, 5000) for mean in (0, 60, 200)]
    found = dataset_fingerprint([record(values=v) for v in groups])["foreground_intensity_properties_per_channel"]["0"]
    everything = np.concatenate(groups)
    assert found["mean"] == pytest.approx(everything.mean())
    assert found["std"] == pytest.approx(everything.std())
    assert (found["min"], found["max"]) == (everything.min(), everything.max())
    for name, share in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
        low, high = np.percentile(everything, [max(share - 0.25, 0), min(share + 0.25, 100)])
        assert low <= found[name] <= high  # half a step of the quantiles that are kept


@pytest.mark.parametrize(
    ("names", "relative", "expected"),
    [
        (["MRI"], 1.0, "zscore"),
        (["FLAIR", "T1"], 0.5, "zscore_nonzero"),  # skull-stripped
        (["noNorm"], 1.0, "none"),
        (["MRI", "rgb_to_0_1"], 1.0, ["zscore", "rgb_to_0_1"]),
        (["CT"], 0.5, {"clip": [-197.0, 397.0], "mean": 100.0, "std": 173.3782}),
    ],
)
def test_intensity_follows_the_channels_name(names, relative, expected):
    values = dataset_fingerprint([record()])["foreground_intensity_properties_per_channel"]["0"]
    found = {
        "median_relative_size_after_cropping": relative,
        "foreground_intensity_properties_per_channel": {str(i): values for i in range(len(names))},
    }
    scheme = intensity_schemes(names, found)
    if isinstance(expected, dict):
        assert scheme["clip"] == pytest.approx(expected["clip"], abs=0.1)
        assert (scheme["mean"], scheme["std"]) == pytest.approx((expected["mean"], expected["std"]), rel=1e-3)
    else:
        assert scheme == expected


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((300, 300, 300), (1, 1, 1), [128, 128, 128]),  # as published
        ((36, 50, 35), (1, 1, 1), [48, 64, 48]),  # the hippocampus: the median case, in multiples of 16
        ((300, 300, 40), (1, 1, 1), [128, 128, 48]),
        ((300, 300, 40), (0.8, 0.8, 5.0), [240, 240, 32]),  # 128 * 1.47 / spacing, 1.47 being the mean edge
        ((12, 10, 9), (1, 1, 1), [32, 16, 16]),  # the network needs two voxels at its coarsest level
    ],
)
def test_patches_are_128_or_the_median_case(shape, spacing, expected):
    assert target_patch_size(shape, spacing) == expected


def test_a_memory_budget_sets_batch_and_recomputing():
    patch = [64, 64, 64]
    few, style = largest_batch(patch, Network(1, 3, "S"), 5.0)
    assert (few, style) == (2, None)
    more, style = largest_batch(patch, Network(1, 3, "S"), 20.0)
    assert more > 2 * few
    assert style is None
    assert largest_batch(patch, Network(1, 3, "S"), 3.0)[1] == "expansion"
    assert largest_batch(patch, Network(1, 3, "L"), 3.0)[1] == "block"
    with pytest.raises(
        UserError, match=r"memory_gb is 0.5; MedNeXt S needs [\d.]+ GB for two patches of \[64, 64, 64\]"
    ):
        largest_batch(patch, Network(1, 3, "S"), 0.5)


def test_large_cases_get_batch_dice_and_thick_voxels_no_tilt(phantom_dir):
    large = plan_training(Dataset(phantom_dir), [record(shape=(512, 512, 400))])
    assert large["train#batch_dice"] is True
    assert large["train#rotate_range"] == [0.5236] * 3
    small = plan_training(Dataset(phantom_dir), [record(shape=(128, 128, 128))])
    assert small["train#batch_dice"] is False
    thick = plan_training(Dataset(phantom_dir), [record((1.0, 1.0, 5.0), (300, 300, 40))], spacing="median")
    assert thick["train#rotate_range"] == [0.0, 0.0, 3.1416]
    assert not {"mirror_axes", "train#rare_label_share"} & thick.keys()
    assert plan_training(Dataset(phantom_dir), [record(cropped=(100, 150, 200))])["crop_to_nonzero"] is True


class TestCommand:
    """`run planning`, and what it is for."""

    @pytest.fixture(scope="class")
    @classmethod
    def planned(cls, phantom_dir, tmp_path_factory):
        folder = tmp_path_factory.mktemp("plan")
        cls.run(phantom_dir, folder)
        return folder

    @staticmethod
    def run(dataset_dir, folder, *arguments, fails=False):
        return bundle(
            "planning", "--config_file", "configs/plan.json", "--dataset_dir", dataset_dir, "--output",
            folder / "plan.json", "--output_dir", folder, *arguments, fails=fails,
        )  # fmt: skip

    def test_it_writes_an_overlay_a_fingerprint_and_a_page(self, planned, phantom_dir):
        overlay = json.loads((planned / "plan.json").read_text())
        panel = json.loads((ROOT / "configs/train.json").read_text())
        assert {key.split("#")[0] for key in overlay} <= panel.keys()
        assert overlay["patch_size"] == [48, 48, 48]
        assert overlay["checks#planned_for"]["labels"] == ["background", "low", "middle", "high"]
        assert overlay["spacing"] == [1.0, 1.0, 1.0]
        assert {"spacing", "patch_size", "intensity", "batch_dice"} <= overlay["checks#planned_for"]["because"].keys()
        fingerprint = json.loads((planned / "fingerprint.json").read_text())
        assert len(fingerprint["spacings"]) == len(Dataset(phantom_dir).cases)
        assert (planned / "fingerprint.png").read_bytes().startswith(b"\x89PNG")

    def test_training_follows_it_and_inference_follows_the_training(self, planned, phantom_dir, tmp_path):
        overlay = planned / "plan.json"
        changed = json.loads(overlay.read_text()) | {"intensity": {"clip": [0, 900], "mean": 400.0, "std": 200.0}}
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        bundle(
            "training", "--config_file", f"['configs/train.json','{tmp_path}/changed.json']",
            "--dataset_dir", phantom_dir, "--ckpt_dir", tmp_path, "--output_dir", tmp_path,
            "--epochs", 1, *TINY, "--crop_to_nonzero", "True",
        )  # fmt: skip
        settings = json.loads((tmp_path / "model.json").read_text())
        assert settings["intensity"] == changed["intensity"]
        assert settings["crop_to_nonzero"] is True
        scan = phantom_dir / "imagesTs/phantom_05.nii.gz"
        bundle(*overlays("inference"), "--dataset_dir", scan, "--ckpt_dir", tmp_path, "--output_dir", tmp_path)
        assert (tmp_path / "phantom_05_seg.nii.gz").is_file()

    def test_another_plan_is_not_overwritten(self, planned, phantom_dir):
        before = (planned / "plan.json").read_bytes()
        self.run(phantom_dir, planned)  # the same one
        done = self.run(phantom_dir, planned, "--spacing", "[2,2,2]", fails=True)
        assert done.stderr.strip().endswith("plan.json exists and is another plan; move it, or give another --output.")
        assert (planned / "plan.json").read_bytes() == before

    def test_a_plan_of_another_data_set_is_refused(self, planned, phantom_dir, tmp_path):
        folder = tmp_path / "data"
        shutil.copytree(phantom_dir, folder)
        description = json.loads((folder / "dataset.json").read_text())
        labels = {"0": "background", "1": "liver", "2": "middle", "3": "high"}
        (folder / "dataset.json").write_text(json.dumps({**description, "labels": labels}))
        done = bundle(
            "training", "--config_file", f"['configs/train.json','{planned}/plan.json']", "--dataset_dir", folder,
            "--ckpt_dir", tmp_path, "--output_dir", tmp_path, *TINY, fails=True,
        )  # fmt: skip
        assert "error: the plan is for the labels ['background', 'low'" in done.stderr
        assert "the data set has ['background', 'liver'" in done.stderr

    def test_bad_cases_are_left_out_and_none_at_all_is_an_error(self, phantom_dir, tmp_path):
        folder = tmp_path / "data"
        shutil.copytree(phantom_dir, folder)
        (folder / "imagesTr/phantom_01.nii.gz").write_bytes(b"no")
        done = self.run(folder, tmp_path / "some")
        assert "left out: " in done.stdout
        assert "4 cases: " in done.stdout
        for path in (folder / "imagesTr").iterdir():
            path.write_bytes(b"no")
        assert "none of the 5 cases" in self.run(folder, tmp_path / "none", fails=True).stderr


@pytest.mark.skipif(not (SHARED / "Task04_Hippocampus").is_dir(), reason="needs the Decathlon's Task04_Hippocampus")
def test_the_hippocampus_is_planned_as_its_recipe_says(tmp_path):
    data = Dataset(SHARED / "Task04_Hippocampus")
    overlay = plan_training(data, fingerprint_cases(data.cases, 1, data.labels, str(tmp_path / "memory.json")))
    recipe = json.loads((ROOT / "configs/recipes/hippocampus.json").read_text())
    assert overlay["patch_size"] == recipe["patch_size"]
    assert not {"mirror_axes", "train#rare_label_share"} & overlay.keys()
    assert overlay["train#rotate_range"] == [0.5236] * 3
    assert (overlay["intensity"], overlay["crop_to_nonzero"], overlay["train#batch_dice"]) == ("zscore", False, False)
