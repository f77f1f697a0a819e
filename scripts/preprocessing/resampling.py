"""The way of images and labels from the scan's own grid to the network's, and back."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacingd

# align_corners=False is what puts voxels where their affine says (tests/preprocessing/test_resampling.py)
warnings.filterwarnings("ignore", message="align_corners=False is not compatible with scale_extent=True")


class GridSpacingd(Spacingd):
    """MONAI's Spacingd that leaves entries alone whose name begins with a key's, as MONAI Label's `image_path` does.

    MONAI 1.6 takes every `<key>_*` entry for a metadata dictionary and fails on a string.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        prefixes = tuple(f"{key}_" for key in self.keys)
        aside: dict[Hashable, torch.Tensor] = {
            k: v for k, v in data.items() if isinstance(k, str) and k.startswith(prefixes) and not isinstance(v, dict)
        }
        return {**super().__call__({k: v for k, v in data.items() if k not in aside}, lazy=lazy), **aside}


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
        scan_affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64, device="cpu")
        shape = [int(n) for n in np.asarray(image.meta["spatial_shape"]).ravel()[:3]]
        for key in self.key_iterator(out):
            scores = out[key]
            if scores.is_floating_point():
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
        slab_voxels: how many target voxels are computed at once.

    Returns:
        (*shape) on the CPU, uint8 (int16 over 256 classes).
    """
    scores = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
    to_scores = torch.linalg.inv(affine.double().cpu()) @ target_affine.double().cpu()  # target voxel -> scores voxel
    voxels_meet = classes is not None and _voxels_meet(to_scores)
    size = torch.tensor(scores.shape[1:], dtype=torch.float64)
    labels = torch.empty(list(shape), dtype=label_type(classes or len(scores), region_order))
    rows = max(1, slab_voxels // (shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        at = _coordinates(to_scores, [range(start, stop), range(shape[1]), range(shape[2])])
        # only the part of the scores that this slab touches, as float
        low = at.amin(dim=(0, 1, 2)).floor().clamp(min=0).minimum(size - 1).long()
        high = at.amax(dim=(0, 1, 2)).ceil().clamp(min=0).minimum(size - 1).long() + 1
        part = scores[(slice(None), *(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)))]
        if classes is not None and not voxels_meet:
            part = F.one_hot(part[0].long(), classes).movedim(-1, 0)
        extent = torch.tensor(part.shape[1:], dtype=torch.float64)
        grid = (2 * (at - low) + 1) / extent - 1  # grid_sample's coordinates, align_corners=False
        values = F.grid_sample(
            part[None].float(),
            grid.flip(-1)[None].float().to(part.device),
            mode="nearest" if voxels_meet else "bilinear",
            padding_mode="border",
            align_corners=False,
        )[0]
        # resampling to the network's grid keeps the extent to rounding; what lies further out was never seen
        inside = ((at > -1.0) & (at < size)).all(dim=-1)
        decided = values[0] if voxels_meet else decide_labels(values, region_order)
        labels[start:stop] = decided.to(labels.dtype).cpu() * inside
    return labels


def _coordinates(to_other: torch.Tensor, indices: Sequence[range]) -> torch.Tensor:
    """Map the voxels that lie at `indices` of three axes by a matrix (4, 4): (X, Y, Z, 3), in double precision."""
    x, y, z = (
        torch.arange(along.start, along.stop).double().view([-1 if i == j else 1 for j in range(3)] + [1])
        * to_other[:3, i]
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


def has_native_voxels(image: torch.Tensor) -> bool:
    """Say whether the voxels of an image, or of a batch of one, are those of its file, turned or cropped at most."""
    if not isinstance(image, MetaTensor) or "original_affine" not in image.meta:
        return False
    affines = [
        torch.as_tensor(a, dtype=torch.float64).cpu().reshape(-1, 4, 4)
        for a in (image.affine, image.meta["original_affine"])
    ]
    return len(affines[0]) == 1 and _voxels_meet(torch.linalg.inv(affines[0][0]) @ affines[1][0])
