"""The largest connected components of a label map, by its runs of equal voxels: a CT of 1000 slices in a second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def keep_largest(labels: np.ndarray, steps: Sequence[Sequence[int]]) -> np.ndarray:
    """Turn into background (0) what lies outside the largest component of each step's labels, step after step.

    Voxels that share a face are connected; where several components are the largest, all of them stay (nnU-Net's rule).
    Runs are few where voxels are many: 15 labels of a CT take less time and memory than labelling its voxels once, see
    docs/benchmarks/components_2-core-cpu_2026-11-21.md.

    Args:
        labels: (X, Y, Z) integers; not changed.
        steps: labels that count as one object in each step.

    Returns:
        (X, Y, Z) of the same type.
    """
    starts, lengths, values = _runs(labels)
    touching = _touching(starts, lengths, values, labels.shape)
    for members in steps:
        inside = np.isin(values, members)
        edges = touching[:, inside[touching].all(axis=0)]
        graph = coo_array((np.ones(edges.shape[1], bool), edges), shape=(len(values), len(values)))
        component = connected_components(graph, directed=False)[1]
        sizes = np.bincount(component, weights=lengths * inside)
        values[inside & (sizes[component] < sizes.max())] = 0
    return np.repeat(values, lengths).reshape(labels.shape)


def _runs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List stretches of equal voxels along the last axis, in order: first flat index, length in voxels, label."""
    voxels = labels.ravel()
    first = np.empty(len(voxels), bool)
    np.not_equal(voxels[1:], voxels[:-1], out=first[1:])
    first[:: labels.shape[-1]] = True  # a run ends with its row
    starts = np.flatnonzero(first)
    return starts, np.diff(starts, append=len(voxels)), voxels[starts]


def _touching(starts: np.ndarray, lengths: np.ndarray, values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Pair the runs of foreground that share a face: (2, pairs), by their places in the order of runs."""
    runs = np.flatnonzero(values)
    starts, ends = starts[runs], (starts + lengths)[runs]
    _, rows, columns = shape
    following = np.flatnonzero((starts[1:] == ends[:-1]) & (starts[1:] % columns > 0))
    pairs = [np.stack([following, following + 1])]
    last_row = starts // columns % rows == rows - 1
    for shift, nothing_there in ((columns, last_row), (rows * columns, np.zeros_like(last_row))):
        # moved onto the next row or plane, a run touches those from `low` to before `high`
        low = np.searchsorted(ends, starts + shift, side="right")
        high = np.searchsorted(starts, ends + shift, side="left")
        count = np.where(nothing_there, 0, high - low)
        one = np.repeat(np.arange(len(runs)), count)
        other = np.arange(len(one)) - np.repeat(count.cumsum() - count - low, count)
        pairs.append(np.stack([one, other]))
    return runs[np.concatenate(pairs, axis=1)]
