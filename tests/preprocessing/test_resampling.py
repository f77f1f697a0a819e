"""The way from the scan's grid to the network's and back puts every voxel where its affine says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import GRIDS, grid, save, world
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, ResampleToMatch, Spacing

from scripts.data.scans import mask_name
from scripts.preprocessing.resampling import GridSpacingd, LabelOnImageGridd, LabelsOnScanGridd, labels_on_grid

RADIUS = 13.0  # mm


def fixed_transforms(spacing=(1.0, 1.0, 1.0)) -> Compose:
    """Take the bundle's own chain up to, and without, the intensity normalisation."""
    parser = ConfigParser()
    parser.read_config("configs/train.json")
    parser["transforms#resampled"] = parser["transforms#resampled"][:-1]
    parser["model"] = {"_target_": "scripts.weights.model_settings.ModelSettings", "spacing": list(spacing)}
    return Compose(parser.get_parsed_content("transforms#image"))


def depth(shape, affine) -> np.ndarray:
    """mm below the surface of a sphere off the centre of the grid, negative outside."""
    voxels = world(shape, affine)
    centre = world((1, 1, 1), affine)[0, 0, 0] + affine[:3, :3] @ (np.array(shape) * (0.45, 0.5, 0.55))
    return RADIUS - np.linalg.norm(voxels - centre, axis=-1)


@pytest.mark.parametrize("kind", GRIDS)
def test_resampled_scan_keeps_its_place_in_the_world(kind, tmp_path):
    shape, affine = grid(kind)
    # cubic interpolation reproduces a linear ramp; what happens at the border decays by 0.27 a voxel: 0.02 after three
    ramp = world(shape, affine) @ (0.3, -0.2, 0.5)
    file = save(tmp_path / "ramp.nii.gz", ramp.astype(np.float32), affine)
    image = fixed_transforms()({"image": str(file)})["image"]
    assert image.affine[:3, :3].norm(dim=0).tolist() == pytest.approx([1.0] * 3)
    margin = int(3 * np.linalg.norm(affine[:3, :3], axis=0).max()) + 1
    inner = (slice(margin, -margin),) * 3
    expected = world(image.shape[1:], image.affine.numpy()) @ (0.3, -0.2, 0.5)
    assert np.abs(image[0].numpy() - expected)[inner].max() < 0.02  # of a ramp of 0.6 a mm


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 1.9)], ids=["1mm", "anisotropic"])
def test_labels_return_to_the_scan_they_came_from(kind, spacing, tmp_path):
    shape, affine = grid(kind)
    file = save(tmp_path / "scan.nii.gz", depth(shape, affine).astype(np.float32), affine)
    image = fixed_transforms(spacing)({"image": str(file)})["image"]
    on_network_grid = world(image.shape[1:], image.affine.numpy())
    origin = world((1, 1, 1), affine)[0, 0, 0]
    centre = origin + affine[:3, :3] @ (np.array(shape) * (0.45, 0.5, 0.55))
    distance = torch.from_numpy(RADIUS - np.linalg.norm(on_network_grid - centre, axis=-1))
    logits = torch.stack([-distance, distance])  # class 1 inside the sphere
    out = LabelsOnScanGridd("pred")({"pred": logits, "image": image})["pred"]
    assert tuple(out.shape) == (1, *shape)
    assert out.dtype == torch.uint8
    np.testing.assert_allclose(out.affine, affine, atol=1e-5)  # float32 header
    truth = depth(shape, affine)
    # linear interpolation of a distance errs by at most diagonal**2 / (8 * radius) away from the centre
    clear = np.abs(truth) > np.square(spacing).sum() / (8 * RADIUS)
    assert (out[0].numpy() == (truth > 0))[clear].all()


def test_slabs_do_not_change_the_labels():
    torch.manual_seed(0)
    logits, affine = torch.randn(3, 20, 21, 22), grid("oblique")[1]
    there = torch.from_numpy(affine) @ torch.diag(torch.tensor([0.5, 0.6, 0.7, 1.0], dtype=torch.float64))
    whole = labels_on_grid(logits, torch.from_numpy(affine), there, (25, 24, 23), slab_voxels=10**9)
    assert torch.equal(whole, labels_on_grid(logits, torch.from_numpy(affine), there, (25, 24, 23), slab_voxels=1))
    assert len(whole.unique()) == 3


