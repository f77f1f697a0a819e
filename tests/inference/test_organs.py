"""Every mask is said in organs: their volumes, voxels and mean intensities, in the tables and in the record."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import bundle, save
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents

from scripts.data.datasets import Dataset
from scripts.inference.organs import ORGANS, MeasureOrgans
from scripts.inference.out_of_distribution import UNLIKE, CompareWithTrainingd
from scripts.utils.files import read_table

CLASSES = {"liver": [1, 2], "tumor": [2], "spleen": [5]}


def measured(files, mask, affine, case="a"):
    """Measure a mask as the evaluator does."""
    meta = {"case": case, "filename_or_obj": str(files[0]), "measured": {}}
    pred = MetaTensor(torch.from_numpy(mask[None]), affine=torch.from_numpy(affine), meta=meta)
    pred = CompareWithTrainingd("pred", None, CLASSES)({"pred": pred})["pred"]
    engine = Engine(lambda engine, batch: None)
    engine.register_events(*IterationEvents)
    MeasureOrgans([{"case": "a", "image": [str(file) for file in files]}], CLASSES).attach(engine)
    engine.state.output = [{"pred": pred}]
    engine.fire_event(IterationEvents.MODEL_COMPLETED)
    return pred.meta[ORGANS]


@pytest.mark.parametrize("kind", ["one", "scaled", "4d", "a file a channel"])
def test_organs_have_volume_voxels_and_mean_intensity_of_each_channel(kind, tmp_path):
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 1.0, 2.5, 1.0])  # 5 mm^3
    stored = rng.integers(-1000, 2000, (9, 8, 20, 2)).astype(np.int16)
    mask = rng.integers(0, 3, stored.shape[:3]).astype(np.uint8)
    values, files = stored.astype(float), [tmp_path / "a_0000.nii.gz"]
    if kind == "4d":
        save(files[0], stored, affine)
    elif kind == "a file a channel":
        files.append(tmp_path / "a_0001.nii.gz")
        for channel, file in enumerate(files):
            save(file, stored[..., channel], affine)
    else:
        values = values[..., :1]
        image = nib.Nifti1Image(stored[..., 0], affine)
        if kind == "scaled":
            image.header.set_slope_inter(0.5, -1024)
            values = values * 0.5 - 1024
        nib.save(image, files[0])
    found = measured(files, mask, affine)
    assert list(found) == list(CLASSES)
    for name, group in CLASSES.items():
        there = np.isin(mask, group)
        assert found[name]["voxels"] == there.sum()
        assert found[name]["ml"] == pytest.approx(there.sum() * 5 / 1000, abs=1e-4)
        means = [values[there, c].mean() for c in range(values.shape[-1])] if there.any() else [None] * values.shape[-1]
        assert found[name]["mean_intensity"] == (pytest.approx(means, abs=1e-3) if there.any() else means)


def test_the_command_says_organs_in_table_and_record(trained, phantom_dir, tmp_path):
    scan, masks = Dataset(phantom_dir).cases[0]["image"], tmp_path / "masks"
    names = Dataset(phantom_dir).labels.names[1:]
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", scan, "--ckpt_dir", trained,
        "--output_dir", masks, "--num_workers", 0,
    )  # fmt: skip
    (mask,) = masks.glob("*_seg.nii.gz")
    voxels, values = (np.asanyarray(nib.load(file).dataobj) for file in (mask, scan))
    (row,) = read_table(masks / "report.csv")
    record = json.loads((masks / "masks.json").read_text())
    (entry,) = record["masks"].values()
    assert list(entry["organs"]) == names
    for value, name in enumerate(names, 1):
        organ, count = entry["organs"][name], (voxels == value).sum()
        assert organ["voxels"] == int(row[f"voxels of {name}"]) == count
        assert organ["ml"] == float(row[f"volume of {name} (ml)"])
        (mean,) = organ["mean_intensity"]
        assert row[f"mean intensity of {name} in channel 0"] == ("" if mean is None else str(mean))
        assert mean == (pytest.approx(values[voxels == value].mean(), rel=1e-5) if count else None)
    assert "volume of label" not in (done.stdout + done.stderr + row[UNLIKE])
    assert any(f"volume of {name}" in row[UNLIKE] for name in names)  # after four iterations

    tools, maker = record["made_with"][entry["made_with"]], record["made_by"][entry["made_by"]]
    assert {"Python", "PyTorch", "MONAI", "MedNeXt segmentation", "device", "system"} <= set(tools)
    assert all(len(found) == 64 for found in maker["weights"].values())
    assert entry["seconds"] > 0
    assert 0.1 < entry["peak_ram_gb"] < 100


def test_a_scan_that_is_gone_by_then_is_one_that_failed(trained, phantom_dir, tmp_path, monkeypatch):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    image = nib.load(Dataset(phantom_dir).cases[0]["image"])
    for name in ("a", "b"):
        save(scans / f"{name}.nii.gz", np.asanyarray(image.dataobj), image.affine)
    kept = MeasureOrgans.__call__

    def gone(self, engine):
        if engine.state.iteration == 1:
            (scans / "a.nii.gz").unlink()
        kept(self, engine)

    monkeypatch.setattr(MeasureOrgans, "__call__", gone)
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", scans, "--ckpt_dir", trained,
        "--output_dir", masks, "--num_workers", 0, fails=True,
    )  # fmt: skip
    assert "1 of 2 scans could not be segmented" in done.stderr
    assert f"{scans / 'a.nii.gz'} not found" in done.stderr
    assert [row["case"] for row in read_table(masks / "report.csv")] == ["b"]
