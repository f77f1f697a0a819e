"""From the scan's own grid to the network's and back, and the few transforms that MONAI lacks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.image_writer import NibabelWriter
from monai.transforms import MapTransform, Spacingd
from monai.utils import ensure_tuple

from ..data.images import check_spacing
from ..utils.errors import UserError

# align_corners=False is what puts voxels where their affine says (tests/preprocessing/test_resampling.py)
warnings.filterwarnings("ignore", message="align_corners=False is not compatible with scale_extent=True")


class CheckScand(MapTransform):
    """Passes a loaded image (C, *space) on if a network can work with it.

    Args:
        keys: images to check.
        channels: number of channels they must have.

    Raises:
        UserError: channel count, NaN or infinite voxels, or a grid without a volume; the message names the file.
    """

    def __init__(self, keys: KeysCollection, channels: int) -> None:
        super().__init__(keys)
        self.channels = channels

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            name = image.meta.get("filename_or_obj", key) if isinstance(image, MetaTensor) else key
            if image.ndim != 4:
                raise UserError(f"{name} has {image.ndim - 1} spatial axes; expected a 3D scan.")
            if image.shape[0] != self.channels:
                raise UserError(
                    f"{name} has {image.shape[0]} channels; the network takes {self.channels}: give case_0000 .. "
                    f"case_{self.channels - 1:04d} or one 4D file a case."
                )
            if not torch.isfinite(image.sum(dtype=torch.float64)) and not torch.isfinite(image).all():
                bad = int((~torch.isfinite(image)).sum())
                raise UserError(
                    f"{name} has {bad} NaN or infinite voxels; expected finite intensities: repair the file."
                )
            if Path(str(name)).is_file():
                check_spacing(name, nib.load(name))
        return data


class GridSpacingd(Spacingd):
    """MONAI's Spacingd where other entries share a key's prefix, as MONAI Label's `image_path` does beside `image`.

    MONAI 1.6 takes every `<key>_*` entry for a metadata dictionary and fails on a string.
    """

    def __call__(self, data: dict, lazy: bool | None = None) -> dict:
        prefixes = tuple(f"{key}_" for key in self.keys)
        aside = {
            k: v for k, v in data.items() if isinstance(k, str) and k.startswith(prefixes) and not isinstance(v, dict)
        }
        return {**super().__call__({k: v for k, v in data.items() if k not in aside}, lazy=lazy), **aside}


class LabelsOnScanGridd(MapTransform):
    """Probabilities on the network's grid -> labels on the grid that the scan was stored on.

    They are interpolated linearly and only then turned into labels, as nnU-Net does, but in one step and slab by slab,
    so that no array of the scan's size times the number of classes ever exists.

    Args:
        keys: probabilities (classes, *network grid); replaced by labels (1, *scan grid), a MetaTensor with its affine.
        reference: the image that they were computed from, with the affine of the network's grid and, in its metadata,
            `original_affine` and `spatial_shape` of the scan as MONAI's LoadImage leaves them.
        painted: see `labels_on_grid`.
    """

    def __init__(self, keys: KeysCollection, reference: str = "image", painted: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        self.reference, self.painted = reference, painted

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        image = data[self.reference]
        scan_affine = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64, device="cpu")
        shape = [int(n) for n in np.asarray(image.meta["spatial_shape"]).ravel()[:3]]
        for key in self.key_iterator(out):
            scores = out[key]
            if scores.is_floating_point():
                labels = labels_on_grid(scores, image.affine, scan_affine, shape, painted=self.painted)
            else:  # decided already
                labels = labels_on_grid(scores, image.affine, scan_affine, shape, int(scores.max()) + 1)
            meta = {k: v for k, v in image.meta.items() if k != "affine"}
            out[key] = MetaTensor(labels[None], affine=scan_affine, meta=meta)
        return out


class LabelOnImageGridd(MapTransform):
    """A label map -> the grid of its image, linearly per label as nnU-Net does, not by nearest neighbours.

    Args:
        keys: labels (1, *stored grid), MetaTensors of 0, 1, 2, ..; replaced by (1, *image grid) on the image's affine.
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
    painted: Sequence[int] | None = None,
    slab_voxels: int = 2**21,
) -> torch.Tensor:
    """The label of the largest linearly interpolated score at each voxel of another grid; 0 outside the scores' grid.

    Args:
        scores: (classes, X, Y, Z), any floating type and device; or a label map (1, X, Y, Z) of 0 .. `classes` - 1,
            each voxel of which counts as a score of 1.
        affine: 4 x 4, scores voxel -> world (mm).
        target_affine: 4 x 4, target voxel -> world (mm).
        shape: voxels of the target grid.
        classes: number of labels where `scores` is a label map.
        painted: of overlapping regions, the label that each is painted with where its probability is over one half,
            later ones over earlier ones.
        slab_voxels: how many target voxels are computed at once.

    Returns:
        (*shape) on the CPU, uint8 (int16 over 256 classes).
    """
    scores = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
    to_scores = torch.linalg.inv(affine.double().cpu()) @ target_affine.double().cpu()  # target voxel -> scores voxel
    voxels_meet = classes is not None and _voxels_meet(to_scores)
    size = torch.tensor(scores.shape[1:], dtype=torch.float64)
    labels = torch.empty(list(shape), dtype=label_type(classes or len(scores), painted))
    rows = max(1, slab_voxels // (shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        axes = [torch.arange(start, stop), torch.arange(shape[1]), torch.arange(shape[2])]
        at = sum(  # (rows, Y, Z, 3) scores voxel coordinates
            axis.double().view([-1 if i == j else 1 for j in range(3)] + [1]) * to_scores[:3, i]
            for i, axis in enumerate(axes)
        )
        at = at + to_scores[:3, 3]
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
        decided = values[0] if voxels_meet else decide(values, painted)
        labels[start:stop] = decided.to(labels.dtype).cpu() * inside
    return labels


def decide(scores: torch.Tensor, painted: Sequence[int] | None) -> torch.Tensor:
    """The labels (*space) of scores (classes, *space), integers.

    Args:
        scores: of which the largest wins; or probabilities of overlapping regions.
        painted: the label that each region is painted with where its probability is over one half, later ones over
            earlier ones; None where the labels exclude each other.
    """
    if painted is None:
        return scores.max(dim=0).indices  # on a CPU, argmax takes ten times as long here (torch 2.13)
    labels = torch.zeros(scores.shape[1:], dtype=torch.int16, device=scores.device)
    for region, label in zip(scores, painted, strict=True):
        labels[region > 0.5] = label
    return labels


def label_type(classes: int, painted: Sequence[int] | None) -> torch.dtype:
    """The smallest that holds what `decide` makes of so many scores."""
    return torch.uint8 if (classes - 1 if painted is None else max(painted)) <= 255 else torch.int16


def _voxels_meet(to_other: torch.Tensor) -> bool:
    """Whether one grid's voxels are another's, turned, flipped or cropped; `to_other` (4, 4) maps their indices."""
    return bool((to_other - to_other.round()).abs().max() < 1e-4)


def as_stored(image: torch.Tensor) -> bool:
    """Whether the voxels of a MetaTensor, or of a batch of one, are those of its file: turned or cropped at most."""
    if not isinstance(image, MetaTensor) or "original_affine" not in image.meta:
        return False
    affines = [
        torch.as_tensor(a, dtype=torch.float64).cpu().reshape(-1, 4, 4)
        for a in (image.affine, image.meta["original_affine"])
    ]
    return len(affines[0]) == 1 and _voxels_meet(torch.linalg.inv(affines[0][0]) @ affines[1][0])


class LabelValuesd(MapTransform):
    """The network's labels 0, 1, 2, .. -> the values they have in the data set's files, whose gaps are closed inside.

    Args:
        keys: labels (1, *space), integers, MetaTensors.
        values: of each label, or None where they are 0, 1, 2, ..
        names: where to put them, one for each key; the keys themselves by default.
    """

    def __init__(self, keys: KeysCollection, values: Sequence[int] | None, names: KeysCollection | None = None) -> None:
        super().__init__(keys)
        self.names = self.keys if names is None else ensure_tuple(names)
        closed = values is None or list(values) == list(range(len(values)))
        self.values = None if closed else torch.tensor(values, dtype=torch.uint8 if max(values) < 256 else torch.int16)

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key, name in self.key_iterator(out, self.names):
            labels = out[key]
            out[name] = labels if self.values is None else MetaTensor(self.values[labels.long()], meta=labels.meta)
        return out


class LabelWriter(NibabelWriter):
    """MONAI's NIfTI writer that keeps a single-slice scan 3D and says in the header that lengths are millimetres."""

    @classmethod
    def create_backend_obj(cls, data_array: np.ndarray, **kwargs) -> nib.Nifti1Image:
        image = super().create_backend_obj(np.atleast_3d(data_array), **kwargs)
        image.header.set_xyzt_units("mm", "sec")
        return image