def test_half_precision_logits_are_accepted_and_outside_is_background():
    logits = torch.stack([torch.zeros(4, 4, 4), torch.ones(4, 4, 4)]).half()
    shift = torch.eye(4, dtype=torch.float64)
    shift[0, 3] = -3.0
    labels = labels_on_grid(logits, torch.eye(4), shift, (8, 4, 4))
    assert labels[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]


def test_same_grid_is_plain_argmax():
    torch.manual_seed(0)
    logits = torch.randn(5, 9, 8, 7)
    assert torch.equal(labels_on_grid(logits, torch.eye(4), torch.eye(4), (9, 8, 7)), logits.argmax(0).byte())


def test_regions_over_one_half_are_painted_over_one_another_in_their_order():
    probabilities = torch.tensor([[0.9, 0.9, 0.2, 0.51, 0.5], [0.1, 0.8, 0.7, 0.1, 0.5]]).view(2, 5, 1, 1)
    found = labels_on_grid(probabilities, torch.eye(4), torch.eye(4), (5, 1, 1), region_order=[3, 1])
    assert found[:, 0, 0].tolist() == [3, 1, 1, 3, 0]
    swapped = labels_on_grid(probabilities.flip(0), torch.eye(4), torch.eye(4), (5, 1, 1), region_order=[1, 3])
    assert swapped[:, 0, 0].tolist() == [3, 3, 1, 3, 0]


def two_balls(at: np.ndarray) -> np.ndarray:
    """Labels 1 and 2 at points in mm (*, 3) about the middle of a grid."""
    first = np.linalg.norm(at - (-8.3, 1.2, 0.7), axis=-1) < 9
    second = np.linalg.norm(at - (9.1, -2.4, -1.3), axis=-1) < 7
    return first + 2 * second


def label_on(shape: tuple[int, ...], affine: np.ndarray) -> tuple[MetaTensor, np.ndarray]:
    """Draw the two balls on a grid, and tell the grid's middle in mm."""
    points = world(shape, affine)
    middle = points.reshape(-1, 3).mean(0)
    return MetaTensor(two_balls(points - middle)[None].astype(np.float32), affine=affine), middle


@pytest.mark.parametrize("kind", GRIDS)
def test_a_label_on_its_images_grid_is_where_it_was_and_closer_than_by_nearest_neighbours(kind):
    label, middle = label_on(*grid(kind))
    straight = Orientation("RAS", labels=None)(label.clone())
    image = Spacing((1.0, 1.0, 1.0), scale_extent=True, align_corners=False)(straight)
    found = LabelOnImageGridd("label", classes=3)({"label": label, "image": image})["label"]
    np.testing.assert_allclose(found.affine, image.affine)
    points = world(tuple(image.shape[1:]), image.affine.numpy())
    truth, nearest = two_balls(points - middle), ResampleToMatch(mode="nearest", padding_mode="border")(label, image)

    def dice(labels: np.ndarray) -> float:
        return np.mean(
            [2 * ((labels == c) & (truth == c)).sum() / ((labels == c).sum() + (truth == c).sum()) for c in (1, 2)]
        )

    assert dice(found[0].numpy()) > dice(nearest[0].numpy().round())
    for c in (1, 2):  # half a millimetre is half a voxel
        assert np.linalg.norm(points[found[0].numpy() == c].mean(0) - points[truth == c].mean(0)) < 0.5


def test_a_label_on_its_own_grid_stays_as_it_is():
    label, _ = label_on(*grid("oblique"))
    found = LabelOnImageGridd("label", classes=3)({"label": label, "image": label})["label"]
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), label)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_label_on_a_turned_and_flipped_grid_keeps_every_voxel(kind):
    label, _ = label_on(*grid(kind))
    image = Orientation("RAS", labels=None)(label.clone())
    found = LabelOnImageGridd("label", classes=3)({"label": label, "image": image})["label"]
    assert torch.equal(found.float(), image)


def test_spacing_ignores_entries_that_share_the_prefix():
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    out = GridSpacingd("image", pixdim=(1.0, 1.0, 1.0))({"image": image, "image_path": "scan.nii.gz"})
    assert out["image_path"] == "scan.nii.gz"
    assert out["image"].shape == (1, 7, 7, 7)


def test_file_name_keeps_the_case_and_drops_only_a_channel():
    assert mask_name({"filename_or_obj": "a/case_7_0000.nii.gz"})["subject"] == "case_7"
    assert mask_name({"filename_or_obj": "a/scan_2024.nii.gz"})["subject"] == "scan_2024"
    assert mask_name({"filename_or_obj": "scan.v2.nii"})["subject"] == "scan.v2"
