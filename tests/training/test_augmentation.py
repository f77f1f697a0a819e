"""Augmentation: what is drawn, how often, and what it does to a batch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from scipy import ndimage, stats
from scipy.spatial.transform import Rotation

from scripts.training import augmentation as augment
from scripts.training import augmentation_spatial as augment_spatial
from scripts.training.augmentation import (
    Augmentation,
    Brightness,
    Contrast,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    LowResolution,
)
from scripts.training.augmentation_spatial import Mirror, RotateZoom

ANGLE = math.pi / 6
CLOSE = {"rtol": 0, "atol": 1e-5}  # angles are drawn in single precision


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def share(drawn: torch.Tensor, expected: float) -> None:
    """Check that the share of True lies within 4 standard deviations of a binomial draw with probability `expected`."""
    deviation = math.sqrt(expected * (1 - expected) / drawn.numel())
    assert abs(drawn.double().mean().item() - expected) < 4 * deviation


def flat(values: torch.Tensor, low: float, high: float) -> None:
    """Check that the values are uniform between low and high, by a Kolmogorov-Smirnov test too."""
    assert values.min() > low - 1e-4
    assert values.max() < high + 1e-4
    assert stats.kstest(values.double().numpy(), "uniform", args=(low, high - low)).pvalue > 1e-4


def halves(values: torch.Tensor, low: float, high: float) -> None:
    """Half of the values are uniform between low and 1, half between 1 and high."""
    share(values < 1, 0.5)
    flat(values[values < 1], low, 1)
    flat(values[values > 1], 1, high)


def independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """No correlation between two equally long draws, to 4 standard deviations."""
    assert abs(np.corrcoef(a.double(), b.double())[0, 1]) < 4 / math.sqrt(len(a))


def changed(transform, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform the image, and tell which channels (N, C) have changed."""
    label = torch.zeros(len(image), 1, *image.shape[2:])
    before = image.clone()
    after, after_label = transform(image, label)
    assert after_label is label
    assert image.equal(before)
    assert after.dtype == image.dtype
    return after, (after != before).flatten(2).any(dim=2)


def recovered(after: torch.Tensor, drawn: torch.Tensor, p: float, measure) -> torch.Tensor:
    """`measure` of the drawn channels; whole samples are drawn with p, and their channels differ."""
    assert drawn.all(dim=1).equal(drawn.any(dim=1))
    share(drawn[:, 0], p)
    values = measure(after[drawn.all(dim=1)])  # (K, C)
    independent(values[:, 0], values[:, 1])
    return values.flatten()


