"""Scores on the scan's own grid, per case and class: Dice, surface Dice (NSD) and HD95, by MONAI's metrics."""

from __future__ import annotations

import csv
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric, compute_dice, compute_hausdorff_distance, compute_surface_dice

METRICS = ("dice", "nsd", "hd95_mm")
logger = logging.getLogger("mednext")


def class_mask(labels: torch.Tensor, members: Sequence[int], ignored: torch.Tensor | None = None) -> torch.Tensor:
    """Bool mask of the voxels whose label belongs to a class, those of the mask `ignored` left out."""
    mask = torch.isin(labels, torch.tensor(members, device=labels.device, dtype=labels.dtype))
    return mask if ignored is None else mask & ~ignored


def score(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    tolerance: float = 1.0,
    ignore: int | None = None,
) -> list[dict]:
    """One row a class.

    A class that is absent from both masks has nan scores; absent from one of them, Dice and NSD are 0 and HD95, the
    distance to an empty set, is infinite.

    Args:
        prediction: (1, *space) labels.
        reference: (1, *space) labels on the same grid.
        spacing: voxel edge lengths in mm.
        classes: of each, the labels that belong to it, see labels.py.
        tolerance: of the surface Dice in mm.
        ignore: label of the reference whose voxels count nowhere, or None.
    """
    rows = []
    ignored = None if ignore is None else reference == ignore
    for name, members in classes.items():
        predicted, wanted = (class_mask(mask, members, ignored)[None] for mask in (prediction, reference))
        row = {"label": name, "predicted_voxels": int(predicted.sum()), "reference_voxels": int(wanted.sum())}
        present = (row["predicted_voxels"] > 0) + (row["reference_voxels"] > 0)
        if present == 2:
            row["dice"] = compute_dice(predicted, wanted).item()
            with warnings.catch_warnings():  # MONAI warns of empty classes that are not there
                warnings.simplefilter("ignore")
                options = {"include_background": True, "spacing": [float(s) for s in spacing]}
                row["nsd"] = compute_surface_dice(predicted, wanted, [tolerance], use_subvoxels=True, **options).item()
                row["hd95_mm"] = compute_hausdorff_distance(predicted, wanted, percentile=95, **options).item()
        else:
            row.update(zip(METRICS, (0.0, 0.0, math.inf) if present else (math.nan,) * 3, strict=True))
        rows.append(row)
    return rows


class ClassDice(CumulativeIterationMetric):
    """Dice of every class and case for MONAI's IgniteMetricHandler; nan where a class is absent from both masks.

    MONAI's DiceMetric knows exclusive labels only, or needs one mask a class in memory at once.

    Args:
        classes: of each, the labels that belong to it.
        ignore: label of the reference whose voxels count nowhere, or None.
    """

    def __init__(self, classes: Mapping[str, Sequence[int]], ignore: int | None = None) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(N, 1, *space) labels twice -> (N, classes)."""
        y_pred, y = (t.as_tensor().cpu() if isinstance(t, MetaTensor) else t.cpu() for t in (y_pred, y))
        ignored = None if self.ignore is None else y == self.ignore
        found = []
        for members in self.classes.values():
            predicted, wanted = (class_mask(mask, members, ignored).flatten(1) for mask in (y_pred, y))
            both = predicted.sum(1) + wanted.sum(1)
            found.append(2 * (predicted & wanted).sum(1) / both)  # 0 / 0 is nan
        return torch.stack(found, dim=1)

    def aggregate(self) -> torch.Tensor:
        """Mean over the classes of the mean over the cases that have a score, as in `summary.csv`."""
        return self.get_buffer().nanmean(dim=0).nanmean()


def summarise(rows: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Per class, mean and standard deviation over the cases that have a finite score; last the mean over the classes.

    `empty_in_both` and `empty_in_one` count what is left out (nan) or is 0 (infinite for HD95).
    """
    summary = []
    for name in names:
        of_label = [row for row in rows if row["label"] == name]
        entry = {"label": name, "cases": len(of_label)}
        for metric in METRICS:
            values = np.array([row[metric] for row in of_label])
            values = values[np.isfinite(values)]
            entry[metric] = float(values.mean()) if len(values) else math.nan
            entry[f"{metric}_std"] = float(values.std()) if len(values) else math.nan
        empty = [(row["predicted_voxels"] == 0) + (row["reference_voxels"] == 0) for row in of_label]
        summary.append({**entry, "empty_in_both": empty.count(2), "empty_in_one": empty.count(1)})
    mean = {"label": "mean", "cases": len({row["case"] for row in rows})}
    for key in summary[0] if summary else ():
        if key not in mean and not key.endswith("_std"):
            values = [entry[key] for entry in summary]
            finite = [v for v in values if math.isfinite(v)]
            mean[key] = sum(values) if key.startswith("empty") else float(np.mean(finite)) if finite else math.nan
    return [*summary, mean]


