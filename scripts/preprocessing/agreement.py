"""Labels between voxels that agree: there nothing has to be interpolated.

An interpolated score is a mean of those of the eight voxels around, with weights that are not negative. Where one label
has the largest score at all eight, it has the largest mean, whatever the weights: which is the case nearly everywhere
but on the surfaces of organs. Only there are all classes interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F

MIXED = -1  # where voxels disagree
HALF_WAY = 1e-5  # of a voxel


def axes_of(to_other: torch.Tensor) -> list[int] | None:
    """Return the axis of another grid that each axis of a grid follows; None where one lies tilted in the other.

    Args:
        to_other: (4, 4), maps the one grid's indices to the other's.
    """
    turn = to_other[:3, :3].abs()
    axes = turn.argmax(dim=0).tolist()
    straight = turn[axes, range(3)]
    if sorted(axes) != [0, 1, 2] or (turn.sum(dim=0) - straight).max() > 1e-6 * straight.min():
        return None
    return axes


def along_axes(to_other: torch.Tensor, axes: Sequence[int], indices: Sequence[range]) -> list[torch.Tensor]:
    """Map the voxels at `indices` of three axes to another grid, and say where they lie along each axis of that one."""
    found = {
        axis: torch.tensor(along, dtype=torch.float64) * to_other[axis, i] + to_other[axis, 3]
        for i, (axis, along) in enumerate(zip(axes, indices, strict=True))
    }
    return [found[axis] for axis in range(3)]


class AgreedLabels:
    """Finds labels on a grid whose axes are those of the scores' grid, turned or flipped.

    Args:
        chosen: (X, Y, Z) int16, the label of each voxel of the scores.
        at: per axis of the scores, where the voxels of the other grid lie along it (double).
        axes: axis of the scores that each axis of the other grid follows.
    """

    def __init__(self, chosen: torch.Tensor, at: Sequence[torch.Tensor], axes: Sequence[int]) -> None:
        self.at = [along.clamp(0, n - 1) for along, n in zip(at, chosen.shape, strict=True)]
        self.axes = axes
        found = _agreement(chosen)
        for axis, along in enumerate(self.at):
            found = found.index_select(axis, along.long())
        self.labels = found.permute(*axes).contiguous()

    def decide_rest(self, decide: Callable[[torch.Tensor], torch.Tensor], at_once: int) -> torch.Tensor:
        """Return the labels (X, Y, Z) of the other grid, of which those in doubt are decided.

        Args:
            decide: maps points (n, 3), in voxels of the scores, to labels (n).
            at_once: so many points at most.
        """
        flat = self.labels.view(-1)
        for doubtful in (flat == MIXED).nonzero()[:, 0].split(at_once):
            index = torch.unravel_index(doubtful, self.labels.shape)
            points = torch.empty(len(doubtful), 3, dtype=torch.float64)
            for axis, along in zip(self.axes, index, strict=True):
                points[:, axis] = self.at[axis][along]
            flat[doubtful] = decide(points).to(flat)
        return self.labels


def _agreement(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that a voxel and the next ones along all axes have in common, else MIXED."""
    low = high = labels
    for axis, n in enumerate(labels.shape):
        after = torch.arange(1, n + 1).clamp(max=n - 1)
        low = torch.minimum(low, low.index_select(axis, after))
        high = torch.maximum(high, high.index_select(axis, after))
    return torch.where(low == high, low, MIXED)


def scores_at(scores: torch.Tensor, points: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Interpolate scores (classes, X, Y, Z) at points (I, J, K, 3), in their voxels: (classes, I, J, K), float32.

    Args:
        scores: of any kind of number, on any device.
        points: in double precision; beyond the outer voxels their scores hold.
        mode: "bilinear", which is linear along each of the axes, or "nearest".
    """
    extent = torch.tensor(scores.shape[1:], dtype=torch.float64)
    grid = ((2 * points + 1) / extent - 1).flip(-1)[None].float()  # grid_sample's, align_corners=False
    return F.grid_sample(
        scores[None].float(), grid.to(scores.device), mode=mode, padding_mode="border", align_corners=False
    )[0]


def label_at(labels: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Decide the label (n) at points (n, 3) between voxels of a label map (X, Y, Z), each of which is a score of 1.

    It is that which `scores_at` finds largest, at a cost that does not depend on how many labels there are. Half way
    between two voxels it is the later one's: opposite surfaces of an organ move alike, so that none shrinks or grows.
    """
    first = points.floor().long()
    share = (points - first + HALF_WAY).float()
    corners, weights = [], []
    for corner in product((0, 1), repeat=3):
        x, y, z = ((first[:, i] + step).clamp(max=labels.shape[i] - 1) for i, step in enumerate(corner))
        corners.append(labels[x, y, z])
        weights.append(torch.stack([share[:, i] if step else 1 - share[:, i] for i, step in enumerate(corner)]).prod(0))
    there, weight = torch.stack(corners), torch.stack(weights)
    votes = torch.stack([(weight * (there == one)).sum(0) for one in there])
    return torch.where(votes == votes.amax(0), there, torch.iinfo(there.dtype).max).amin(0)
