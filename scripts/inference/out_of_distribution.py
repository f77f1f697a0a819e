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

import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..planning.fingerprint import survey
from ..utils.errors import UserError
from ..utils.files import write_whole

GRID = 1.25  # how many times more or less than in training spacing and extent may be
VOLUME = 2.0  # and the predicted volume of a label
CONTRAST = 0.5  # how far beyond the range of training contrast may be, in widths of that range

UNLIKE = "unlike the training cases"  # column of the report, entry of a mask's metadata

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
        counts = dict(list(zip(values, record["labels"], strict=False))[1:])
        contrasts = [c["std"] / c["mean"] if c and c["mean"] else 0.0 for c in record["channels"]]
        measured = measures(record["spacing"], record["shape"], contrasts)
        for name, value in {**measured, **volumes(counts, math.prod(record["spacing"]))}.items():
            found.setdefault(name, []).append(value)
    return {name: [round(min(v), 4), round(max(v), 4)] for name, v in found.items()}


def measures(spacing: Sequence[float], shape: Sequence[int], contrasts: Sequence[float]) -> dict[str, float]:
    """What is compared of a scan, by name.

    Args:
        spacing: mm, of the RAS axes.
        shape: voxels, of the RAS axes.
        contrasts: of each channel std / mean of its non-zero voxels, 0 without any. It does not depend on the unit of
            an MR scanner, and is negative or large in a CT.
    """
    found = {f"spacing {axis} (mm)": value for axis, value in zip("xyz", spacing, strict=True)}
    found |= {f"extent {axis} (mm)": n * s for axis, n, s in zip("xyz", shape, spacing, strict=True)}
    return found | {f"contrast of channel {i} (std / mean)": value for i, value in enumerate(contrasts)}


def volumes(counts: Mapping[int, int], voxel: float) -> dict[str, float]:
    """What is compared of a mask, by name: the volume of each label in ml.

    Args:
        counts: voxels of each label, by its value.
        voxel: mm^3.
    """
    return {f"volume of label {label} (ml)": n * voxel / 1000 for label, n in counts.items()}


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


class MeasureScand(MapTransform):
    """Keeps the `measures` of a scan (channels, X, Y, Z) in its metadata, as "measured".

    Args:
        keys: images on their stored voxels in RAS order.
    """

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            contrasts = [_contrast(channel) for channel in image.as_tensor()]  # MetaTensors copy metadata each time
            image.meta["measured"] = measures(image.pixdim.tolist(), image.shape[1:], contrasts)
        return data


def _contrast(channel: torch.Tensor) -> float:
    """std / mean of the non-zero voxels (X, Y, Z); nothing of the channel's size is made."""
    n, total = int(channel.count_nonzero()), float(channel.sum(dtype=torch.float64))
    squares = sum(float(plane.double().square().sum()) for plane in channel)
    return math.sqrt(max(squares / n - (total / n) ** 2, 0.0)) / (total / n) if total else 0.0


class Familiard(MapTransform):
    """Adds the volumes of a mask to what was "measured" of its scan, and says in the metadata what is unlike training.

    Args:
        keys: masks (1, X, Y, Z) of label values on the scan's grid, with the metadata that `MeasureScand` wrote.
        ranges: what `learn` found, or None, where nothing is known of the training cases.
        values: of the labels, background first, or None.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ranges: Mapping[str, Sequence[float]] | None = None,
        values: Sequence[int] | None = None,
    ) -> None:
        super().__init__(keys)
        self.ranges, self.labels = ranges or {}, list(values or [])[1:]

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            mask = data[key]
            counts = {label: int((mask.as_tensor() == label).sum()) for label in self.labels}
            found = {**mask.meta["measured"], **volumes(counts, float(mask.affine[:3, :3].det().abs()))}
            mask.meta |= {"measured": found, UNLIKE: unfamiliar(found, self.ranges)}
        return data


def warn(scan: str, unlike: Sequence[str]) -> None:
    """Says of a scan what about it is unlike the training cases, if anything is."""
    if unlike:
        logger.warning(
            "%s is unlike the scans this network was trained on, do not trust its mask unseen: %s.",
            scan,
            "; ".join(unlike),
        )


class FamiliarityReport:
    """Writes `report.csv` into the output folder: the measures of every scan, and what is unlike the training cases.

    What is unlike is also said when all scans are done. Lines of scans that were segmented into the folder before stay.

    Args:
        output_dir: for the report.
    """

    def __init__(self, output_dir: str) -> None:
        self.file = Path(output_dir) / "report.csv"
        self.rows: dict[str, dict[str, object]] = {}
        self.unlike: dict[str, list[str]] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.say)

    def start(self, engine: Engine) -> None:
        """Reads the report of an earlier run.

        Raises:
            UserError: a file of that name that is no such report.
        """
        if self.file.is_file():
            with open(self.file, newline="") as file:
                rows = list(csv.DictReader(file))
            if not all({"scan", UNLIKE} <= set(row) for row in rows):
                raise UserError(f"{self.file} is not a report of an inference; move it, or give another --output_dir.")
            self.rows = {row["scan"]: row for row in rows}

    def __call__(self, engine: Engine) -> None:
        if isinstance(engine.state.output, list):  # else this scan could not be segmented
            meta = engine.state.output[0]["pred"].meta
            scan = Path(meta["filename_or_obj"]).name
            rounded = {name: round(value, 4) for name, value in meta["measured"].items()}
            self.rows[scan] = {"scan": scan, **rounded, UNLIKE: "; ".join(meta[UNLIKE])}
            self.unlike[scan] = meta[UNLIKE]
            write_whole(self.file, self._write)

    def say(self, engine: Engine) -> None:
        """Warns of each scan of this run that is unlike the training cases."""
        for scan, unlike in self.unlike.items():
            warn(scan, unlike)

    def _write(self, partial: Path) -> None:
        text = io.StringIO()
        columns = [name for name in dict.fromkeys(name for row in self.rows.values() for name in row) if name != UNLIKE]
        writer = csv.DictWriter(text, [*columns, UNLIKE], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        partial.write_text(text.getvalue())
