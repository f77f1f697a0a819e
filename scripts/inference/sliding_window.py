"""Sliding window in bounded memory: MONAI's windows or nnU-Net's, mirrored or not, averaged as probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations, product

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer

from ..kernels.cpu import bfloat16_pays
from ..preprocessing.resampling import as_stored, decide, label_type
from ..utils.errors import UserError

CPU_PRECISIONS = {"auto": bfloat16_pays, "float32": lambda: False, "bfloat16": lambda: True}
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
        cpu_precision: of the network where it computes on a CPU: "float32", "bfloat16", or "auto", bfloat16 where that
            is measured to be faster. (On a GPU autocast decides, which MONAI's engines switch on for these alone.)
        labels_early: keep labels instead of scores for a MetaTensor whose voxels are those of the file, turned or
            cropped: `LabelsOnScanGridd` interpolates nothing there, and finds the same labels.
        painted: the labels of overlapping regions, as for `LabelsOnScanGridd`.

    Raises:
        UserError: unknown `tiles` or `cpu_precision`, or `mirror_axes` that a window does not have.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        activation: str | None = None,
        mirror_axes: Sequence[int] = (),
        tiles: str = "monai",
        full_precision_gb: float = 1.0,
        cpu_precision: str = "float32",
        labels_early: bool = False,
        painted: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if tiles not in TILES:
            raise UserError(f"tiles is {tiles!r}; expected one of {', '.join(TILES)}.")
        if sorted(mirror_axes) != sorted(set(mirror_axes) & set(range(len(roi_size)))):
            axes = ", ".join(map(str, range(len(roi_size))))
            raise UserError(f"mirror_axes is {list(mirror_axes)}; expected some of {axes}, each once, or [] for none.")
        if cpu_precision not in CPU_PRECISIONS:
            raise UserError(f"cpu_precision is {cpu_precision!r}; expected one of {', '.join(CPU_PRECISIONS)}.")
        self.halves = CPU_PRECISIONS[cpu_precision]
        self.roi_size, self.overlap, self.full_precision_gb = list(roi_size), overlap, full_precision_gb
        self.activate = ACTIVATIONS[activation]
        self.mirrors = [[a + 2 for a in c] for n in range(len(mirror_axes) + 1) for c in combinations(mirror_axes, n)]
        self.starts, self.weights = TILES[tiles]
        self.labels_early, self.painted = labels_early, painted

    def __call__(self, inputs: torch.Tensor, network: Callable, *args, **kwargs) -> torch.Tensor:
        """(N, C, *space) -> (N, classes, *space), or labels (N, 1, *space) where `labels_early` allows them.

        `network` maps windows (1, C, *roi) to logits (1, classes, *roi).
        """
        early = self.labels_early and as_stored(inputs)
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return torch.cat([self._one(image[None], partial(network, *args, **kwargs), early) for image in plain])

    def _predict(self, window: torch.Tensor, network: Callable) -> torch.Tensor:
        """(1, C, *roi) -> (classes, *roi), in the window's precision, whatever the network's is."""
        flat, total = self.roi_size[-1] == 1, None
        halved = window.device.type == "cpu" and self.halves()
        for axes in self.mirrors:
            shown = window.flip(axes) if axes else window
            with torch.autocast("cpu", torch.bfloat16) if halved else nullcontext():
                logits = network(shown[..., 0])[..., None] if flat else network(shown)
            scores = self.activate(logits.to(window.dtype))
            total = scores if total is None else total + scores.flip(axes)
        return (total / len(self.mirrors) if self.mirrors[1:] else total)[0]

    def _room(self, shape: Sequence[int], like: torch.Tensor, early: bool) -> torch.Tensor:
        """Where to keep what becomes of a scan's scores (classes, *space)."""
        if early:
            return torch.empty((1, *shape[1:]), dtype=label_type(shape[0], self.painted))
        small = math.prod(shape) * 4 <= self.full_precision_gb * 1e9
        device, dtype = (like.device, like.dtype) if small else ("cpu", torch.float16)
        return torch.empty(shape, device=device, dtype=dtype)

    def _one(self, image: torch.Tensor, network: Callable, early: bool) -> torch.Tensor:
        size = image.shape[2:]
        missing = [max(r - n, 0) for r, n in zip(self.roi_size, size, strict=True)]
        if any(missing):
            image = F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        padded = image.shape[2:]
        starts = [self.starts(n, r, self.overlap) for n, r in zip(padded, self.roi_size, strict=True)]
        in_plane = [
            tuple(slice(a, a + r) for a, r in zip(at, self.roi_size[1:], strict=True)) for at in product(*starts[1:])
        ]
        weight = self.weights(self.roi_size).to(image)
        rows = self.roi_size[0]
        layer = weight.new_zeros((rows, *padded[1:]))  # what all windows with the same first planes weigh
        for window in in_plane:
            layer[(slice(None), *window)] += weight

        done = 0  # planes that are stored
        result = sums = None
        weights = torch.zeros_like(layer)
        for first, following in zip(starts[0], [*starts[0][1:], padded[0]], strict=True):
            for window in in_plane:
                scores = self._predict(image[(slice(None), slice(None), slice(first, first + rows), *window)], network)
                if result is None:
                    sums = image.new_zeros((scores.shape[0], rows, *padded[1:]))
                    result = self._room((scores.shape[0], *padded), image, early)
                sums[(slice(None), slice(None), *window)].addcmul_(scores, weight)
            weights += layer
            finished = min(following - done, rows)
            means = sums[:, :finished].div_(weights[:finished])
            kept = decide(means, self.painted)[None] if early else means
            result[:, done : done + finished] = kept.to(result)
            for rolling in (sums.movedim(1, 0), weights):
                rolling[: rows - finished] = rolling[finished:].clone()
                rolling[rows - finished :] = 0
            done += finished
        low = [m // 2 for m in missing]
        return result[(None, slice(None), *(slice(a, a + n) for a, n in zip(low, size, strict=True)))]


# ---- where windows of r voxels begin along an axis of n, in rising order, and the weights of a window's voxels


def monai_starts(n: int, r: int, overlap: float) -> list[int]:
    """A fixed stride; the last window is shifted back into the scan."""
    step = r if r == n else max(int(r * (1 - overlap)), 1)
    return sorted({window[0].start for window in dense_patch_slices([n], [r], [step])})


def monai_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """A Gaussian about the middle of the window, of a standard deviation of 1/8 of it, at least 0.001."""
    return compute_importance_map(tuple(roi_size), mode="gaussian", dtype=torch.float64)


def nnunet_starts(n: int, r: int, overlap: float) -> list[int]:
    """As few as leave no gap wider than the stride, evenly spaced and rounded.

    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_compute_steps_for_sliding_window`.
    """
    count = math.ceil((n - r) / max(r * (1 - overlap), 1)) + 1
    return [round((n - r) / max(count - 1, 1) * i) for i in range(count)]


def nnunet_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """A Gaussian about voxel n // 2, of a standard deviation of n / 8, largest 1; 4e-11 in the corner of 128^3.

    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_get_gaussian`.
    """
    axes = torch.meshgrid([(torch.arange(n).double() - n // 2) / (n / 8) for n in roi_size], indexing="ij")
    return sum(-axis.square() / 2 for axis in axes).exp()


TILES = {"monai": (monai_starts, monai_weights), "nnunet": (nnunet_starts, nnunet_weights)}