class CaseScores:
    """Scores every case of an evaluator and writes `cases.csv`, `summary.csv` and `summary.json` when it is through.

    Args:
        folder: where to write.
        classes: of each, the labels that belong to it.
        tolerance: of the surface Dice in mm.
        ignore: label of the reference whose voxels count nowhere, or None.
    """

    def __init__(
        self, folder: str, classes: Mapping[str, Sequence[int]], tolerance: float = 1.0, ignore: int | None = None
    ) -> None:
        self.folder, self.classes, self.tolerance, self.ignore = Path(folder), classes, tolerance, ignore
        self.rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def add(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            prediction, reference = output["pred"], output["label"]
            spacing = reference.affine[:3, :3].norm(dim=0).tolist()
            masks = prediction.as_tensor().cpu(), reference.as_tensor().cpu()
            rows = score(*masks, spacing, self.classes, self.tolerance, self.ignore)
            self.rows += [{"case": batch["case"], **row} for row in rows]

    def write(self, engine: Engine) -> None:
        rows = self.rows
        if dist.is_initialized():
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
            if dist.get_rank() > 0:
                return
        write_tables(self.folder, rows, list(self.classes), self.tolerance)


def write_tables(folder: str | Path, rows: Sequence[dict], names: Sequence[str], tolerance: float) -> None:
    """Writes `cases.csv`, `summary.csv` and `summary.json`, and prints the summary.

    Args:
        folder: where to write.
        rows: of `score`, each with its "case".
        names: of the classes, in their order.
        tolerance: of the surface Dice in mm.
    """
    folder = Path(folder)
    rows = sorted(rows, key=lambda row: (row["case"], list(names).index(row["label"])))
    summary = summarise(rows, names)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("cases", rows), ("summary", summary)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            columns = ["case", "label", *METRICS, *_rest(table)] if name == "cases" else list(table[0])
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)
    content = {"nsd_tolerance_mm": tolerance, "summary": summary, "cases": rows}
    (folder / "summary.json").write_text(json.dumps(without_nan(content), indent=1) + "\n")
    for entry in summary:
        logger.info(
            "%-20s Dice %.4f  NSD@%g mm %.4f  HD95 %.2f mm  (%d cases, %d empty in both, %d empty in one)",
            entry["label"], entry["dice"], tolerance, entry["nsd"], entry["hd95_mm"],
            entry["cases"], entry["empty_in_both"], entry["empty_in_one"],
        )  # fmt: skip
    logger.info("scores are in %s", folder)


def _rest(rows: Sequence[dict]) -> list[str]:
    return [key for key in rows[0] if key not in ("case", "label", *METRICS)]


def without_nan(value):
    """JSON has neither nan (here null) nor infinity (here the string "inf")."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if math.isinf(value) else None
    return value


def with_nan(value: object) -> object:
    """A number as it was before `without_nan`; anything else as it is."""
    return math.nan if value is None else math.inf if value == "inf" else value
