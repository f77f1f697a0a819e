"""What segmenting a scan takes of memory at most, known before anything of that size is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..data.grid import resampling_bytes
from ..preprocessing.part import part_shape
from ..utils.device import total_memory
from ..utils.errors import UserError
from .sliding_window import SlidingWindowInferer
from .window_results import PLANES

PROCESS = 1.2e9  # bytes of Python with its libraries, a network's weights, and holes in what is kept
FEATURES = 9 * 32  # numbers a voxel that a network holds at once
SLAB = 0.3e9  # bytes while labels are decided on a part of the scan's grid, without the scores that they are made from:
SLAB_PLANES, SLAB_BYTES = PLANES + 3, 8  # as many planes of the network's grid, twice in half precision, once in full
SPLINE, AT_VOXEL = 16, 30  # bytes of a cubic spline a stored voxel, and of its values a voxel of the network's grid
WORTH_SAYING = 2e9  # bytes

logger = logging.getLogger("mednext")


class CheckMemoryd(MapTransform):
    """Says what segmenting a scan takes of memory at most, and refuses one for which this computer has too little.

    Args:
        keys: images (C, X, Y, Z) on their stored voxels in RAS order, cropped if they are to be.
        spacing: of the network's grid in mm.
        classes: of the network's output.
        inferer: that will segment them in this memory; None where a GPU does, in its own.

    Raises:
        UserError: the computer has less; the message names the file.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float],
        classes: int,
        inferer: SlidingWindowInferer | None,
    ) -> None:
        super().__init__(keys)
        self.spacing, self.classes, self.inferer = list(spacing), classes, inferer

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            edges = zip(part_shape(image), image.pixdim.tolist(), self.spacing, strict=True)
            grid = [max(round(n * a / b), 1) for n, a, b in edges]
            stored = image[0].numel()
            spline = SPLINE * math.prod(part_shape(image)) + AT_VOXEL * math.prod(grid)
            needed = max(resampling_bytes(grid, len(image)), spline) + 4 * len(image) * stored
            if self.inferer is not None:
                needed = max(needed, window_bytes(self.inferer, grid, len(image), self.classes) + 2 * stored)
            self._tell(str(image.meta.get("filename_or_obj", "the image")), grid, PROCESS + needed)
        return data

    def _tell(self, name: str, grid: Sequence[int], needed: float) -> None:
        on_grid = " x ".join(map(str, grid))
        if needed > (memory := total_memory()):
            raise UserError(
                f"{name}: its {on_grid} voxels of the network's grid with {self.classes} classes take up to"
                f" {needed / 1e9:.3g} GB of memory, of which this computer has {memory / 1e9:.3g}: crop the scan, use a"
                " network of a coarser grid, or a larger computer."
            )
        if needed > WORTH_SAYING:
            logger.info("%s: %s voxels on the network's grid, at most %.3g GB of memory", name, on_grid, needed / 1e9)


def window_bytes(inferer: SlidingWindowInferer, size: Sequence[int], channels: int, classes: int) -> float:
    """Count the bytes of image, sums, scores that wait for their slab, and a window, while windows are added up.

    Args:
        inferer: the sliding window.
        size: voxels of the scan on the network's grid.
        channels: of the image.
        classes: of the scores.
    """
    roi = inferer.roi_size
    size = [max(n, r) for n, r in zip(size, roi, strict=True)]
    planes = inferer.starts(size[0], roi[0], inferer.overlap)
    following = [*planes[1:], size[0]]
    kept = [max(a + roi[0] - b, 0) for a, b in zip(planes, following, strict=True)]  # behind each layer of windows
    waiting = 4 if classes * math.prod(size) * 4 <= inferer.full_precision_gb * 1e9 else 2  # bytes of a stored score
    row = max(
        max(4 * before, 4 * after + waiting * min(end - start, roi[0]))
        for before, after, start, end in zip([0, *kept], kept, planes, following, strict=False)
    )
    rows = max(4 * roi[0] * roi[1] + row * (size[1] - roi[1]), row * size[1])
    scores = classes * (2 if inferer.mirrored else 1)
    window = math.prod(roi) * (FEATURES * getattr(torch, inferer.cpu_precision.name()).itemsize + 4 * scores)
    slab = SLAB + SLAB_PLANES * SLAB_BYTES * classes * math.prod(size[1:])
    return 4 * channels * math.prod(size) + classes * rows * math.prod(size[2:]) + window + slab
