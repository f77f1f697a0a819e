"""Scores on the scan's own grid, per case and class: Dice, surface Dice (NSD) and HD95, by MONAI's metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric, compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import find_objects

from .lesions import lesion_scores
from .tables import METRICS, write_tables

AT_ONCE = 2**22  # voxels whose labels are counted together, in eight bytes each


def class_mask(labels: torch.Tensor, members: Sequence[int], ignored: torch.Tensor | None = None) -> torch.Tensor:
    """Mark the voxels whose label belongs to a class and that are not in the mask `ignored`."""
    mask = torch.isin(labels, torch.tensor(members, device=labels.device, dtype=labels.dtype))
    return mask if ignored is None else mask & ~ignored


def score_case(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    tolerance: float = 1.0,
    ignore: int | None = None,
    lesions: bool = False,
) -> list[dict]:
    """Score one mask: a row of Dice, NSD, HD95 and counts of voxels for each class.

    A class that is absent from both masks has nan scores; absent from one of them, Dice and NSD are 0 and HD95, the
    distance to an empty set, is infinite.

    Args:
        prediction: (1, *space) labels.
        reference: (1, *space) labels on the same grid.
        spacing: voxel edge lengths in mm.
        classes: name of each class and the labels that belong to it, see `data.labels`.
        tolerance: distance in mm within which the surface Dice counts surfaces as equal.
        ignore: label of the reference whose voxels count nowhere, or None.
        lesions: whether detection is scored, too, see `lesions.lesion_scores`.
    """
    rows = []
    found = [find_objects(mask[0].int().numpy()) for mask in (prediction, reference)]
    for name, members in classes.items():
        part = _box_around([boxes[label - 1] for boxes in found for label in members if 0 < label <= len(boxes)])
        ignored = None if ignore is None else reference[part] == ignore
        predicted, wanted = (class_mask(mask[part], members, ignored)[None] for mask in (prediction, reference))
        voxels = int(predicted.sum()), int(wanted.sum())
        if all(voxels):
            scores = _scores(predicted, wanted, [float(s) for s in spacing], tolerance)
        else:
            scores = (0.0, 0.0, math.inf) if any(voxels) else (math.nan,) * 3
        counts = {"predicted_voxels": voxels[0], "reference_voxels": voxels[1]}
        detection = lesion_scores(predicted[0, 0].numpy(), wanted[0, 0].numpy()) if lesions else {}
        rows.append({"label": name, **counts, **dict(zip(METRICS, scores, strict=True)), **detection})
    return rows


def _box_around(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """Return the part of masks (1, *space) in which boxes lie, a voxel where there is none: all else scores nothing."""
    there = [box for box in boxes if box is not None]
    spans = [slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*there, strict=True)]
    return (slice(None), *(spans or [slice(0, 1)] * 3))


def _scores(
    predicted: torch.Tensor, wanted: torch.Tensor, spacing: list[float], tolerance: float
) -> tuple[float, float, float]:
    """Compute Dice, NSD and HD95 of two masks (1, 1, *space), neither of them empty."""
    dice = compute_dice(predicted, wanted).item()
    with warnings.catch_warnings():  # MONAI warns of empty classes that are not there
        warnings.simplefilter("ignore")
        nsd = compute_surface_dice(
            predicted, wanted, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True
        )
        hd95 = compute_hausdorff_distance(predicted, wanted, include_background=True, percentile=95, spacing=spacing)
    return dice, nsd.item(), hd95.item()


class ClassDice(CumulativeIterationMetric):
    """Dice of every class and case for MONAI's IgniteMetricHandler; nan where a class is absent from both masks.

    MONAI's DiceMetric knows exclusive labels only, or needs one mask a class in memory at once.

    Args:
        classes: name of each class and the labels that belong to it.
        ignore: label of the reference whose voxels count nowhere, or None.
    """

    def __init__(self, classes: Mapping[str, Sequence[int]], ignore: int | None = None) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor:
        """Score two label maps (N, 1, *space): (N, classes)."""
        assert y is not None, "Dice compares two label maps"
        y_pred, y = (t.as_tensor().cpu() if isinstance(t, MetaTensor) else t.cpu() for t in (y_pred, y))
        return torch.stack([self._dice(*pair) for pair in zip(y_pred, y, strict=True)])

    def _dice(self, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Score two label maps (1, *space) in one pass, however many classes there are: (classes)."""
        labels = list({0, self.ignore or 0}.union(*self.classes.values()))
        n = len(labels) + 1  # and all others
        largest = max(int(predicted.max()), int(wanted.max()), *labels)
        places = torch.full((largest + 1,), n - 1)
        places[labels] = torch.arange(n - 1)
        counts = torch.zeros(n * n, dtype=torch.int64)
        for p, w in zip(*(mask.flatten().split(AT_ONCE) for mask in (predicted, wanted)), strict=True):
            counts += torch.bincount(places[p.long()].mul_(n).add_(places[w.long()]), minlength=n * n)
        counts = counts.view(n, n)
        if self.ignore is not None:
            counts[:, places[self.ignore]] = 0
        found = []
        for members in self.classes.values():
            own = places[list(members)]
            found.append(2 * counts[own][:, own].sum() / (counts[own].sum() + counts[:, own].sum()))  # 0 / 0 is nan
        return torch.stack(found)

    def aggregate(self) -> torch.Tensor:
        """Average over the classes the mean over the cases that have a score, as `summary.csv` does."""
        return self.get_buffer().nanmean(dim=0).nanmean()


class CaseScores:
    """Scores every case of an evaluator and writes `cases.csv`, `summary.csv` and `summary.json` when it is through.

    Args:
        folder: where to write.
        classes: name of each class and the labels that belong to it.
        tolerance: distance in mm within which the surface Dice counts surfaces as equal.
        ignore: label of the reference whose voxels count nowhere, or None.
        lesions: whether detection is scored, too, see `lesions.lesion_scores`.
    """

    def __init__(
        self,
        folder: str,
        classes: Mapping[str, Sequence[int]],
        tolerance: float = 1.0,
        ignore: int | None = None,
        lesions: bool = False,
    ) -> None:
        self.folder, self.classes, self.tolerance, self.ignore = Path(folder), classes, tolerance, ignore
        self.lesions = lesions
        self.rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def add(self, engine: Engine) -> None:
        """Score the cases of the last batch."""
        batches, outputs = cast(list, engine.state.batch), cast(list, engine.state.output)
        for batch, output in zip(batches, outputs, strict=True):
            prediction, reference = output["pred"], output["label"]
            spacing = reference.affine[:3, :3].norm(dim=0).tolist()
            masks = prediction.as_tensor().cpu(), reference.as_tensor().cpu()
            rows = score_case(*masks, spacing, self.classes, self.tolerance, self.ignore, self.lesions)
            case = batch.get("case", prediction.meta.get("case"))  # a host may give an image and a label alone
            self.rows += [{"case": case, **row} for row in rows]

    def write(self, engine: Engine) -> None:
        """Write the tables of all cases, those of other processes too."""
        rows = self.rows
        if dist.is_initialized():
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
            if dist.get_rank() > 0:
                return
        write_tables(self.folder, rows, list(self.classes), self.tolerance)
