"""Whether a scan is like those a network was trained on: grid, intensities and predicted volumes beside their ranges.

A network answers every input, and a mask of a whole head from a network that has only seen cut-outs of the hippocampus
looks as sure as any. What lies outside the ranges of training is written into the report of an inference, and said.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events

from .data import image_files
from .files import write_whole
from .survey import glance, survey

GRID = 1.25  # how many times more or less than in training spacing and extent may be
VOLUME = 2.0  # and the predicted volume of a label
CONTRAST = 0.5  # how far beyond the range of training contrast may be, in widths of that range

logger = logging.getLogger("mednext")


def learn(
    items: Sequence[dict],
    channels: int,
    values: Sequence[int],
    memory: str,
    ignore: int | None = None,
) -> dict[str, list[float]]:
    """The smallest and the largest value of each measure over training cases, by name; see `measures`.

    Args:
        items: cases with "image" and "label".
        channels: image channels.
        values: of the labels, background first.
        memory: JSON file that remembers what was read, see survey.py.
        ignore: value of voxels that nobody annotated, or None.
    """
    records = [r for r in survey(items, channels, values, memory, ignore) if "error" not in r]
    found: dict[str, list[float]] = {}
    for record in records:
        voxel = math.prod(record["spacing"]) / 1000
        volumes = {value: n * voxel for value, n in list(zip(values, record["labels"], strict=False))[1:]}
        for name, value in measures(record["spacing"], record["shape"], record["channels"], volumes).items():
            found.setdefault(name, []).append(value)
    return {name: [round(min(v), 4), round(max(v), 4)] for name, v in found.items()}


def measures(
    spacing: Sequence[float], shape: Sequence[int], channels: Sequence[Mapping | None], volumes: Mapping[int, float]
) -> dict[str, float]:
    """What is compared, by name.

    Args:
        spacing: mm, of the RAS axes.
        shape: voxels, of the RAS axes.
        channels: of each, mean and std of its non-zero voxels, or None without any. Their ratio does not depend on the
            unit of an MR scanner, and is negative or large in a CT.
        volumes: ml of each label, by its value.
    """
    found = {f"spacing {axis} (mm)": value for axis, value in zip("xyz", spacing, strict=True)}
    found |= {f"extent {axis} (mm)": n * s for axis, n, s in zip("xyz", shape, spacing, strict=True)}
    for number, channel in enumerate(channels):
        mean = channel["mean"] if channel else 0.0
        found[f"contrast of channel {number} (std / mean)"] = channel["std"] / mean if mean else 0.0
    return found | {f"volume of label {label} (ml)": value for label, value in volumes.items()}


def unfamiliar(found: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each measure that lies outside its range in training, with its margin."""
    said = []
    for name, value in found.items():
        if name not in ranges:
            continue
        low, high = ranges[name]
        if name.startswith("contrast"):
            margin = CONTRAST * (high - low)
            bounds = low - margin, high + margin
        else:
            factor = VOLUME if name.startswith("volume") else GRID
            bounds = low / factor, high * factor
        if not bounds[0] <= value <= bounds[1]:
            said.append(f"{name} is {value:.3g}, in training {low:.3g} to {high:.3g}")
    return said


class Familiarity:
    """Writes `report.csv` into the output folder: the measures of every scan, and what is unlike the training cases.

    What is unlike is also said when all scans are done: such a mask is to be looked at, or not to be used.

    Args:
        ranges: what `learn` found, or None, where nothing is known of the training cases.
        output_dir: for the report.
        values: of the labels, background first, or None.
    """

    def __init__(
        self,
        ranges: Mapping[str, Sequence[float]] | None,
        output_dir: str,
        values: Sequence[int] | None = None,
    ) -> None:
        self.ranges, self.file = ranges or {}, Path(output_dir) / "report.csv"
        self.labels = list(values or [])[1:]
        self.rows: list[dict[str, object]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.say)

    def __call__(self, engine: Engine) -> None:
        if isinstance(engine.state.output, list):  # else this scan could not be segmented
            scan = engine.state.dataloader.dataset.data[engine.state.iteration - 1]
            self.rows.append(self.row(image_files(scan), np.asarray(engine.state.output[0]["pred"][0].cpu())))
            write_whole(self.file, self._write)

    def row(self, files: Sequence[str], mask: np.ndarray) -> dict[str, object]:
        """A line of the report of a scan and its mask (X, Y, Z), label values on the scan's grid."""
        seen = glance(files)
        voxel = math.prod(seen["spacing"]) / 1000
        volumes = {label: int((mask == label).sum()) * voxel for label in self.labels}
        found = measures(seen["spacing"], seen["shape"], seen["channels"], volumes)
        said = unfamiliar(found, self.ranges)
        rounded = {name: round(value, 4) for name, value in found.items()}
        return {"scan": Path(files[0]).name, **rounded, "unlike the training cases": "; ".join(said)}

    def say(self, engine: Engine) -> None:
        """Warns of each scan that is unlike the training cases."""
        for row in self.rows:
            if row["unlike the training cases"]:
                logger.warning(
                    "%s is unlike the scans this network was trained on, do not trust its mask unseen: %s.",
                    row["scan"],
                    row["unlike the training cases"],
                )

    def _write(self, partial: Path) -> None:
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        partial.write_text(text.getvalue())
