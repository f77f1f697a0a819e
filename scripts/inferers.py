"""Sliding window in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer


class SlabSlidingWindowInferer(Inferer):
    """MONAI's Gaussian-weighted sliding window, with sums kept only for the planes that windows still reach.

    Windows advance along the first spatial axis; planes that no further window touches are divided by their weights and
    stored. Where the result would be large it is stored in half precision, as nnU-Net does; the sums themselves always
    have the input's precision. Windows, weights and, below the limit, results are those of
    `monai.inferers.SlidingWindowInferer(mode="gaussian")`.

    Args:
        roi_size: voxels of a window.
        overlap: share of a window that the next one covers again.
        full_precision_gb: up to this size of the result it is stored in the input's precision, on its device;
            above it in float16 in RAM.
    """

    def __init__(self, roi_size: Sequence[int], overlap: float = 0.5, full_precision_gb: float = 1.0) -> None:
        super().__init__()
        self.roi_size, self.overlap, self.full_precision_gb = list(roi_size), overlap, full_precision_gb

    def __call__(self, inputs: torch.Tensor, network: Callable, *args, **kwargs) -> torch.Tensor:
        """(N, C, *space) -> (N, classes, *space); `network` maps windows (1, C, *roi) to (1, classes, *roi)."""
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        return torch.cat([self._one(image[None], network, *args, **kwargs) for image in plain])

    def _one(self, image: torch.Tensor, network: Callable, *args, **kwargs) -> torch.Tensor:
        size = image.shape[2:]
        missing = [max(r - n, 0) for r, n in zip(self.roi_size, size, strict=True)]
        if any(missing):
            image = F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        padded = image.shape[2:]
        steps = [
            r if r == n else max(int(r * (1 - self.overlap)), 1) for r, n in zip(self.roi_size, padded, strict=True)
        ]
        windows = sorted(dense_patch_slices(padded, self.roi_size, steps), key=lambda window: window[0].start)
        weight = compute_importance_map(tuple(self.roi_size), mode="gaussian", device=image.device, dtype=image.dtype)

        rows = self.roi_size[0]
        done = 0  # planes that are stored
        result = sums = weights = None
        for number, window in enumerate(windows):
            logits = network(image[(slice(None), slice(None), *window)], *args, **kwargs)[0]  # (classes, *roi)
            if result is None:
                small = logits.shape[0] * padded.numel() * 4 <= self.full_precision_gb * 1e9
                device, dtype = (image.device, image.dtype) if small else ("cpu", torch.float16)
                result = torch.empty((logits.shape[0], *padded), device=device, dtype=dtype)
                sums = image.new_zeros((logits.shape[0], rows, *padded[1:]))
                weights = weight.new_zeros((rows, *padded[1:]))
            sums[(slice(None), slice(None), *window[1:])] += logits * weight
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
