"""The way of images and labels from the scan's own grid to the network's, and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacingd, SpatialResample

from .agreement import AgreedLabels, along_axes, axes_of, label_at, scores_at
from .part import PART, resample_part

SCORES_AT_ONCE = 2**24  # that are interpolated, of all classes together

# align_corners=False is what puts voxels where their affine says (tests/preprocessing/test_resampling.py)
warnings.filterwarnings("ignore", message="align_corners=False is not compatible with scale_extent=True")


class GridSpacingd(Spacingd):
    """MONAI's Spacingd that leaves entries alone whose name begins with a key's, as MONAI Label's `image_path` does.

    MONAI 1.6 takes every `<key>_*` entry for a metadata dictionary and fails on a string. Of an image that has a `PART`
    that alone is computed.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        for key, mode, padding, align, dtype in self.key_iterator(
            out, self.mode, self.padding_mode, self.align_corners, self.dtype
        ):
            image = out[key]
            if not isinstance(image, MetaTensor) or PART not in image.meta:
                out |= super().__call__({key: image}, lazy=lazy)
                continue
            whole = super().__call__({key: image}, lazy=True)[key]
            assert isinstance(whole, MetaTensor), "as the image is"
            out[key] = resample_part(image, whole, SpatialResample(mode, padding, align, dtype))
        return out


class LabelsOnScanGridd(MapTransform):
    """Turns probabilities on the network's grid into labels on the scan's native grid.

    They are interpolated linearly and only then turned into labels, as nnU-Net does, but in one step and slab by slab,
    so that no array of the scan's size times the number of classes ever exists.

    Args:
        keys: probabilities (classes, *network grid); replaced by labels (1, *scan grid), a MetaTensor with its affine.
        reference: the image that they were computed from, with the affine of the network's grid and, in its metadata,
            `original_affine` and `spatial_shape` of the scan as MONAI's LoadImage leaves them.
        region_order: see `labels_on_grid`.
    """

    def __init__(
        self, keys: KeysCollection, reference: str = "image", region_order: Sequence[int] | None = None
    ) -> None:
        super().__init__(keys)
        self.reference, self.region_order = reference, region_order

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        image = data[self.reference]
        scan_affine, shape = scan_grid(image.meta)
        for key in self.key_iterator(out):
            scores = out[key]
            if _lies_on(scores, scan_affine, shape):
                labels = scores[0].as_tensor()
            elif scores.is_floating_point():
                labels = labels_on_grid(scores, image.affine, scan_affine, shape, region_order=self.region_order)
            else:  # decided already
                labels = labels_on_grid(scores, image.affine, scan_affine, shape, int(scores.max()) + 1)
            meta = {k: v for k, v in image.meta.items() if k != "affine"}
            out[key] = MetaTensor(labels[None], affine=scan_affine, meta=meta)
        return out


class LabelOnImageGridd(MapTransform):
    """Resamples a label map to the grid of its image, linearly per label as nnU-Net does, not by nearest neighbours.

    Args:
        keys: labels (1, *native grid), MetaTensors of 0, 1, 2, ..; replaced by (1, *image grid) on the image's affine.
        reference: the image.
        classes: number of labels, background included.
    """

    def __init__(self, keys: KeysCollection, classes: int, reference: str = "image") -> None:
        super().__init__(keys)
        self.reference, self.classes = reference, classes

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        image = data[self.reference]
        for key in self.key_iterator(out):
            label = out[key]
            found = labels_on_grid(label, label.affine, image.affine, image.shape[1:], self.classes)
            out[key] = MetaTensor(found[None], affine=image.affine, meta={**label.meta, "affine": image.affine})
        return out


