"""The slab-wise sliding window gives what MONAI's gives, or what nnU-Net's rules say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai import inferers
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

from scripts.inference.sliding_window import SlidingWindowInferer, nnunet_starts, nnunet_weights
from scripts.kernels.precision import bfloat16_pays
from scripts.preprocessing.resampling import LabelsOnScanGridd
from scripts.utils.errors import UserError

ROI = (16, 16, 16)


def network(x: torch.Tensor) -> torch.Tensor:
    """Three classes that depend on the window's content and on the place in it."""
    ramp = torch.linspace(0, 1, x.shape[-1])
    return torch.cat([x * 2, x.square() + ramp, x.cumsum(dim=2)], dim=1)


def scan(*size: int) -> torch.Tensor:
    return torch.randn(1, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "roi", "overlap"),
    [
        ((40, 33, 21), (16, 16, 16), 0.5),  # last windows are shifted back
        ((48, 48, 48), (16, 16, 16), 0.25),
        ((32, 16, 24), (32, 16, 16), 0.5),  # one window along two axes
        ((10, 40, 7), (16, 16, 16), 0.5),  # smaller than the window
        ((37, 20, 20), (16, 16, 16), 0.0),
        ((20, 20, 20), (16, 16, 16), 0.9),
        ((40, 33), (16, 16), 0.5),  # 2D
    ],
)
def test_logits_are_those_of_monai(size, roi, overlap):
    torch.manual_seed(0)
    image = torch.randn(2, 1, *size, dtype=torch.float64)
    expected = inferers.SlidingWindowInferer(roi, overlap=overlap, mode="gaussian")(image, network)
    torch.testing.assert_close(SlidingWindowInferer(roi, overlap)(image, network), expected, rtol=1e-12, atol=1e-12)


def test_large_results_are_half_precision_roundings_of_the_small_ones():
    image = scan(40, 30, 20).float()
    full = SlidingWindowInferer(ROI, 0.5)(image, network)
    half = SlidingWindowInferer(ROI, 0.5, full_precision_gb=0)(image, network)
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16)
    assert torch.equal(half, full.half())


class TestLabelsEarly:
    """Labels are decided plane by plane where nothing is resampled afterwards, and are the same labels."""

    @staticmethod
    def scan_of(affine: np.ndarray, stored: np.ndarray, shape=(40, 33, 21)) -> MetaTensor:
        meta = {"original_affine": stored, "spatial_shape": np.array(shape)}
        return MetaTensor(scan(*shape)[0].float(), affine=affine, meta=meta)

    @pytest.mark.parametrize("region_order", [None, (1, 300, 2)])
    @pytest.mark.parametrize("window_scheme", ["monai", "nnunet"])
    def test_a_flipped_and_cropped_scan_gets_the_labels_of_its_scores(self, window_scheme, region_order):
        stored = np.array([[0, 2.0, 0, 5], [-2.0, 0, 0, 3], [0, 0, 3.0, 1], [0, 0, 0, 1]])
        turned = stored @ np.array([[0, 1, 0, 3], [-1, 0, 0, 38], [0, 0, 1, 2], [0, 0, 0, 1.0]])
        image = self.scan_of(turned, stored, (33, 38, 19))
        image.meta["spatial_shape"] = np.array([40, 40, 24])
        back = LabelsOnScanGridd("pred", region_order=region_order)
        options = {
            "activation": "softmax" if region_order is None else "sigmoid",
            "window_scheme": window_scheme,
            "region_order": region_order,
        }
        scores = SlidingWindowInferer(ROI, **options)(image[None], network)[0]
        labels = SlidingWindowInferer(ROI, labels_early=True, **options)(image[None], network)[0]
        assert scores.dtype == torch.float32
        assert scores.shape == (3, 33, 38, 19)
        assert labels.dtype == (torch.uint8 if region_order is None else torch.int16)
        assert labels.shape == (1, 33, 38, 19)
        expected, found = (back({"image": image, "pred": pred})["pred"] for pred in (scores, labels))
        assert len(expected.unique()) > 2
        assert torch.equal(found, expected)

    def test_a_scan_that_was_resampled_keeps_its_scores(self):
        inferer = SlidingWindowInferer(ROI, activation="softmax", labels_early=True)
        resampled = self.scan_of(np.diag([1.0, 1, 1, 1]), np.diag([0.8, 0.8, 1, 1]))
        assert inferer(resampled[None], network).shape == (1, 3, 40, 33, 21)
        assert inferer(resampled[None].as_tensor(), network).shape == (1, 3, 40, 33, 21)


