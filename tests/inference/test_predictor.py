"""From Python comes what the command writes, without a file in between."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import GRIDS, bundle, grid, save, save_without_spacing, world

from scripts.inference.predictor import Predictor, in_memory
from scripts.utils.errors import UserError

COARSE = {"spacing": [2.0, 2.0, 2.0], "patch_size": [32, 16, 16]}  # quick, and still several windows
DISK = {"open", "os.mkdir", "os.rename"}  # Python's audit events


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    return Predictor.load(trained / "model.pt", **COARSE)


@pytest.fixture(scope="module")
def scans(phantom_dir, tmp_path_factory) -> Path:
    """Save a phantom scan, as stored and on all kinds of grids, in several types of numbers."""
    folder = tmp_path_factory.mktemp("scans")
    shutil.copy(phantom_dir / "imagesTs/phantom_05.nii.gz", folder)
    for number, kind in enumerate(GRIDS):
        shape, affine = grid(kind)
        where = world(shape, affine)
        bumps = np.sin(where / 4).sum(axis=-1) * 300 + 500
        save(folder / f"{kind}.nii.gz", bumps.astype((np.int16, np.float32, np.uint8)[number % 3]), affine)
    image = nib.Nifti1Image(np.arange(40 * 36 * 20, dtype=np.int16).reshape(40, 36, 20) % 700, grid("oblique")[1])
    image.header.set_slope_inter(0.25, -100)
    nib.save(image, folder / "scaled.nii.gz")
    save(folder / "one_slice.nii.gz", (bumps[:, :, :1] * 3).astype(np.float32), np.diag([1, 1, 5, 1]))
    save(folder / "one_channel.nii.gz", bumps.astype(np.float32)[..., None], affine)
    return folder


@pytest.fixture(scope="module")
def written(trained, scans, tmp_path_factory) -> Path:
    """Write the masks of them by the command."""
    folder = tmp_path_factory.mktemp("written")
    bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", scans, "--ckpt_dir", trained,
        "--output_dir", folder, "--num_workers", 0, *(a for k, v in COARSE.items() for a in (f"--{k}", v)),
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["phantom_05", *GRIDS, "scaled", "one_slice", "one_channel"])
def test_files_images_and_arrays_give_the_voxels_that_the_command_writes(name, predictor, scans, written):
    scan, mask = nib.load(scans / f"{name}.nii.gz"), nib.load(written / f"{name}_seg.nii.gz")
    expected = np.asarray(mask.dataobj)
    assert len(np.unique(expected)) > 1
    array = np.moveaxis(scan.get_fdata(), -1, 0) if scan.ndim == 4 else scan.get_fdata()
    for labels in (predictor(scans / f"{name}.nii.gz"), predictor(scan), predictor(array, scan.affine)):
        assert type(labels) is np.ndarray
        assert labels.dtype == expected.dtype
        np.testing.assert_array_equal(labels, expected)


def test_the_array_stays_as_it_was(predictor, scans):
    scan = nib.load(scans / "straight.nii.gz")
    voxels = np.array(scan.dataobj, dtype=np.float32)
    before = voxels.copy()
    predictor(voxels, scan.affine)
    np.testing.assert_array_equal(voxels, before)


def test_nothing_is_read_or_written_while_an_array_is_segmented(predictor, scans):
    scan = nib.load(scans / "straight.nii.gz")
    voxels, touched, watching = scan.get_fdata(), [], [False]
    sys.addaudithook(lambda event, given: touched.append(given[0]) if watching[0] and event in DISK else None)
    watching[0] = True
    predictor(voxels, scan.affine)
    watching[0] = False
    assert not touched
    watching[0] = True
    predictor(scans / "straight.nii.gz")
    watching[0] = False
    assert str(scans / "straight.nii.gz") in map(str, touched)  # it would have been seen


def test_settings_are_those_of_the_control_panel(trained, scans, predictor):
    scan = nib.load(scans / "oblique.nii.gz")
    coarse = Predictor.load(trained / "model.pt", device="cpu", **{**COARSE, "spacing": [2.5, 2.5, 2.5]}, overlap=0.25)
    assert coarse.inferer.overlap == 0.25
    case = coarse.from_memory({"image": in_memory(scan)})
    np.testing.assert_allclose(case["image"].pixdim, 2.5, rtol=1e-6)
    assert (coarse(scan) != predictor(scan)).any()


def test_an_ensemble_takes_the_networks_place(trained, predictor, tmp_path):
    for name in ("model.pt", "model.json"):
        shutil.copy(trained / name, tmp_path)
    other = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({key: value * 0.5 for key, value in other.items()}, tmp_path / "other.pt")
    joined = Predictor.load(
        tmp_path / "model.pt",
        **COARSE,
        **{
            "evaluator#network": {
                "_target_": "scripts.inference.ensemble.join",
                "network": "@network",
                "weights": "@model_file",
                "ensemble": [str(tmp_path / "other.pt")],
                "activation": "softmax",
            },
            "inferer#activation": "softmax",
        },
    )
    two = Predictor.load(tmp_path / "other.pt", **COARSE)
    image = torch.randn(1, 1, 40, 16, 16)
    with torch.inference_mode():
        mean = (joined.inferer(image, predictor.network) + joined.inferer(image, two.network)) / 2
        torch.testing.assert_close(joined.inferer(image, joined.network), mean, rtol=1e-4, atol=1e-6)


class TestBadInput:
    """One sentence, as from the command."""

    @pytest.mark.parametrize("affine", [None, [1, 1, 2], np.diag([1, 0, 1, 1]), np.full((4, 4), np.nan)])
    def test_an_array_without_a_place_says_what_to_give(self, affine, predictor):
        with pytest.raises(UserError, match=re.escape("expected 4 x 4 numbers that span a volume: give that of its")):
            predictor(np.zeros((20, 20, 20)), affine)

    @pytest.mark.parametrize(
        ("shape", "said"),
        [
            ((2, 20, 20, 20), "image has 2 channels; the network takes 1"),
            ((20, 20), "image has 2 spatial axes; expected a 3D scan"),
            ((1, 2, 20, 20, 20), "image has 4 spatial axes; expected a 3D scan"),
        ],
    )
    def test_another_shape_is_named(self, shape, said, predictor):
        with pytest.raises(UserError, match=said):
            predictor(np.zeros(shape), np.eye(4))

    def test_voxels_that_are_no_numbers_are_counted(self, predictor):
        voxels = np.zeros((20, 20, 20))
        voxels[:3, 0, 0] = np.nan
        with pytest.raises(UserError, match="image has 3 NaN or infinite voxels"):
            predictor(voxels, np.eye(4))

    def test_files_are_named(self, predictor, scans, tmp_path):
        whole = (scans / "oblique.nii.gz").read_bytes()
        (tmp_path / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"half.nii.gz .\d+ bytes. is not a complete NIfTI file"):
            predictor(tmp_path / "half.nii.gz")
        with pytest.raises(UserError, match="flat.nii has a voxel spacing of 1 x 1 x 0 mm"):
            predictor(save_without_spacing(tmp_path / "flat.nii"))
        with pytest.raises(UserError, match=r"missing.nii.gz does not exist"):
            predictor("missing.nii.gz")
        with pytest.raises(UserError, match=r"holds 9 scans; give one of its files"):
            predictor(scans)

    def test_weights_and_settings_are_named(self, trained, tmp_path):
        with pytest.raises(UserError, match="model.pt not found; train first"):
            Predictor.load(tmp_path / "model.pt")
        with pytest.raises(UserError, match="4 classes, but the network is .* 2 classes"):
            Predictor.load(trained / "model.pt", out_channels=2)
        with pytest.raises(UserError, match="--overlaps is no setting; did you mean --overlap"):
            Predictor.load(trained / "model.pt", overlaps=0.25)
        (tmp_path / "model.json").write_text("{")
        with pytest.raises(UserError, match="model.json is not valid JSON"):
            Predictor.load(tmp_path / "model.pt")
