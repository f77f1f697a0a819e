"""A coarse network finds the box, and what is segmented inside is what segmenting the whole scan gives there."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import GRIDS, grid, world
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation

from scripts.inference.coarse_first import SPECK_VOXELS, FindBoxd, box_of, coarse_weights, with_margin
from scripts.inference.predictor import Predictor
from scripts.mednext import create_mednext
from scripts.preprocessing.intensity import RINGING, SCALES, Intensityd, scales_of_whole
from scripts.preprocessing.part import PART
from scripts.preprocessing.resampling import GridSpacingd
from scripts.utils.errors import UserError
from scripts.weights.model_settings import load_model_settings, write_model_settings

EDGES = np.array([0.8, 0.8, 1.0])


class Bright(torch.nn.Module):
    """Labels what is brighter than three standard deviations 1, and what is darker than nine 2."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), 50 * (x - 3), -50 * (x + 9)], dim=1)


def to_grid(spacing):
    return GridSpacingd(
        "image", spacing, mode=3, padding_mode="nearest", scale_extent=True, align_corners=False, dtype="float32"
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a network of 1 mm and of one of 3 mm, which tests put others in the place of."""
    folder = tmp_path_factory.mktemp("weights")
    network = create_mednext(1, 3, "S", 3, True)
    for file, edge in ((folder / "model.pt", 1.0), (coarse_weights(folder / "model.pt"), 3.0)):
        file.parent.mkdir(exist_ok=True)
        write_model_settings(file, {"out_channels": 3, "patch_size": [32, 32, 32], "spacing": [edge] * 3})
        torch.save(network.state_dict(), file)
    return folder / "model.pt"


def predictor(weights, fast, **settings):
    made = Predictor.load(weights, device="cpu", cpu_precision="float32", fast=fast, **settings)
    made.network = Bright()
    for step in made.from_file.transforms:
        if isinstance(step, FindBoxd):
            step.coarse.network = Bright()
    return made


@pytest.fixture(scope="module")
def fast(weights):
    return predictor(weights, True)


@pytest.fixture(scope="module")
def whole(weights):
    return predictor(weights, False)


def blobs(*centres, shape=(150, 40, 32), radius=7.0):
    """Noise about 100 with bright balls, by their centres in mm; 0 at one end."""
    voxels = np.random.default_rng(0).normal(100, 20, shape)
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * EDGES
    for centre in centres:
        voxels[np.linalg.norm(at - centre, axis=-1) < radius] = 1000
    voxels[140:] = 0
    return voxels.astype(np.float32), np.diag([*EDGES, 1])


TWO = ((30, 15, 15), (50, 18, 17))


def test_the_mask_is_that_of_the_whole_scan(fast, whole):
    found, expected = fast(*blobs(*TWO)), whole(*blobs(*TWO))
    assert (expected > 0).sum() > 2000
    assert (found != expected).sum() < 0.01 * (expected > 0).sum()  # mean and deviation are measured more coarsely
    assert not found[100:].any()


def test_normalising_within_non_zero_voxels_is_that_of_the_whole_scan():
    image = MetaTensor(torch.from_numpy(blobs(*TWO)[0][None]), affine=torch.diag(torch.tensor([*EDGES, 1.0])).double())
    steps = Compose(
        [
            Intensityd("image", "zscore_nonzero", "native"),
            to_grid([1.0] * 3),
            Intensityd("image", "zscore_nonzero", "resampled"),
        ]
    )
    expected = steps({"image": image})["image"]
    image.meta[PART] = [[30, 0, 0], [80, 40, 32]]
    found = steps({"image": image})["image"]
    start = int(torch.linalg.solve(expected.affine, found.affine)[0, 3].round())
    expected = expected[:, start : start + found.shape[1]]
    assert (found.as_tensor() - expected.as_tensor()).abs().max() <= RINGING  # where a hole is cut open by the box


def test_probabilities_outside_the_box_are_the_background_s(fast, whole):
    found, expected = fast.probabilities(*blobs(*TWO)), whole.probabilities(*blobs(*TWO))
    assert (found[0, 100:] == 1).all()
    assert not found[1:, 100:].any()
    assert np.abs(found - expected)[:, :90].mean() < 1e-3


def test_a_scan_without_anything_is_segmented_whole_with_a_warning(fast, whole, caplog):
    scan = blobs(radius=0)
    with caplog.at_level(logging.WARNING, "mednext"):
        mask = fast(*scan)
    assert "the image: the coarse network finds nothing; the whole scan is segmented." in caplog.text
    assert (mask == whole(*scan)).all()


def test_without_coarse_weights_the_command_that_makes_them_is_named(weights, tmp_path):
    for file in (weights, weights.with_suffix(".json")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"coarse/model.pt not found.*configs/fast.json.*--ckpt_dir") as e:
        FindBoxd("image", tmp_path / "model.pt", load_model_settings(tmp_path / "model.pt"), [32, 32, 32])
    assert f"--ckpt_dir {tmp_path} " in str(e.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("crop_to_nonzero", True), ("intensity", "rescale_to_0_1"), ("labels", ["a", "b", "c"])],
)
def test_coarse_weights_of_something_else_are_refused(weights, name, value):
    model = load_model_settings(weights, **{name: value})
    with pytest.raises(UserError, match=rf"coarse/model.pt was trained with {name} .*train both by one command"):
        FindBoxd("image", weights, model, [32, 32, 32], device="cpu")


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("spacing", [1.0, 2.3])
def test_a_part_has_the_voxels_of_the_whole(kind, spacing):
    shape, affine = grid(kind)
    voxels = torch.from_numpy(np.random.default_rng(0).random((1, *shape), np.float32))
    image = Orientation("RAS", labels=None)(MetaTensor(voxels, affine=torch.from_numpy(affine)))
    whole = to_grid([spacing] * 3)({"image": image})["image"]
    size = np.array(image.shape[1:])
    image.meta[PART] = [(size // 4).tolist(), (size - size // 3).tolist()]
    part = to_grid([spacing] * 3)({"image": image})["image"]
    start = torch.linalg.solve(whole.affine, part.affine)[:3, 3].round().int().tolist()
    there = whole[(slice(None), *(slice(a, a + n) for a, n in zip(start, part.shape[1:], strict=True)))]
    assert there.shape == part.shape
    assert (part.as_tensor() - there.as_tensor()).abs().max() < 2e-5
    assert PART not in part.meta
    assert PART in image.meta
    corners = np.array([image.meta[PART][0], np.array(image.meta[PART][1]) - 1])
    inside = torch.linalg.solve(part.affine, image.affine)[:3].numpy() @ np.c_[corners, [1, 1]].T
    assert (inside > -1).all()
    assert (part.shape[1:] > inside.T).all()  # all of it, to a voxel


def test_a_part_on_its_own_grid_is_cut_out():
    image = MetaTensor(torch.rand(2, 20, 21, 22), affine=torch.eye(4, dtype=torch.float64))
    image.meta[PART] = [[2, 3, 4], [9, 12, 22]]
    part = to_grid([1.0] * 3)({"image": image})["image"]
    assert torch.equal(part.as_tensor(), image.as_tensor()[:, 2:9, 3:12, 4:22])
    assert part.affine[:3, 3].tolist() == [2, 3, 4]


@pytest.mark.parametrize("unit", [1.0, 1e-25, 1e25])
def test_a_part_is_normalised_as_the_whole(unit):
    whole = MetaTensor(torch.randn(3, 24, 24, 24) * torch.tensor([1, 5, 9]).view(-1, 1, 1, 1) * unit)
    intensity = ["zscore", "rescale_to_0_1", {"clip": [-1, 1], "mean": 0, "std": 2}]
    expected = Intensityd("image", intensity, "resampled")({"image": whole})["image"][:, :8]
    part = whole[:, :8].clone()
    part.meta[SCALES] = scales_of_whole(whole, whole, intensity)
    found = Intensityd("image", intensity, "resampled")({"image": part})["image"]
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    assert SCALES not in found.meta


def test_a_constant_whole_makes_its_part_zero():
    whole = torch.full((2, 8, 8, 8), 7.0)
    part = MetaTensor(whole[:, :3].clone())
    part.meta[SCALES] = scales_of_whole(whole, whole, ["zscore", "rescale_to_0_1"])
    assert not Intensityd("image", ["zscore", "rescale_to_0_1"], "resampled")({"image": part})["image"].any()


def label_map(*blocks, shape=(30, 30, 30)):
    found = np.zeros(shape, np.int64)
    for value, *spans in blocks:
        found[tuple(slice(*span) for span in spans)] = value
    return found


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([(1, (5, 12), (6, 12), (7, 12))], [[5, 6, 7], [12, 12, 12]]),
        ([(1, (5, 12), (6, 12), (7, 12)), (1, (28, 29), (0, 1), (0, 1))], [[5, 6, 7], [12, 12, 12]]),  # a speck
        ([(1, (5, 12), (6, 12), (7, 12)), (2, (28, 29), (0, 1), (0, 1))], [[5, 0, 0], [29, 12, 12]]),  # a small label
        ([(3, (5, 7), (5, 6), (5, 6)), (3, (20, 21), (9, 10), (9, 10))], [[5, 5, 5], [21, 10, 10]]),  # all small
        ([(1, (2, 12), (2, 12), (2, 12)), (1, (20, 22), (20, 22), (20, 22))], [[2, 2, 2], [22, 22, 22]]),
        ([(1, (5, 9), (5, 9), (5, 9)), (1, (9, 10), (9, 10), (9, 10))], [[5, 5, 5], [10, 10, 10]]),  # corner to corner
        ([], None),
    ],
)
def test_the_box_holds_every_label_but_no_speck(blocks, expected):
    assert SPECK_VOXELS == 8
    found = box_of(label_map(*blocks))
    assert found is None if expected is None else found.tolist() == expected


@pytest.mark.parametrize(
    ("faces", "shape", "window", "expected"),
    [
        ([[100, 100, 100], [150, 150, 150]], (512, 512, 400), (8, 8, 8), [[75, 75, 80], [175, 175, 170]]),
        ([[0, 500, 3], [10, 512, 9]], (512, 512, 400), (8, 8, 8), [[0, 475, 0], [35, 512, 29]]),  # at the edges
        ([[100, 0, 399], [101, 1, 400]], (512, 512, 400), (128, 128, 128), [[21, 0, 272], [181, 160, 400]]),
        ([[10, 10, 10], [20, 20, 20]], (30, 200, 40), (128, 128, 128), [[0, 0, 0], [30, 160, 40]]),  # smaller scans
    ],
)
def test_the_box_has_a_margin_and_at_least_a_window(faces, shape, window, expected):
    found = with_margin(np.array(faces, float), shape, EDGES, np.array(window))
    assert found.tolist() == expected


def test_a_flipped_and_turned_file_gets_its_mask_in_its_place(fast, tmp_path):
    shape, affine = (60, 50, 40), grid("oblique")[1]
    at = world(shape, affine)
    voxels = np.where(np.linalg.norm(at - at[50, 45, 30], axis=-1) < 9, 1000, 100).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    mask = fast(tmp_path / "scan.nii.gz")
    assert (mask == 1).sum() / (voxels == 1000).sum() == pytest.approx(1, abs=0.1)
    assert ((mask == 1) & (voxels != 1000)).sum() < 0.1 * (mask == 1).sum()
