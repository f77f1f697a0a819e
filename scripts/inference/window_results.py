"""What is kept of a scan's mean scores, block by block: themselves, labels, or labels on another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor

from ..preprocessing.resampling import LabelsOnGrid, decide_labels, label_type, scan_grid
from ..utils.device import passing_zeros
from ..utils.files import scratch_file
from .window_sums import Block

PLANES = 2  # that are handed on to be resampled at once


class Result(Protocol):
    """Takes finished blocks of a scan, from its first plane to its last, and gives what is made of them."""

    def put(self, block: Block) -> None:
        """Take a block."""

    def get(self) -> torch.Tensor:
        """Return (1, channels, *space) when all blocks were put."""


class Storage:
    """Says where scores of a scan are stored, and as what: in the scan's precision on its device, or, large, in half.

    Args:
        like: a tensor on the scan's device and in its precision.
        shape: of all scores of a scan.
        full_precision_gb: up to this size, as if in float32, they are stored in full.
        scratch: folder for a file that holds large ones instead of RAM; None for RAM.
    """

    def __init__(
        self, like: torch.Tensor, shape: Sequence[int], full_precision_gb: float, scratch: str | None = None
    ) -> None:
        small = math.prod(shape) * 4 <= full_precision_gb * 1e9
        self.device, self.dtype = (like.device, like.dtype) if small else (torch.device("cpu"), torch.float16)
        self.scratch = None if small else scratch

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """Allocate a tensor there."""
        if self.scratch is not None:  # which ends with the tensor
            with scratch_file(self.scratch, 2 * math.prod(shape)) as file:
                return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=tuple(shape)))
        return passing_zeros(shape, torch.empty(0, device=self.device, dtype=self.dtype))


class Scores:
    """Keeps the scores (classes, *padded); `inside` are the voxels that are the scan's."""

    def __init__(self, shape: Sequence[int], inside: Sequence[slice], storage: Storage) -> None:
        self.inside, self.scores = inside, storage.empty(shape)

    def put(self, block: Block) -> None:
        """Store a block."""
        self.scores[:, block.planes, block.rows] = block.means.to(self.scores)

    def get(self) -> torch.Tensor:
        """Return the scores of the scan."""
        return self.scores[(None, slice(None), *self.inside)]


class Labels:
    """Decides the labels of each block, and keeps those alone."""

    def __init__(self, shape: Sequence[int], inside: Sequence[slice], region_order: Sequence[int] | None) -> None:
        self.inside, self.region_order = inside, region_order
        self.labels = torch.empty(list(shape[1:]), dtype=label_type(shape[0], region_order))

    def put(self, block: Block) -> None:
        """Decide the labels of a block."""
        self.labels[block.planes, block.rows] = decide_labels(block.means, self.region_order).to(self.labels)

    def get(self) -> torch.Tensor:
        """Return the labels of the scan."""
        return self.labels[(None, None, *self.inside)]


class LabelsOnScan:
    """Brings scores onto the grid of the scan's file plane by plane, and keeps the labels that they have there.

    Args:
        shape: of the scores (classes, *padded).
        inside: voxels of them that are the image's.
        image: (1, C, *space) on the network's grid, with the scan's own grid in its metadata.
        region_order: see `labels_on_grid`.
        storage: of the scores between the network's grid and the scan's.
    """

    def __init__(
        self,
        shape: Sequence[int],
        inside: Sequence[slice],
        image: MetaTensor,
        region_order: Sequence[int] | None,
        storage: Storage,
    ) -> None:
        self.shape, self.inside, self.storage = shape, inside, storage
        self.affine, own = scan_grid(image.meta)
        self.labels = LabelsOnGrid(
            (shape[0], *image.shape[2:]), image.affine.reshape(4, 4), self.affine, own, region_order=region_order
        )
        self.rows: dict[int, torch.Tensor] = {}  # planes whose rows are not all there, by the first

    def put(self, block: Block) -> None:
        """Store a block, and hand its planes on when their last rows are there."""
        first = block.planes.start
        if first not in self.rows:
            self.rows[first] = self.storage.empty((len(block.means), block.means.shape[1], *self.shape[2:]))
        self.rows[first][:, :, block.rows] = block.means.to(self.rows[first])
        if block.rows.stop < self.shape[2]:
            return
        planes = self.rows.pop(first)[(slice(None), slice(None), *self.inside[1:])]
        low, high = (min(max(at, first), block.planes.stop) for at in (self.inside[0].start, self.inside[0].stop))
        for start in range(low, high, PLANES):
            self.labels.add(planes[:, start - first : min(start + PLANES, high) - first])

    def get(self) -> torch.Tensor:
        """Return the labels on the scan's grid, with its affine."""
        return collate_meta_tensor([MetaTensor(self.labels.labels[None], affine=self.affine)])
