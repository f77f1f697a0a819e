"""The sums of a sliding window, held in blocks that live only while windows still reach them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from ..utils.device import passing_zeros


class Block(NamedTuple):
    """The finished mean scores (classes, planes, rows, ..) of a part of a scan, and where along two axes it lies."""

    planes: slice
    rows: slice
    means: torch.Tensor


class WindowSums:
    """Adds up the weighted scores of windows and gives their means block by block, as soon as no window is to come.

    The borders of the windows cut the first two axes into blocks. A block is made by the first window that reaches it
    and given away behind the last one: what is held is little more than the overlap of two layers of windows. Windows
    come in the order of `starts`, the last axis fastest, so that a voxel's sum has one order whatever the blocks.

    Args:
        starts: where windows begin, along each axis.
        size: voxels of the scan.
        weight: of a window's voxels.
    """

    def __init__(self, starts: Sequence[Sequence[int]], size: Sequence[int], weight: torch.Tensor) -> None:
        self.starts, self.size, self.weight = starts, list(size), weight
        self.cuts = [
            [slice(a, b) for a, b in pairwise(sorted({edge for s in along for edge in (s, s + length)}))]
            for along, length in zip(starts[:2], weight.shape[:2], strict=True)
        ]
        self.blocks: dict[tuple[int, int], torch.Tensor] = {}  # by the first plane and row of each

    def add(self, at: Sequence[slice], rows: slice, scores: torch.Tensor) -> None:
        """Add scores (classes, planes, rows, ..) of some of the rows of the window that lies `at` these voxels."""
        within = slice(at[1].start + rows.start, at[1].start + rows.stop)
        for planes in _touched(self.cuts[0], at[0]):
            own = slice(planes.start - at[0].start, planes.stop - at[0].start)
            for part in _touched(self.cuts[1], within):
                low, high = max(part.start, within.start), min(part.stop, within.stop)
                block = self._block(planes, part, scores)
                block[(slice(None), slice(None), slice(low - part.start, high - part.start), *at[2:])].addcmul_(
                    scores[:, own, low - within.start : high - within.start],
                    self.weight[own, low - at[1].start : high - at[1].start],
                )

    def _block(self, planes: slice, rows: slice, like: torch.Tensor) -> torch.Tensor:
        key = (planes.start, rows.start)
        if key not in self.blocks:
            shape = (len(like), planes.stop - planes.start, rows.stop - rows.start, *self.size[2:])
            self.blocks[key] = passing_zeros(shape, like)
        return self.blocks[key]

    def finished(self, layer: torch.Tensor, first: int, second: int) -> Iterator[Block]:
        """Yield what is finished when the windows that begin at plane `first` and row `second` are done.

        Args:
            layer: what all windows of one first plane weigh together (planes of a window, *the other axes).
            first: their first plane.
            second: their first row.
        """
        ends = [
            next((start for start in along if start > last), n)
            for along, last, n in zip(self.starts[:2], (first, second), self.size[:2], strict=True)
        ]
        for planes in self.cuts[0]:
            for rows in self.cuts[1]:
                key = (planes.start, rows.start)
                if key in self.blocks and planes.stop <= ends[0] and rows.stop <= ends[1]:
                    yield Block(planes, rows, self.blocks.pop(key).div_(self._weights(layer, planes, rows)))

    def _weights(self, layer: torch.Tensor, planes: slice, rows: slice) -> torch.Tensor:
        """Add up what the windows over a block weigh."""
        total = torch.zeros_like(layer[: planes.stop - planes.start, rows])
        for first in self.starts[0]:
            if first <= planes.start < first + len(layer):
                total += layer[planes.start - first : planes.stop - first, rows]
        return total


def _touched(cuts: Sequence[slice], span: slice) -> list[slice]:
    return [cut for cut in cuts if cut.start < span.stop and cut.stop > span.start]
