"""The tables of an evaluation: a row a case and class, their summary, and both as JSON for programs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.files import remembered, write_table, write_text
from .lesions import COUNTS

METRICS = {"dice": "Dice", "nsd": "NSD", "hd95_mm": "HD95 (mm)"}  # columns of the tables -> what a person reads
DETECTION = {"lesion_f1": "Lesion F1"}  # a column where it was asked for

logger = logging.getLogger("mednext")


def write_tables(folder: str | Path, rows: Sequence[dict], names: Sequence[str], tolerance: float) -> None:
    """Write `cases.csv`, `summary.csv` and `summary.json`, and log the summary.

    Args:
        folder: where to write.
        rows: those of `metrics.score_case`, each with its "case".
        names: names of the classes, in their order.
        tolerance: distance in mm within which the surface Dice counts surfaces as equal.
    """
    folder = Path(folder)
    rows = sorted(rows, key=lambda row: (row["case"], list(names).index(row["label"])))
    summary = summarise(rows, names)
    for name, table in (("cases", rows), ("summary", summary)):
        columns = dict.fromkeys(["case", "label", *METRICS, *table[0]] if name == "cases" else table[0])
        write_table(folder / f"{name}.csv", list(columns), table)
    content = {"nsd_tolerance_mm": tolerance, "summary": summary, "cases": rows}
    write_text(folder / "summary.json", json.dumps(without_nan(content), indent=1) + "\n")
    for entry in summary:
        logger.info(
            "%-20s Dice %.4f  NSD@%g mm %.4f  HD95 %.2f mm  (%d cases, %d empty in both, %d empty in one)",
            entry["label"], entry["dice"], tolerance, entry["nsd"], entry["hd95_mm"],
            entry["cases"], entry["empty_in_both"], entry["empty_in_one"],
        )  # fmt: skip
        if "lesion_f1" in entry:
            logger.info(
                "%-20s Lesion F1 %.4f  (%d of %d found, %d false)",
                entry["label"], entry["lesion_f1"],
                entry["found_lesions"], entry["reference_lesions"], entry["false_lesions"],
            )  # fmt: skip
    logger.info("scores are in %s", folder)


def read_summary(folder: str | Path, part: str) -> Any:
    """Read a part of `summary.json` as `write_tables` wrote it: "cases", "summary", or "nsd_tolerance_mm".

    Raises:
        UserError: it is missing or damaged.
    """
    path = Path(folder) / "summary.json"
    found = remembered(path).get(part)
    needed = {"label", *METRICS, *(("case", "predicted_voxels", "reference_voxels") if part == "cases" else ())}
    whole = isinstance(found, list) and found and all(_is_row(row, needed) for row in found)
    if not (isinstance(found, int | float) if part == "nsd_tolerance_mm" else whole):
        raise UserError(f"{path} is no summary of an evaluation; evaluate again, or give the folder of one.")
    return found


def _is_row(row: object, needed: set[str]) -> bool:
    """Say whether a row is one of those that `write_tables` writes: texts, and scores by their names."""
    if not isinstance(row, dict) or not (needed | set(COUNTS if "lesion_f1" in row else ())) <= row.keys():
        return False
    return all(isinstance(v, str) if name in ("case", "label") else _is_score(v) for name, v in row.items())


def _is_score(value: object) -> bool:
    return value is None or value == "inf" or isinstance(value, int | float)


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the scores that all rows have, with what a person reads for each."""
    return METRICS | {name: text for name, text in DETECTION.items() if rows and all(name in row for row in rows)}


def without_nan(value: Any) -> Any:
    """Replace what JSON does not have: nan by null, infinity by the string "inf"."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if math.isinf(value) else None
    return value


def with_nan(value: object) -> object:
    """Put back what `without_nan` replaced; anything else stays as it is."""
    return math.nan if value is None else math.inf if value == "inf" else value


def summarise(rows: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Summarise each class over the cases that have a finite score: mean and standard deviation.

    The last row is the mean over the classes. `empty_in_both` and `empty_in_one` count what is left out (nan) or is 0
    (infinite for HD95).
    """
    summary = [_summary(name, [row for row in rows if row["label"] == name]) for name in names]
    mean: dict[str, Any] = {"label": "mean", "cases": len({row["case"] for row in rows})}
    for key in summary[0] if summary else ():
        if key not in mean and not key.endswith("_std"):
            values = [entry[key] for entry in summary]
            counted = key.startswith("empty") or key in COUNTS
            mean[key] = sum(values) if counted else _finite(values, np.mean)
    return [*summary, mean]


def _summary(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the rows of one class."""
    entry: dict[str, Any] = {"label": name, "cases": len(rows)}
    metrics = metrics_of(rows)
    for metric in metrics:
        values = [row[metric] for row in rows]
        entry[metric], entry[f"{metric}_std"] = _finite(values, np.mean), _finite(values, np.std)
    empty = [(row["predicted_voxels"] == 0) + (row["reference_voxels"] == 0) for row in rows]
    lesions = {count: sum(row[count] for row in rows) for count in COUNTS} if "lesion_f1" in metrics else {}
    return {**entry, **lesions, "empty_in_both": empty.count(2), "empty_in_one": empty.count(1)}


def _finite(values: Sequence[float], statistic: Callable[[np.ndarray], np.floating]) -> float:
    """Compute a statistic of the values that are finite; nan where there are none."""
    finite = np.array([value for value in values if math.isfinite(value)])
    return float(statistic(finite)) if len(finite) else math.nan
