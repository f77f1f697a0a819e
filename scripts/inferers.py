"""Sliding window in bounded memory: MONAI's windows or nnU-Net's, mirrored or not, averaged as probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer

from .errors import UserError

ACTIVATIONS = {None: lambda logits: logits, "softmax": partial(torch.softmax, dim=1), "sigmoid": torch.sigmoid}


class SlabSlidingWindowInferer(Inferer):
    """A Gaussian-weighted sliding window, with sums kept only for the planes that windows still reach.

    Windows advance along the first spatial axis; planes that no further window touches are divided by their weights and
    stored. Where the result would be large it is stored in half precision, as nnU-Net does; the sums themselves always
    have the input's precision. With `tiles="monai"` and no activation, windows, weights and, below the limit, results
    are those of `monai.inferers.SlidingWindowInferer(mode="gaussian")`.

    Args:
        roi_size: voxels of a window; one voxel along the last axis gives a 2D network slices.
        overlap: share of a window that the next one covers again.
        activation: what is averaged over windows and mirrored copies: "softmax" or, for regions, "sigmoid"
            probabilities, as nnU-Net v1 does; None averages what the network gives, as MONAI does.
        mirror_axes: spatial axes 0, 1, .. along whose every combination a window is mirrored too (nnU-Net's test-time
            augmentation, 2^n passes); those that training mirrored.
        tiles: whose windows and weights, see TILES.
        full_precision_gb: up to this size of the result it is stored in the input's precision, on its device;
            above it in float16 in RAM.

    Raises:
        UserError: unknown `tiles`, or `mirror_axes` that a window does not have.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        activation: str | None = None,
        mirror_axes: Sequence[int] = (),
        tiles: str = "monai",
        full_precision_gb: float = 1.0,
    ) -> None:
        super().__init__()
        if tiles not in TILES:
            raise UserError(f"tiles is {tiles!r}; expected one of {', '.join(TILES)}.")
        if sorted(mirror_axes) != sorted(set(mirror_axes) & set(range(len(roi_size)))):
            axes = ", ".join(map(str, range(len(roi_size))))
            raise UserError(f"mirror_axes is {list(mirror_axes)}; expected some of {axes}, each once, or [] for none.")
        self.roi_size, self.overlap, self.full_precision_gb = list(roi_size), overlap, full_precision_gb
        self.activate = ACTIVATIONS[activation]
        self.mirrors = [[a + 2 for a in c] for n in range(len(mirror_axes) + 1) for c in combinations(mirror_axes, n)]
        self.windows, self.weights = TILES[tiles]

    def __call__(self, inputs: torch.Tensor, network: Callable, *args, **kwargs) -> torch.Tensor:
        """(N, C, *space) -> (N, classes, *space); `network` maps windows (1, C, *roi) to logits (1, classes, *roi)."""
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return torch.cat([self._one(image[None], partial(network, *args, **kwargs)) for image in plain])

    def _predict(self, window: torch.Tensor, network: Callable) -> torch.Tensor:
        """(1, C, *roi) -> (classes, *roi), in the window's precision, whatever the network's is."""
        total, flat = 0, self.roi_size[-1] == 1
        for axes in self.mirrors:
            shown = window.flip(axes)
            logits = (network(shown[..., 0])[..., None] if flat else network(shown)).to(window.dtype)
            total = total + self.activate(logits).flip(axes)[0]
        return total / len(self.mirrors)

    def _one(self, image: torch.Tensor, network: Callable) -> torch.Tensor:
        size = image.shape[2:]
        missing = [max(r - n, 0) for r, n in zip(self.roi_size, size, strict=True)]
        if any(missing):
            image = F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        padded = image.shape[2:]
        windows = self.windows(padded, self.roi_size, self.overlap)
        weight = self.weights(self.roi_size).to(image)

        rows = self.roi_size[0]
        done = 0  # planes that are stored
        result = sums = weights = None
        for number, window in enumerate(windows):
            scores = self._predict(image[(slice(None), slice(None), *window)], network)
            if result is None:
                small = scores.shape[0] * padded.numel() * 4 <= self.full_precision_gb * 1e9
                device, dtype = (image.device, image.dtype) if small else ("cpu", torch.float16)
                result = torch.empty((scores.shape[0], *padded), device=device, dtype=dtype)
                sums = image.new_zeros((scores.shape[0], rows, *padded[1:]))
                weights = weight.new_zeros((rows, *padded[1:]))
            sums[(slice(None), slice(None), *window[1:])] += scores * weight
            weights[(slice(None), *window[1:])] += weight
            following = windows[number + 1][0].start if number + 1 < len(windows) else padded[0]
            finished = min(following - done, rows)
            if finished:
                result[:, done : done + finished] = (sums[:, :finished] / weights[:finished]).to(result)
                for rolling in (sums.movedim(1, 0), weights):
                    rolling[: rows - finished] = rolling[finished:].clone()
                    rolling[rows - finished :] = 0
                done += finished
        low = [m // 2 for m in missing]
        return result[(None, slice(None), *(slice(a, a + n) for a, n in zip(low, size, strict=True)))]


# ---- windows of a padded scan, in the order of their first plane, and the weights of a window's voxels


def monai_windows(size: Sequence[int], roi_size: Sequence[int], overlap: float) -> list[tuple[slice, ...]]:
    """A fixed stride; the last window is shifted back into the scan."""
    steps = [r if r == n else max(int(r * (1 - overlap)), 1) for r, n in zip(roi_size, size, strict=True)]
    return sorted(dense_patch_slices(size, roi_size, steps), key=lambda window: window[0].start)


def monai_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """A Gaussian about the middle of the window, of a standard deviation of 1/8 of it, at least 0.001."""
    return compute_importance_map(tuple(roi_size), mode="gaussian", dtype=torch.float64)


def nnunet_windows(size: Sequence[int], roi_size: Sequence[int], overlap: float) -> list[tuple[slice, ...]]:
    """As few as leave no gap wider than the stride, evenly spaced and rounded.

    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_compute_steps_for_sliding_window`.
    """
    starts = []
    for n, r in zip(size, roi_size, strict=True):
        count = math.ceil((n - r) / max(r * (1 - overlap), 1)) + 1
        starts.append([round((n - r) / max(count - 1, 1) * i) for i in range(count)])
    return [tuple(slice(a, a + r) for a, r in zip(start, roi_size, strict=True)) for start in product(*starts)]


def nnunet_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """A Gaussian about voxel n // 2, of a standard deviation of n / 8, largest 1; 4e-11 in the corner of 128^3.

    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_get_gaussian`.
    """
    axes = torch.meshgrid([(torch.arange(n).double() - n // 2) / (n / 8) for n in roi_size], indexing="ij")
    return sum(-axis.square() / 2 for axis in axes).exp()


TILES = {"monai": (monai_windows, monai_weights), "nnunet": (nnunet_windows, nnunet_weights)}