class TestNnunetTiles:
    """Positions and weights of nnU-Net v1."""

    @pytest.mark.parametrize(
        ("size", "roi", "starts"),
        [
            (128, 128, [0]),
            (129, 128, [0, 1]),
            (192, 128, [0, 64]),
            (193, 128, [0, 32, 65]),  # n = ceil(65 / 64) + 1 = 3, 32.5 rounds to even
            (300, 128, [0, 57, 115, 172]),  # 172 / 3 = 57.33
            (101, 33, [0, 14, 27, 41, 54, 68]),  # n = ceil(68 / 16.5) + 1 = 6, 13.6 apart
        ],
    )
    def test_starts_are_evenly_spaced_and_rounded(self, size, roi, starts):
        assert nnunet_starts(size, roi, 0.5) == starts

    @pytest.mark.parametrize("roi", [(16, 16, 16), (15, 32, 9), (48, 20)])
    def test_weights_are_a_smoothed_point_at_the_centre(self, roi):
        point = np.zeros(roi)
        point[tuple(n // 2 for n in roi)] = 1
        smoothed = gaussian_filter(point, [n / 8 for n in roi], mode="constant", cval=0)
        np.testing.assert_allclose(nnunet_weights(roi), smoothed / smoothed.max(), rtol=1e-9)
        assert nnunet_weights(roi).float().min() > 0  # so that nnU-Net's repair of zeros has nothing to do

    @pytest.mark.parametrize("size", [(40, 33, 21), (10, 40, 7), (16, 16, 16)])
    def test_scores_are_the_weighted_mean_over_all_windows(self, size):
        image = scan(*size)
        low = [max(16 - n, 0) // 2 for n in size]
        padded = np.zeros([max(n, 16) for n in size])
        inside = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
        padded[inside] = image[0, 0]
        point = np.zeros(ROI)
        point[8, 8, 8] = 1
        weight = gaussian_filter(point, 2.0, mode="constant")
        counts = [int(np.ceil((n - 16) / 8)) + 1 for n in padded.shape]
        axes = [
            np.round(np.linspace(0, n - 16, count)).astype(int) for n, count in zip(padded.shape, counts, strict=True)
        ]
        sums, weights = np.zeros((3, *padded.shape)), np.zeros(padded.shape)
        for start in itertools.product(*axes):
            at = tuple(slice(a, a + 16) for a in start)
            sums[(slice(None), *at)] += network(torch.from_numpy(padded[at])[None, None])[0].numpy() * weight
            weights[at] += weight
        found = SlidingWindowInferer(ROI, 0.5, window_scheme="nnunet")(image, network)
        np.testing.assert_allclose(found[0], (sums / weights)[(slice(None), *inside)], rtol=1e-9, atol=1e-12)


class TestAveraging:
    """What is averaged, and over what."""

    @pytest.mark.parametrize("window_scheme", ["monai", "nnunet"])
    @pytest.mark.parametrize(
        ("activation", "activate"), [("softmax", lambda x: torch.softmax(x, 1)), ("sigmoid", torch.sigmoid)]
    )
    def test_probabilities_of_windows_are_averaged_not_their_logits(self, window_scheme, activation, activate):
        image = scan(40, 33, 21)
        found = SlidingWindowInferer(ROI, activation=activation, window_scheme=window_scheme)(image, network)
        expected = SlidingWindowInferer(ROI, window_scheme=window_scheme)(image, lambda x: activate(network(x)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        late = activate(SlidingWindowInferer(ROI, window_scheme=window_scheme)(image, network))
        assert (found - late).abs().max() > 0.01

    @pytest.mark.parametrize("axes", [[0], [2, 0], [0, 1, 2]])
    def test_mirroring_averages_the_probabilities_of_every_combination_of_axes(self, axes):
        image = scan(30, 33, 21)

        def mirrored(window: torch.Tensor) -> torch.Tensor:
            flips = [f for n in range(len(axes) + 1) for f in itertools.combinations([a + 2 for a in axes], n)]
            assert len(flips) == 2 ** len(axes)
            return torch.stack([network(window.flip(f)).softmax(1).flip(f) for f in flips]).mean(0)

        found = SlidingWindowInferer(ROI, activation="softmax", mirror_axes=axes)(image, network)
        torch.testing.assert_close(found, SlidingWindowInferer(ROI)(image, mirrored), rtol=1e-12, atol=1e-12)
        assert (found - SlidingWindowInferer(ROI, activation="softmax")(image, network)).abs().max() > 0.01

    def test_a_half_precision_network_is_averaged_in_the_precision_of_the_image(self):
        image = scan(40, 20, 20).float()
        found = SlidingWindowInferer(ROI, activation="sigmoid", mirror_axes=[0])(image, lambda x: network(x).half())
        exact = SlidingWindowInferer(ROI)(
            image,
            lambda x: (network(x).half().float().sigmoid() + network(x.flip(2)).half().float().sigmoid().flip(2)) / 2,
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)

    def test_further_arguments_reach_the_network(self):
        found = SlidingWindowInferer(ROI)(scan(20, 20, 20), lambda x, a, b: x * a + b, 2.0, b=1.0)
        torch.testing.assert_close(found, scan(20, 20, 20) * 2 + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_scheme": "nnU-Net"}, "window_scheme is 'nnU-Net'; expected one of monai, nnunet"),
        ({"cpu_precision": "half"}, "cpu_precision is 'half'; expected one of auto, float32, bfloat16"),
        ({"mirror_axes": [1, 3]}, r"mirror_axes is \[1, 3\]; expected some of 0, 1, 2, each once"),
        ({"mirror_axes": [0, 0]}, r"mirror_axes is \[0, 0\]; expected some of 0, 1, 2, each once"),
    ],
)
def test_a_setting_that_cannot_be_is_named(options, message):
    with pytest.raises(UserError, match=message):
        SlidingWindowInferer(ROI, **options)


@pytest.mark.parametrize(("precision", "half"), [("float32", False), ("bfloat16", True), ("auto", bfloat16_pays())])
def test_the_precision_on_a_cpu_is_the_chosen_one_and_averages_are_float32(precision, half):
    seen = set()

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.add((torch.is_autocast_enabled("cpu"), x.dtype))
        return torch.nn.functional.conv3d(x, torch.ones(2, 1, 1, 1, 1))

    found = SlidingWindowInferer(ROI, cpu_precision=precision, activation="softmax")(scan(20, 20, 20).float(), network)
    assert seen == {(half, torch.float32)}
    assert found.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("window_scheme", ["monai", "nnunet"])
def test_a_flat_window_shows_a_2d_network_every_slice_once(window_scheme):
    torch.manual_seed(0)
    image, network, seen = torch.randn(1, 2, 20, 24, 5), torch.nn.Conv2d(2, 3, 3, padding=1), []

    def shown(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return network(x)

    found = SlidingWindowInferer([20, 24, 1], window_scheme=window_scheme)(image, shown)
    assert seen == [(1, 2, 20, 24)] * 5
    torch.testing.assert_close(found, torch.stack([network(image[..., z]) for z in range(5)], dim=-1))