def labels_on_grid(
    scores: torch.Tensor,
    affine: torch.Tensor,
    target_affine: torch.Tensor,
    shape: Sequence[int],
    classes: int | None = None,
    region_order: Sequence[int] | None = None,
    slab_voxels: int = 2**21,
) -> torch.Tensor:
    """Find the label of the largest linearly interpolated score at each voxel of another grid.

    It is 0 outside the scores' grid.

    Args:
        scores: (classes, X, Y, Z), any floating type and device; or a label map (1, X, Y, Z) of 0 .. `classes` - 1,
            each voxel of which counts as a score of 1.
        affine: 4 x 4, scores voxel -> world (mm).
        target_affine: 4 x 4, target voxel -> world (mm).
        shape: voxels of the target grid.
        classes: number of labels where `scores` is a label map.
        region_order: label that each of overlapping regions is painted with where its probability is over one half,
            later ones over earlier ones; None where labels exclude each other.
        slab_voxels: how many target voxels are computed at once, fewer of many classes.

    Returns:
        (*shape) on the CPU, uint8 (int16 over 256 classes).
    """
    scores = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
    found = LabelsOnGrid(scores.shape, affine, target_affine, shape, classes, region_order, slab_voxels)
    found.add(scores)
    return found.labels


class _OnGrid:
    """Interpolates scores on another grid slab by slab, while their planes along the first axis become known.

    What later slabs do not touch is dropped.

    Args:
        size: of the scores (classes, X, Y, Z).
        affine: and all others as for `labels_on_grid`.
    """

    def __init__(
        self,
        size: Sequence[int],
        affine: torch.Tensor,
        target_affine: torch.Tensor,
        shape: Sequence[int],
        classes: int | None = None,
        slab_voxels: int = 2**21,
    ) -> None:
        # target voxel -> scores voxel
        self.to_scores = torch.linalg.inv(affine.double().cpu()) @ target_affine.double().cpu()
        self.voxels_meet = classes is not None and _voxels_meet(self.to_scores)
        self.axes = axes_of(self.to_scores)
        self.size = torch.tensor(size[1:], dtype=torch.float64)
        self.classes = classes
        self.known: torch.Tensor | None = None  # planes that slabs to come may touch
        self.first = 0  # of them
        axis = int(self.to_scores[0, :3].abs().argmax())  # of the target, along which the scores' planes follow
        voxels = min(slab_voxels, SCORES_AT_ONCE // (classes or size[0]))
        rows = max(1, voxels // (math.prod(shape) // shape[axis]))
        reached = self._reached(shape)
        slabs = [
            [range(max(a, r.start), min(a + rows, r.stop)) if i == axis else r for i, r in enumerate(reached)]
            for a in range(0, shape[axis], rows)
        ]
        self.covered = [len(r) for r in reached] == list(shape)
        self.open = [(slab, *self._span(slab)) for slab in slabs if all(slab)]

    def _reached(self, shape: Sequence[int]) -> list[range]:
        """Find the box of the target, of so many voxels, outside of which nothing lies in the scores' grid."""
        corners = _coordinates(torch.linalg.inv(self.to_scores), [range(-1, n + 1, n + 1) for n in self.size.int()])
        low, high = corners.amin(dim=(0, 1, 2)).floor(), corners.amax(dim=(0, 1, 2)).ceil()
        return [
            range(min(max(int(a), 0), n), min(max(int(b) + 1, 0), n)) for a, b, n in zip(low, high, shape, strict=True)
        ]

    def _span(self, slab: Sequence[range]) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the part of the scores that a slab of the target touches, from its corners: (low, high)."""
        at = _coordinates(self.to_scores, [range(r[0], r[-1] + 1, max(len(r) - 1, 1)) for r in slab])
        low = at.amin(dim=(0, 1, 2)).floor().clamp(min=0).minimum(self.size - 1).long()
        high = at.amax(dim=(0, 1, 2)).ceil().clamp(min=0).minimum(self.size - 1).long() + 1
        return low, high

    def add(self, planes: torch.Tensor) -> None:
        """Add the scores (classes, n, Y, Z) of the next planes, and interpolate what they suffice for."""
        self.known = planes if self.known is None else torch.cat([self.known, planes], dim=1)
        stop = self.first + self.known.shape[1]
        for slab, low, high in self.open:
            if high[0] <= stop:
                self._interpolate(slab, low, high)
        self.open = [part for part in self.open if part[2][0] > stop]
        first = min([int(low[0]) for _, low, _ in self.open] + [stop])
        self.known, self.first = self.known[:, max(first - self.first, 0) :].clone(), max(first, self.first)

    def _interpolate(self, slab: Sequence[range], low: torch.Tensor, high: torch.Tensor) -> None:
        assert self.known is not None, "there are planes"
        spans = [slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        spans[0] = slice(spans[0].start - self.first, spans[0].stop - self.first)
        part = self.known[(slice(None), *spans)]
        if self.classes is not None and not self.voxels_meet:
            part = F.one_hot(part[0].long(), self.classes).movedim(-1, 0)
        at = _coordinates(self.to_scores, slab)
        values = scores_at(part, at - low, "nearest" if self.voxels_meet else "bilinear")
        # resampling to the network's grid keeps the extent to rounding; what lies further out was never seen
        inside = ((at > -1.0) & (at < self.size)).all(dim=-1)
        self._keep(tuple(slice(r.start, r.stop) for r in slab), values, inside)

    def _keep(self, there: tuple[slice, ...], values: torch.Tensor, inside: torch.Tensor) -> None:
        """Keep what is wanted of a slab that lies `there`.

        Args:
            there: in the target grid.
            values: (classes, *slab).
            inside: (*slab), whether a voxel lies in the scores' grid, on the CPU.
        """
        raise NotImplementedError


class LabelsOnGrid(_OnGrid):
    """Finds labels as `labels_on_grid` does; they are complete when all planes were added."""

    def __init__(
        self,
        size: Sequence[int],
        affine: torch.Tensor,
        target_affine: torch.Tensor,
        shape: Sequence[int],
        classes: int | None = None,
        region_order: Sequence[int] | None = None,
        slab_voxels: int = 2**21,
    ) -> None:
        super().__init__(size, affine, target_affine, shape, classes, slab_voxels)
        self.region_order = region_order
        self.labels = torch.zeros(list(shape), dtype=label_type(classes or size[0], region_order))
        self.chosen: dict[int, torch.Tensor] = {}  # the labels of known planes, as `_choose` counts them

    def _interpolate(self, slab: Sequence[range], low: torch.Tensor, high: torch.Tensor) -> None:
        if self.voxels_meet or self.axes is None:
            super()._interpolate(slab, low, high)
            return
        assert self.known is not None, "there are planes"
        (first, *start), (last, *stop) = low.tolist(), high.tolist()
        within = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        chosen = torch.stack([self._chosen(plane)[within] for plane in range(first, last)])
        at = along_axes(self.to_scores, self.axes, slab)
        found = AgreedLabels(chosen, [along - a for along, a in zip(at, low, strict=True)], self.axes)
        if self.classes is None:
            part = self.known[(slice(None), slice(first - self.first, last - self.first), *within)]
            at_once = SCORES_AT_ONCE // len(part)
            labels = found.decide_rest(
                lambda points: self._choose(scores_at(part, points[None, None])[:, 0, 0]), at_once
            )
        else:
            labels = found.decide_rest(partial(label_at, chosen), SCORES_AT_ONCE)
        if self.region_order is not None:
            labels = torch.tensor([0, *self.region_order], dtype=torch.int16)[labels.long()]
        reached = [(along > -1.0) & (along < n) for along, n in zip(at, self.size, strict=True)]
        x, y, z = (reached[axis] for axis in self.axes)
        there = tuple(slice(r.start, r.stop) for r in slab)
        self.labels[there] = labels.to(self.labels.dtype) * (x[:, None, None] & y[:, None] & z)

    def _chosen(self, plane: int) -> torch.Tensor:
        """Return what `_choose` finds for the voxels of a plane, and forget planes that are dropped."""
        if plane not in self.chosen:
            assert self.known is not None, "there are planes"
            scores = self.known[:, plane - self.first]
            self.chosen[plane] = scores[0].short().cpu() if self.classes is not None else self._choose(scores)
            self.chosen = {i: kept for i, kept in self.chosen.items() if i >= self.first}
        return self.chosen[plane]

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Decide labels; those of regions are numbered from 1 on in their order."""
        order = None if self.region_order is None else range(1, len(self.region_order) + 1)
        return decide_labels(scores, order).short().cpu()

    def _keep(self, there: tuple[slice, ...], values: torch.Tensor, inside: torch.Tensor) -> None:
        decided = values[0] if self.voxels_meet else decide_labels(values, self.region_order)
        self.labels[there] = decided.to(self.labels.dtype).cpu() * inside


class ScoresOnGrid(_OnGrid):
    """Keeps the scores (classes, *shape) themselves, in half precision, with the first axis of a voxel the fastest.

    Args:
        size: and others as for `labels_on_grid`.
        outside: score of each class where the scores' grid does not reach.
    """

    def __init__(
        self,
        size: Sequence[int],
        affine: torch.Tensor,
        target_affine: torch.Tensor,
        shape: Sequence[int],
        outside: Sequence[float],
    ) -> None:
        super().__init__(size, affine, target_affine, shape)
        self.outside = torch.tensor(outside)[:, None, None, None]
        self.scores = torch.empty([size[0], *reversed(shape)], dtype=torch.float16).permute(0, 3, 2, 1)
        if not self.covered:
            self.scores[:] = self.outside.half()

    def _keep(self, there: tuple[slice, ...], values: torch.Tensor, inside: torch.Tensor) -> None:
        self.scores[(slice(None), *there)] = torch.where(inside, values.cpu(), self.outside).half()


def _coordinates(to_other: torch.Tensor, indices: Sequence[range]) -> torch.Tensor:
    """Map the voxels that lie at `indices` of three axes by a matrix (4, 4): (X, Y, Z, 3), in double precision."""
    x, y, z = (
        torch.tensor(along, dtype=torch.float64).view([-1 if i == j else 1 for j in range(3)] + [1]) * to_other[:3, i]
        for i, along in enumerate(indices)
    )
    return x + y + z + to_other[:3, 3]


def decide_labels(scores: torch.Tensor, region_order: Sequence[int] | None) -> torch.Tensor:
    """Decide the labels (*space), integers, of scores (classes, *space).

    Args:
        scores: one a label, of which the largest wins; or probabilities of overlapping regions.
        region_order: the label that each region is painted with where its probability is over one half, later ones
            over earlier ones; None where the labels exclude each other.
    """
    if region_order is None:
        return scores.max(dim=0).indices  # on a CPU, argmax takes ten times as long here (torch 2.13)
    labels = torch.zeros(scores.shape[1:], dtype=torch.int16, device=scores.device)
    for region, label in zip(scores, region_order, strict=True):
        labels[region > 0.5] = label
    return labels


def label_type(classes: int, region_order: Sequence[int] | None) -> torch.dtype:
    """Choose the smallest type that holds what `decide_labels` makes of so many scores."""
    return torch.uint8 if (classes - 1 if region_order is None else max(region_order)) <= 255 else torch.int16


def _voxels_meet(to_other: torch.Tensor) -> bool:
    """Say whether one grid's voxels are another's, turned, flipped or cropped; `to_other` (4, 4) maps their indices."""
    return bool((to_other - to_other.round()).abs().max() < 1e-4)


def scan_grid(meta: Mapping) -> tuple[torch.Tensor, list[int]]:
    """Return affine (4, 4) and voxels of a scan's own grid from the metadata of its image, or of a batch of one."""
    affine = torch.as_tensor(meta["original_affine"], dtype=torch.float64).cpu().reshape(4, 4)
    return affine, [int(n) for n in np.asarray(meta["spatial_shape"]).ravel()[:3]]


def knows_scan_grid(image: MetaTensor) -> bool:
    """Say whether the metadata of a 3D image, or of a batch of one, have the grid of its file."""
    found = [image.meta.get(name) for name in ("original_affine", "spatial_shape", "affine")]
    return all(part is not None for part in found) and [np.asarray(part).size for part in found] == [16, 3, 16]


def _lies_on(labels: torch.Tensor, affine: torch.Tensor, shape: Sequence[int]) -> bool:
    """Say whether labels (1, X, Y, Z) are on a grid already, as their own metadata have it."""
    if not isinstance(labels, MetaTensor) or labels.is_floating_point():
        return False
    return list(labels.shape[1:]) == list(shape) and torch.equal(labels.affine.double().cpu(), affine)


def has_native_voxels(image: MetaTensor) -> bool:
    """Say whether the voxels of an image that `knows_scan_grid` are those of its file, turned or cropped at most."""
    own = image.affine.double().cpu().reshape(4, 4)
    return _voxels_meet(torch.linalg.inv(own) @ scan_grid(image.meta)[0])