class TestIntensity:
    """Parameters are recovered from what they did to an image made for it."""

    n = 20000

    def test_brightness_multiplies_each_channel_by_its_own_factor(self):
        image = torch.ones(self.n, 2, 2, 2, dtype=torch.float64)
        after, drawn = changed(Brightness(0.15, (0.75, 1.25)), image)
        factors = recovered(after, drawn, 0.15, lambda x: x[:, :, 0, 0])
        flat(factors, 0.75, 1.25)
        assert (after.amax(dim=(2, 3)) == after.amin(dim=(2, 3))).all()

    def test_contrast_stretches_about_the_mean_within_the_old_range(self):
        image = torch.tensor([[4.0, 6.0], [4.9, 5.1]], dtype=torch.float64).repeat(self.n, 2, 1, 1)  # mean 5
        after, drawn = changed(Contrast(0.15, (0.75, 1.25)), image)
        factors = recovered(after, drawn, 0.15, lambda x: (x[:, :, 1, 1] - 5) / 0.1)
        halves(factors, 0.75, 1.25)
        assert after.amax() == 6
        assert after.amin() == 4
        outer = recovered(after, drawn, 0.15, lambda x: x[:, :, 0, 1] - 5)
        assert torch.allclose(outer, factors.clamp(max=1))

    @pytest.mark.parametrize(("invert", "p"), [(True, 0.1), (False, 0.3)])
    def test_gamma_is_drawn_half_below_and_half_above_one(self, invert, p):
        image = torch.tensor([[-1.0, 1.0], [1.0, 3.0]], dtype=torch.float64).repeat(self.n, 2, 1, 1)  # middle: 0.5
        after, drawn = changed(Gamma(p, (0.7, 1.5), invert), image)

        def gamma(x):
            low, middle, high = x[:, :, 0, 0], x[:, :, 0, 1], x[:, :, 1, 1]
            return ((high - middle if invert else middle - low) / (high - low)).log() / math.log(0.5)

        halves(recovered(after, drawn, p, gamma), 0.7, 1.5)

    @pytest.mark.parametrize("invert", [True, False])
    def test_gamma_keeps_mean_and_standard_deviation_and_order_of_each_channel(self, invert):
        image = torch.randn(6, 3, 7, 6, 5, dtype=torch.float64) * torch.tensor([1.0, 5.0, 90.0]).view(3, 1, 1, 1) + 40
        after, drawn = changed(Gamma(1.0, (0.7, 1.5), invert), image)
        assert drawn.all()
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(statistic(after, dim=(2, 3, 4)), statistic(image, dim=(2, 3, 4)))
        assert (after.flatten(2).argsort() == image.flatten(2).argsort()).all()

    def test_gamma_leaves_a_constant_channel_finite(self):
        image = torch.full((2, 1, 3, 3, 3), 5.0)
        after, _ = Gamma(1.0, (0.7, 1.5), False)(image, image)
        torch.testing.assert_close(after, image)

    def test_noise_has_one_standard_deviation_for_all_channels_of_a_sample(self):
        _, drawn = changed(GaussianNoise(0.1, (0, 0.1)), torch.zeros(self.n, 2, 1, 1))
        assert drawn.all(dim=1).equal(drawn.any(dim=1))
        share(drawn[:, 0], 0.1)
        made = []
        for bounds in ((1, 1), (0, 0.1)):
            torch.manual_seed(2)
            made.append(changed(GaussianNoise(1.0, bounds), torch.zeros(5000, 2, 2, 2, dtype=torch.float64))[0])
        assert stats.kstest(made[0].flatten().numpy(), "norm").pvalue > 1e-4
        independent(made[0][:, 0].flatten(), made[0][:, 1].flatten())
        std = made[1] / made[0]
        torch.testing.assert_close(std, std[:, :1, :1, :1].expand_as(std))
        flat(std[:, 0, 0, 0], 0, 0.1)

    def test_blur_draws_its_width_per_channel(self):
        image = torch.zeros(self.n // 4, 2, 17, 1, dtype=torch.float64)
        image[:, :, 8] = 1
        after, drawn = changed(GaussianBlur(0.2, 0.5, (0.5, 1)), image)
        self.half_of_the_channels(drawn, 0.2)
        ratio = after[:, :, 9, 0] / after[:, :, 8, 0]  # exp(-1 / (2 sigma^2))
        sigma = (-0.5 / ratio.log()).sqrt()
        flat(sigma[drawn], 0.5, 1)
        both = drawn.all(dim=1)
        independent(sigma[both, 0], sigma[both, 1])

    def test_low_resolution_draws_its_zoom_per_channel(self):
        # an odd number of voxels, so that no coarse voxel's centre lies between two of them
        image = torch.arange(101.0, dtype=torch.float64).view(101, 1).repeat(1500, 2, 1, 1)
        voxels = torch.arange(50, 102)
        expected = torch.stack([coarse(image[:1, :1], int(m)).flatten() for m in voxels])
        after, drawn = changed(LowResolution(1.0, 1.0, (0.5, 1)), image)
        distance = (after.flatten(0, 1)[:, None, :, 0] - expected).abs().amax(dim=-1)
        assert distance.amin(dim=1).max() < 1e-9
        kept = voxels[distance.argmin(dim=1)].view(1500, 2)
        assert drawn.equal(kept < 101)
        independent(kept[:, 0], kept[:, 1])
        spread = kept + torch.rand(1500, 2) - 0.5  # undoes the rounding to whole voxels
        flat(spread[(kept > 50) & (kept < 101)] / 101, 50.5 / 101, 100.5 / 101)

    def test_low_resolution_picks_samples_and_then_half_of_their_channels(self):
        _, drawn = changed(LowResolution(0.25, 0.5, (0.5, 0.9)), torch.randn(self.n // 4, 2, 10, 1))
        self.half_of_the_channels(drawn, 0.25)

    @staticmethod
    def half_of_the_channels(drawn: torch.Tensor, p: float) -> None:
        share(drawn[:, 0], p / 2)
        share(drawn.any(dim=1), p * 0.75)
        share(drawn.all(dim=1), p * 0.25)


def coarse(image: torch.Tensor, *shape: int) -> torch.Tensor:
    """Image (1, 1, *space) on a grid of `shape` (the first axes) and back."""
    full = list(image.shape[2:])
    small = F.interpolate(image, [*shape, *full[len(shape) :]], mode="nearest-exact")
    return F.interpolate(small, full, mode={2: "bilinear", 3: "trilinear"}[len(full)], align_corners=False)


def test_blur_is_scipys():
    image = torch.randn(4, 3, 9, 2, 12, dtype=torch.float64)  # one axis is shorter than the kernel
    sigma = torch.tensor([0.5, 0.6, 0.8, 1.0], dtype=torch.float64)
    after = augment.along_axes(image[:, 0], [augment.blur(sigma, n) for n in image.shape[2:]])
    for one, s, found in zip(image[:, 0], sigma, after, strict=True):
        np.testing.assert_allclose(found, ndimage.gaussian_filter(one.numpy(), float(s)), atol=1e-12)


def test_low_resolution_is_nearest_there_and_linear_back():
    image = torch.randn(1, 1, 11, 8, 5, dtype=torch.float64)
    for zoom, shape in {0.5: (6, 4, 2), 0.61: (7, 5, 3), 0.83: (9, 7, 4), 1.0: (11, 8, 5)}.items():
        operators = [augment.there_and_back(torch.tensor([zoom], dtype=torch.float64), n) for n in image.shape[2:]]
        torch.testing.assert_close(augment.along_axes(image[0], operators), coarse(image, *shape)[0])


def coordinates(size: list[int], n: int = 1) -> torch.Tensor:
    """(n, D, *size): offsets of each voxel from the middle, as an image."""
    axes = [torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in size]
    return torch.stack(torch.meshgrid(axes, indexing="ij")).repeat(n, 1, *[1] * len(size))


def matrices(after: torch.Tensor) -> torch.Tensor:
    """(N, D, D) from what a transform made of `coordinates`, which is linear away from the border."""
    differences = [after.diff(dim=axis).flatten(2)[..., 0] for axis in range(2, after.ndim)]
    return torch.stack(differences, dim=-1)


class TestRotateZoom:
    """One resampling of a larger crop."""

    def draws(self, n, source, size, angles):
        image = coordinates(source, n)
        after, _ = RotateZoom(size, angles, 0.2, (0.7, 1.4), 0.2)(image, torch.zeros(n, 1, *source))
        matrix = matrices(after)
        zoom = torch.linalg.det(matrix) ** (1 / len(size))
        rotation = matrix / zoom[:, None, None]
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(len(size)).double().expand_as(rotation), **CLOSE)
        rotated = (rotation - torch.eye(len(size))).abs().amax(dim=(1, 2)) > 1e-5
        return rotation, rotated, zoom, (zoom - 1).abs() > 1e-5

    def test_rotation_and_zoom_are_drawn_independently_of_each_other(self):
        rotation, rotated, zoom, zoomed = self.draws(8000, [8, 10, 12], [2, 3, 4], [ANGLE] * 3)
        share(rotated, 0.2)
        share(zoomed, 0.2)
        share(rotated & zoomed, 0.04)
        halves(zoom[zoomed], 0.7, 1.4)
        angles = torch.from_numpy(Rotation.from_matrix(rotation[rotated].mT.numpy()).as_euler("XYZ"))
        for i in range(3):
            flat(angles[:, i], -ANGLE, ANGLE)
            independent(angles[:, i], angles[:, i - 1])
            assert (angles[:, i] != 0).all()  # all three together
        both = zoomed[rotated]
        independent(angles[both, 0].abs(), zoom[rotated & zoomed])

    def test_each_axis_has_a_range_of_its_own(self):
        rotation, rotated, _, _ = self.draws(500, [8, 10, 12], [2, 3, 4], [0.1, 0.0, 0.5])
        angles = torch.from_numpy(Rotation.from_matrix(rotation[rotated].mT.numpy()).as_euler("XYZ"))
        flat(angles[:, 0], -0.1, 0.1)
        assert angles[:, 1].abs().max() < 1e-6
        flat(angles[:, 2], -0.5, 0.5)

    def test_slices_are_turned_by_any_angle(self):
        rotation, rotated, zoom, zoomed = self.draws(8000, [9, 12], [2, 4], [math.pi])
        share(rotated, 0.2)
        flat(torch.atan2(rotation[rotated, 0, 1], rotation[rotated, 0, 0]), -math.pi, math.pi)
        halves(zoom[zoomed], 0.7, 1.4)

    @pytest.mark.parametrize(
        ("source", "size", "angles"),
        [([30, 41, 52], [10, 15, 20], [ANGLE] * 3), ([40, 61], [13, 20], [math.pi])],
        ids=["3D", "2D"],
    )
    def test_voxels_come_from_where_scipys_affine_transform_takes_them(self, source, size, angles):
        image = torch.randn(4, 2, *source, dtype=torch.float64)
        transform = RotateZoom(size, angles, 1.0, (0.7, 1.4), 1.0)
        torch.manual_seed(2)
        matrix = matrices(transform(coordinates(source, 4), torch.zeros(4, 1, *source))[0]).numpy()
        torch.manual_seed(2)
        after, _ = transform(image, torch.zeros(4, 1, *source))
        for one, m, found in zip(image, matrix, after, strict=True):
            offset = (np.array(source) - 1) / 2 - m @ (np.array(size) - 1) / 2
            expected = ndimage.affine_transform(one[1].numpy(), m, offset, tuple(size), order=1)
            np.testing.assert_allclose(found[1], expected, atol=1e-9)

    def test_a_slice_is_turned_alike_in_2d_and_as_one_plane_of_a_volume(self):
        image, angle = torch.randn(3, 2, 14, 19), torch.rand(3, 1) * math.pi
        flat = augment_spatial.sampling_grid(augment_spatial.rotations(angle), [6, 8], [14, 19])
        angles = torch.cat([torch.zeros(3, 2), angle], dim=1)
        plane = augment_spatial.sampling_grid(augment_spatial.rotations(angles), [6, 8, 1], [14, 19, 1])
        expected = F.grid_sample(image, flat, align_corners=False)
        torch.testing.assert_close(F.grid_sample(image[..., None], plane, align_corners=False)[..., 0], expected)

    def test_a_sample_that_is_not_drawn_is_the_middle_of_the_crop(self):
        image = torch.randn(200, 1, 8, 8, 9)
        label = torch.randint(3, (200, 1, 8, 8, 9))
        after, after_label = RotateZoom([3, 4, 5], [ANGLE] * 3, 0.2, (0.7, 1.4), 0.2)(image, label)
        same = (after == image[..., 2:5, 2:6, 2:7]).flatten(1).all(dim=1)
        share(same, 0.64)
        assert (after_label == label[..., 2:5, 2:6, 2:7])[same].all()
        assert after_label.dtype == label.dtype

    def test_beyond_the_crop_everything_is_zero(self):
        image, label = torch.ones(3, 1, 10, 12, 14), torch.ones(3, 1, 10, 12, 14, dtype=torch.uint8)
        after, after_label = RotateZoom([10, 12, 14], [ANGLE] * 3, 1.0, (1.3, 1.4), 1.0)(image, label)
        torch.testing.assert_close(after[:, 0, 5, 6, 7], torch.ones(3))
        assert (after[:, :, 0, 0, 0] == 0).any()
        assert ((after == 0) <= (after_label == 0)).all()
        assert ((after > 0.5) == (after_label == 1)).all()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
    def test_the_label_is_the_greatest_interpolated_mask(self, dtype):
        label = torch.randint(6, (3, 1, 12, 13, 14)).repeat_interleave(2, dim=2).to(dtype)
        matrix = torch.tensor([0.8, 1.0, 1.7], dtype=torch.float64).view(3, 1, 1)
        matrix = matrix * augment_spatial.rotations(torch.rand(3, 3)).double()
        grid = augment_spatial.sampling_grid(matrix, [14, 12, 10], [24, 13, 14])
        masks = F.one_hot(label[:, 0].long(), 6).movedim(-1, 1).double()
        weights = F.grid_sample(masks, grid, align_corners=False)
        weights[:, 0] = 1 - weights[:, 1:].sum(dim=1)  # outside is background
        found = augment_spatial.sample_labels(label, grid)
        assert found.dtype == dtype
        assert (found == 0).any()
        assert found.unique().tolist() == list(range(6))
        assert found.long().equal(weights.argmax(dim=1, keepdim=True))

    def test_a_label_without_foreground_stays_without(self):
        image, label = torch.randn(2, 1, 6, 6, 6), torch.zeros(2, 1, 6, 6, 6)
        _, after = RotateZoom([4, 4, 4], [ANGLE] * 3, 1.0, (0.7, 1.4), 1.0)(image, label)
        assert after.shape == (2, 1, 4, 4, 4)
        assert not after.any()


class TestMirror:
    """Image and label together, by the allowed axes."""

    def test_each_allowed_axis_is_mirrored_with_a_probability_of_its_own(self):
        image = coordinates([2, 2, 2], 8000)
        after, label = Mirror(0.5, [0, 2])(image, image[:, :1])
        signs = matrices(after).diagonal(dim1=1, dim2=2)
        assert (matrices(after) == torch.diag_embed(signs)).all()
        assert signs[:, 1].eq(1).all()
        share(signs[:, 0] < 0, 0.5)
        share(signs[:, 2] < 0, 0.5)
        independent(signs[:, 0], signs[:, 2])
        assert label.equal(after[:, :1])
        assert image.equal(coordinates([2, 2, 2], 8000))

    def test_no_axes_mean_no_mirroring(self):
        image = torch.randn(4, 1, 3, 3, 3)
        assert Mirror(0.5, [])(image, image)[0].equal(image)


def published(size: list[int], angles: list[float]) -> list:
    """nnU-Net v1's list, by the table of its sources (data_augmentation_moreDA.py, nnUNetTrainerV2.py)."""
    return [
        RotateZoom(size, angles, 0.2, (0.7, 1.4), 0.2),
        GaussianNoise(0.1, (0, 0.1)),
        GaussianBlur(0.2, 0.5, (0.5, 1)),
        Brightness(0.15, (0.75, 1.25)),
        Contrast(0.15, (0.75, 1.25)),
        LowResolution(0.25, 0.5, (0.5, 1)),
        Gamma(0.1, (0.7, 1.5), True),
        Gamma(0.3, (0.7, 1.5), False),
        Mirror(0.5, list(range(len(size)))),
    ]


def test_the_list_of_the_configuration_is_the_published_one():
    parser = ConfigParser({**json.loads((ROOT / "configs/train.json").read_text()), "in_channels": 1})
    found = parser.get_parsed_content("train#augmentation").transforms
    for ours, theirs in zip(found, published([128] * 3, [0.5236] * 3), strict=True):
        assert type(ours) is type(theirs)
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in vars(theirs).items()} == vars(ours)


def batch(*shape: int) -> dict:
    return {"image": torch.randn(*shape), "label": torch.randint(4, (shape[0], 1, *shape[2:]), dtype=torch.uint8)}


class TestAugmentation:
    """The whole list, as the trainer calls it."""

    @pytest.mark.parametrize(
        ("source", "size", "angles"), [([12, 14, 16], [6, 7, 8], [ANGLE] * 3), ([14, 16], [7, 8], [math.pi])]
    )
    @pytest.mark.parametrize("samples", [1, 40])
    def test_a_seed_repeats_a_batch(self, source, size, angles, samples):
        data = batch(samples, 2, *source)
        data["image"].requires_grad_()
        before = {k: v.clone() for k, v in data.items()}
        augmentation = Augmentation(published(size, angles))
        drawn = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            drawn.append(augmentation(data, "cpu"))
        (image, label), again, other = drawn
        assert image.equal(again[0])
        assert label.equal(again[1])
        assert not image.equal(other[0])
        assert image.shape == (samples, 2, *size)
        assert label.shape == (samples, 1, *size)
        assert not image.requires_grad
        assert image.dtype == label.dtype == torch.float32
        assert set(label.unique().tolist()) == {0, 1, 2, 3}  # the last may be the ignore label: carried like any
        assert all(data[k].equal(v) for k, v in before.items())

    def test_what_is_drawn_does_not_depend_on_how_the_noise_was_made(self):
        following = []
        for edge in (2, 5):  # as a GPU would, the larger one takes more normal numbers
            torch.manual_seed(5)
            GaussianNoise(1.0, (0, 0.1))(torch.zeros(2, 1, edge, edge), torch.zeros(2, 1, edge, edge))
            following.append(torch.rand(()))
        assert following[0] == following[1]

    def test_masked_channels_are_zero_again_where_they_were_and_only_there(self):
        image = torch.zeros(8, 3, 16, 16, 16)
        image[:, :, 4:13, 3:12, 5:10] = torch.rand(8, 3, 9, 9, 5) + 1
        image[:, 1] += 7  # not masked
        label = (image[:, :1] != 0).float() * 3
        transforms = [
            RotateZoom([12, 12, 12], [ANGLE] * 3, 0.7, (0.7, 1.4), 0.7),
            GaussianNoise(1.0, (0.1, 0.1)),
            Mirror(0.5, [0, 1, 2]),
        ]
        data = {"image": image, "label": label}
        after, after_label = Augmentation(transforms, masked=[0, 2])(data)
        assert after_label.shape == (8, 1, 12, 12, 12)
        outside = (after_label == 0)[:, 0]
        assert outside.any(dim=(1, 2, 3)).all()
        for channel, masked in enumerate([True, False, True]):
            assert ((after[:, channel] == 0) == (outside & masked)).all()
        unmasked, _ = Augmentation(transforms)(data)
        assert (unmasked != 0).all()

    @pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
    def test_monais_trainer_takes_it(self):
        seen = []

        class Network(torch.nn.Conv3d):
            def forward(self, x):
                seen.append(x)
                return super().forward(x)

        network = Network(1, 1, 1)
        data = batch(2, 1, 12, 12, 12)
        data = {key: MetaTensor(value) for key, value in data.items()}
        SupervisedTrainer(
            device="cpu", max_epochs=2, train_data_loader=[data], network=network, loss_function=F.mse_loss,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1), decollate=False,
            prepare_batch=Augmentation(published([8, 8, 8], [ANGLE] * 3)),
        ).run()  # fmt: skip
        assert [type(x) for x in seen] == [torch.Tensor, torch.Tensor]
        assert seen[0].shape == (2, 1, 8, 8, 8)
        assert not seen[0].requires_grad
