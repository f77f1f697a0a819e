"""The sliding window in bounded memory: MONAI's windows or nnU-Net's, mirrored or not, averaged as probabilities."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer

from ..kernels.precision import CpuPrecision
from ..preprocessing.resampling import decide_labels, has_native_voxels, label_type
from ..utils.errors import UserError

Network = Callable[..., torch.Tensor]

ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda logits: logits,
    "softmax": partial(torch.softmax, dim=1),
    "sigmoid": torch.sigmoid,
}


class SlidingWindowInferer(Inferer):
    """A Gaussian-weighted sliding window, with sums kept only for the planes that windows still reach.

    Windows advance along the first spatial axis; planes that no further window touches are divided by their weights and
    stored. Where the result would be large it is stored in half precision, as nnU-Net does; the sums themselves always
    have the input's precision. With `window_scheme="monai"` and no activation, windows, weights and, below the limit,
    results are those of `monai.inferers.SlidingWindowInferer(mode="gaussian")`.

    Args:
        roi_size: voxels of a window; one voxel along the last axis gives a 2D network slices.
        overlap: share of a window that the next one covers again.
        activation: kind of scores that windows and mirrored copies average: "softmax" or, for regions, "sigmoid"
            probabilities, as nnU-Net v1 does; None averages what the network gives, as MONAI does.
        mirror_axes: spatial axes 0, 1, .. along whose every combination a window is mirrored too (nnU-Net's test-time
            augmentation, 2^n passes); those that training mirrored.
        window_scheme: whose windows and weights, "monai" or "nnunet".
        full_precision_gb: up to this size of the result it is stored in the input's precision, on its device;
            above it in float16 in RAM.
        cpu_precision: precision of a network on a CPU: "float32", "bfloat16", or "auto", bfloat16 where that
            is measured to be faster. (On a GPU autocast decides, which MONAI's engines switch on for these alone.)
        labels_early: keep labels instead of scores for a MetaTensor whose voxels are those of the file, turned or
            cropped: `LabelsOnScanGridd` interpolates nothing there, and finds the same labels.
        region_order: the labels of overlapping regions, as for `LabelsOnScanGridd`.

    Raises:
        UserError: unknown `window_scheme` or `cpu_precision`, or `mirror_axes` that a window does not have.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        activation: str | None = None,
        mirror_axes: Sequence[int] = (),
        window_scheme: str = "monai",
        full_precision_gb: float = 1.0,
        cpu_precision: str = "float32",
        labels_early: bool = False,
        region_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if window_scheme not in WINDOW_SCHEMES:
            raise UserError(f"window_scheme is {window_scheme!r}; expected one of {', '.join(WINDOW_SCHEMES)}.")
        if sorted(mirror_axes) != sorted(set(mirror_axes) & set(range(len(roi_size)))):
            axes = ", ".join(map(str, range(len(roi_size))))
            raise UserError(f"mirror_axes is {list(mirror_axes)}; expected some of {axes}, each once, or [] for none.")
        self.cpu_precision = CpuPrecision(cpu_precision)
        self.roi_size, self.overlap, self.full_precision_gb = list(roi_size), overlap, full_precision_gb
        self.activate = ACTIVATIONS[activation]
        counts = range(1, len(mirror_axes) + 1)
        self.mirrored = [[a + 2 for a in axes] for n in counts for axes in combinations(mirror_axes, n)]
        self.starts, self.weights = WINDOW_SCHEMES[window_scheme]
        self.labels_early, self.region_order = labels_early, region_order

    def __call__(self, inputs: torch.Tensor, network: Network, *args, **kwargs) -> torch.Tensor:
        """Segment scans (N, C, *space).

        Args:
            inputs: scans.
            network: maps windows (1, C, *roi) to logits (1, classes, *roi).
            args: further arguments of the network.
            kwargs: those by name.

        Returns:
            Scores (N, classes, *space), or labels (N, 1, *space) where `labels_early` allows them.
        """
        early = self.labels_early and has_native_voxels(inputs)
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return torch.cat([self._one(image[None], partial(network, *args, **kwargs), early) for image in plain])

    def _predict(self, window: torch.Tensor, network: Network) -> torch.Tensor:
        """Average the scores (classes, *roi) of a window (1, C, *roi) and its mirrored copies."""
        total = self._scores(window, network)
        for axes in self.mirrored:
            total = total + self._scores(window.flip(axes), network).flip(axes)
        return (total / (len(self.mirrored) + 1) if self.mirrored else total)[0]

    def _scores(self, window: torch.Tensor, network: Network) -> torch.Tensor:
        """Compute the scores (1, classes, *roi) of a window, in its precision, whatever the network's is."""
        with self.cpu_precision.autocast(window.device):
            logits = network(window[..., 0])[..., None] if self.roi_size[-1] == 1 else network(window)
        return self.activate(logits.to(window.dtype))

    def _room(self, shape: Sequence[int], like: torch.Tensor, early: bool) -> torch.Tensor:
        """Allocate what a scan's scores (classes, *space) or, where they are decided `early`, its labels need."""
        if early:
            return torch.empty((1, *shape[1:]), dtype=label_type(shape[0], self.region_order))
        small = math.prod(shape) * 4 <= self.full_precision_gb * 1e9
        device, dtype = (like.device, like.dtype) if small else ("cpu", torch.float16)
        return torch.empty(shape, device=device, dtype=dtype)

    def _one(self, image: torch.Tensor, network: Network, early: bool) -> torch.Tensor:
        """Segment one scan (1, C, *space): scores (1, classes, *space) or, `early`, labels (1, 1, *space)."""
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
        result: torch.Tensor | None = None
        sums: torch.Tensor | None = None
        weights = torch.zeros_like(layer)
        for first, following in zip(starts[0], [*starts[0][1:], padded[0]], strict=True):
            for window in in_plane:
                scores = self._predict(image[(slice(None), slice(None), slice(first, first + rows), *window)], network)
                if result is None or sums is None:
                    sums = image.new_zeros((scores.shape[0], rows, *padded[1:]))
                    result = self._room((scores.shape[0], *padded), image, early)
                sums[(slice(None), slice(None), *window)].addcmul_(scores, weight)
            assert result is not None, "there is a window in every plane"
            assert sums is not None, "they are made together"
            weights += layer
            finished = min(following - done, rows)
            means = sums[:, :finished].div_(weights[:finished])
            kept = decide_labels(means, self.region_order)[None] if early else means
            result[:, done : done + finished] = kept.to(result)
            for rolling in (sums.movedim(1, 0), weights):
                rolling[: rows - finished] = rolling[finished:].clone()
                rolling[rows - finished :] = 0
            done += finished
        assert result is not None, "there is a window in every scan"
        low = [m // 2 for m in missing]
        return result[(None, slice(None), *(slice(a, a + n) for a, n in zip(low, size, strict=True)))]


def monai_starts(n: int, r: int, overlap: float) -> list[int]:
    """List where windows of r voxels begin along an axis of n: a fixed stride, the last one shifted back inside."""
    step = r if r == n else max(int(r * (1 - overlap)), 1)
    return sorted({window[0].start for window in dense_patch_slices([n], [r], [step])})


def monai_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """Weigh a window's voxels by a Gaussian about its middle, of a standard deviation of 1/8 of it, at least 0.001."""
    return compute_importance_map(tuple(roi_size), mode="gaussian", dtype=torch.float64)


def nnunet_starts(n: int, r: int, overlap: float) -> list[int]:
    """List where windows of r voxels begin along an axis of n: as few as the stride allows, evenly spaced and rounded.

    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_compute_steps_for_sliding_window`.
    """
    count = math.ceil((n - r) / max(r * (1 - overlap), 1)) + 1
    return [round((n - r) / max(count - 1, 1) * i) for i in range(count)]


def nnunet_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """Weigh a window's voxels by a Gaussian about voxel n // 2, of a standard deviation of n / 8.

    The largest weight is 1, that in the corner of 128^3 voxels 4e-11.
    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_get_gaussian`.
    """
    axes = torch.meshgrid([(torch.arange(n).double() - n // 2) / (n / 8) for n in roi_size], indexing="ij")
    return functools.reduce(torch.add, (-axis.square() / 2 for axis in axes)).exp()


WINDOW_SCHEMES: dict[str, tuple[Callable[[int, int, float], list[int]], Callable[[Sequence[int]], torch.Tensor]]] = {
    "monai": (monai_starts, monai_weights),
    "nnunet": (nnunet_starts, nnunet_weights),
}
