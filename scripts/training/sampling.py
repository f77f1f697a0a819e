"""The choice of cases and patches that are seen in training, by nnU-Net's rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import Dataset, DistributedSampler
from monai.transforms import MapTransform, RandomizableTransform
from torch.utils.data import Sampler, SequentialSampler

from ..data.labels import Labels
from ..data.scans import image_files
from ..utils.errors import UserError

FOREGROUND = 1 / 3  # nnU-Net's share, which rounds to one of two
DRAWS = 500  # of 64 voxels each: one in 10,000 annotated is still found nineteen times in twenty


class PatchSampler(Sampler):
    """Draws cases with replacement, and for each whether its patch must show foreground: the last third of every batch.

    Yields (index of the case, whether foreground is forced). Of a batch of two the second is forced; a batch of one is
    forced in a third of the draws.

    Args:
        data_source: the cases.
        batch_size: patches in a batch.
        iterations: batches in an epoch.
        weights: how often each case is drawn beside the others, see `case_weights`; None for all alike.
    """

    def __init__(
        self, data_source: Sized, batch_size: int, iterations: int, weights: Sequence[float] | None = None
    ) -> None:
        self.data_source, self.batch_size, self.iterations = data_source, batch_size, iterations
        self.weights = None if weights is None else torch.tensor(weights)

    def __len__(self) -> int:
        return self.batch_size * self.iterations

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        if self.weights is None:
            cases = torch.randint(len(self.data_source), (len(self),), generator=generator).tolist()
        else:
            cases = torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()
        draws = torch.rand(len(self), generator=generator).tolist()
        first = round(self.batch_size * (1 - FOREGROUND))  # nnU-Net v1, dataset_loading.py
        for number, case in enumerate(cases):
            yield case, draws[number] < FOREGROUND if self.batch_size == 1 else number % self.batch_size >= first


def each_once(cases: Dataset) -> Sampler:
    """Deal cases out to the processes of a run, every case to one; all of them get some, or none does.

    Raises:
        UserError: fewer cases than processes, of which some would wait for ever for the others.
    """
    if 0 < len(cases) < (processes := dist.get_world_size()):
        raise UserError(
            f"{len(cases)} cases are held out for {processes} processes; expected one for each: start"
            f" --nproc_per_node {len(cases)} in all, or hold more cases out."
        )
    return DistributedSampler(cases, even_divisible=False, shuffle=False) if len(cases) else SequentialSampler(cases)


def case_weights(records: Sequence[dict], cases: Sequence[dict], labels: Labels, share: float) -> list[float] | None:
    """Weigh cases so that each foreground label that any case has is in a share of those drawn, about; None for 0.

    Args:
        records: fingerprints of these cases and others, with "file" and "labels" (voxels of each).
        cases: to draw from, in their order.
        labels: of the data set.
        share: of the drawn cases.
    """
    if not share:
        return None
    voxels = {record["file"]: record["labels"][1 : len(labels.values)] for record in records}
    present = np.array([voxels[image_files(case)[0]] for case in cases]) > 0
    wanted = np.maximum(share * len(cases) / np.maximum(present.sum(0), 1), 1)  # of a case with the label
    return np.where(present, wanted, 1).max(1).tolist()


def crop_size(patch_size: Sequence[int], rotate_range: Sequence[float] = (math.pi / 6,) * 3) -> list[int]:
    """Compute the edges of a crop from which a rotated and zoomed patch can be cut, mostly without crossing its border.

    nnU-Net's rule: turn the patch about each axis by its largest angle, 90 degrees at most, and divide by 0.85, which
    covers most zooms; 128 -> 205. Source: recipe of nnU-Net v1, `get_patch_size` and `nnUNetTrainerV2.setup_DA_params`.

    Args:
        patch_size: voxels; one voxel along the last axis in 2D.
        rotate_range: largest angle about each axis in radians; in 2D 0 about the first two.
    """
    size = np.array(patch_size, dtype=float)
    largest = size.copy()
    for axis, angle in enumerate(np.minimum(rotate_range, math.pi / 2)):
        i, j = [a for a in range(3) if a != axis]
        turned = size.copy()
        turned[i] = size[i] * math.cos(angle) + size[j] * math.sin(angle)
        turned[j] = size[j] * math.cos(angle) + size[i] * math.sin(angle)
        largest = np.maximum(largest, turned)
    return [int(n) for n in largest / 0.85]


class RandPatchd(RandomizableTransform, MapTransform):
    """Cuts one random patch, which may hang over the scan's border and is zero there, by nnU-Net's sampling rule.

    Where foreground is forced it is centred on a voxel of a class drawn uniformly from those present, else it lies
    anywhere, or, where some voxels are to be ignored, is centred on an annotated one. MONAI's crops stay inside the
    image, so that a crop larger than the final patch never shows its border.

    Args:
        keys: arrays (channels, *space) on one grid.
        size: voxels to cut.
        patch_size: the part of it that the network will see; how far `size` may hang over depends on it.
        indices_key: per class the flat indices of its voxels, as MONAI's ClassesToIndicesd leaves them.
        forced_key: whether foreground is forced, as PatchSampler says.
        label_key: the label, in which annotated voxels are looked for.
        ignore: index of voxels to ignore, or None.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int],
        patch_size: Sequence[int],
        indices_key: str = "label_cls_indices",
        forced_key: str = "foreground",
        label_key: str = "label",
        ignore: int | None = None,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.size, self.patch_size = np.array(size), np.array(patch_size)
        self.indices_key, self.forced_key, self.label_key, self.ignore = indices_key, forced_key, label_key, ignore

    def first_voxel(self, data: dict) -> np.ndarray:
        """Draw the patch's first voxel, which may be negative."""
        shape = np.array(data[self.keys[0]].shape[1:])
        pad = np.maximum(self.size - self.patch_size, self.size - shape)
        lowest, highest = -(pad // 2), shape + pad // 2 + pad % 2 - self.size
        centre = self._foreground(data, shape) if data[self.forced_key] else self._annotated(data, shape)
        if centre is not None:
            return np.maximum(lowest, centre - self.size // 2)
        return np.array([self.R.randint(low, high + 1) for low, high in zip(lowest, highest, strict=True)])

    def _foreground(self, data: dict, shape: np.ndarray) -> np.ndarray | None:
        """Draw a class evenly and a voxel of it, or None where there is no foreground."""
        present = [indices for indices in data[self.indices_key][1 : self.ignore] if len(indices)]
        if not present:
            return None
        indices = present[self.R.randint(len(present))]
        return np.array(np.unravel_index(int(indices[self.R.randint(len(indices))]), shape))

    def _annotated(self, data: dict, shape: np.ndarray) -> np.ndarray | None:
        """Draw a voxel evenly from those not to be ignored; None where all count, or where DRAWS do not hit one."""
        for _ in range(0 if self.ignore is None else DRAWS):
            voxels = [torch.from_numpy(self.R.randint(n, size=64)) for n in shape]
            known = (data[self.label_key][(0, *voxels)] != self.ignore).nonzero()
            if len(known):
                return np.array([int(axis[known[0, 0]]) for axis in voxels])
        return None

    def __call__(self, data: dict) -> dict:
        out = {k: v for k, v in data.items() if k not in (self.indices_key, self.forced_key)}
        start = self.first_voxel(data)
        for key in self.key_iterator(out):
            array = out[key]
            shape = np.array(array.shape[1:])
            low, high = np.clip(start, 0, shape), np.clip(start + self.size, 0, shape)
            inside = array[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
            before, after = low - start, start + self.size - high
            pads = [int(n) for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
            out[key] = F.pad(inside, pads)
        return out
