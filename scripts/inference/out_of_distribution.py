"""The judgement whether a scan is like those a network was trained on, by grid, intensities and predicted volumes.

A network answers every input, and a mask of a whole head from a network that has only seen cut-outs of the hippocampus
looks as sure as any. What lies outside the ranges of training is written into the report of an inference, and said.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..data.geometry import tilt
from ..data.scans import case_id, case_of
from ..data.statistics import (
    LARGEST_TILT,
    TILT,
    class_sums,
    contrast,
    label_sums,
    label_volumes,
    present_ranges,
    rounded,
    scan_measures,
)
from ..preprocessing.part import segmented
from ..utils.errors import UserError
from ..utils.files import read_table, write_table
from ..utils.ownership import alone
from .organs import ORGANS, VOXELS, organ_columns

GRID_FACTOR = 1.25  # how many times more or less than in training spacing and extent may be
VOLUME_FACTOR = 2.0  # and the predicted volume of a label
CONTRAST_MARGIN = 0.5  # how far beyond the range of training contrast may be, in widths of that range

ROUNDING = 1e-12  # of the mean square, in double precision: less is no variance

PRECISION = "precision"  # column of the report
UNLIKE = "unlike the training cases"  # column of the report, entry of a mask's metadata

logger = logging.getLogger("mednext")


def out_of_range(found: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """Say of each measure that lies outside its range in training, widened by a margin, what it is and was.

    Args:
        found: the measures of a scan, by name, see `data.statistics`.
        ranges: the smallest and the largest value of each in training; a measure that is not here is not judged.
    """
    said = []
    for name, value in found.items():
        if name == TILT:
            said += _tilted(value, ranges.get(TILT, (0.0, 0.0))[1])
            continue
        if name not in ranges:
            continue
        low, high = ranges[name]
        least, most = _widened(name, low, high)
        if not least <= value <= most:
            said.append(f"{name} is {value:.3g}, in training {low:.3g} to {high:.3g}")
    return said


def _tilted(degrees: float, trained: float) -> list[str]:
    """Say of a tilt that neither augmentation nor the training cases have shown the network what it is."""
    if degrees <= max(LARGEST_TILT, GRID_FACTOR * trained):
        return []
    return [
        f"it is tilted by {degrees:.0f} degrees off the patient's axes, beyond the {LARGEST_TILT:.0f} that augmentation"
        " shows a network: look whether its header is right"
    ]


def _widened(name: str, low: float, high: float) -> tuple[float, float]:
    """Widen the range of a measure by what scans of one kind may differ."""
    if name.startswith("contrast"):
        margin = CONTRAST_MARGIN * (high - low)
        return low - margin, high + margin
    factor = VOLUME_FACTOR if name.startswith("volume") else GRID_FACTOR
    return low / factor, high * factor


class MeasureScand(MapTransform):
    """Keeps the measures of a scan (channels, X, Y, Z) in its metadata, as "measured".

    Args:
        keys: images on their stored voxels in RAS order, cropped if the network gets them so.
    """

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image = data[key]
            if said := image.meta.get("header"):
                logger.warning(
                    "%s has a header of two minds: %s.", image.meta.get("filename_or_obj", "the image"), said
                )
            contrasts = [_contrast(channel) for channel in image.as_tensor()]  # MetaTensors copy metadata each time
            degrees = round(tilt(image.affine.numpy()), 2)
            image.meta["measured"] = scan_measures(image.pixdim.tolist(), image.shape[1:], contrasts, degrees)
        return data


def _contrast(channel: torch.Tensor) -> float:
    """Measure the contrast of the non-zero voxels (X, Y, Z) without making anything of the channel's size."""
    if not (n := int(channel.count_nonzero())):
        return 0.0
    mean = float(channel.sum(dtype=torch.float64)) / n
    squares = sum(float(plane.double().square().sum()) for plane in channel) / n
    variance = squares - mean**2
    return contrast(mean, math.sqrt(variance) if variance > ROUNDING * squares else 0.0)


class CompareWithTrainingd(MapTransform):
    """Adds the volumes of a mask to what was "measured" of its scan, and to the metadata what is unlike training.

    Args:
        keys: masks (1, X, Y, Z) of label values on the scan's grid, with the metadata that `MeasureScand` wrote.
        ranges: smallest and largest value of each measure in training, or None where nothing is known of it.
        classes: label values of each label or region whose volume is measured, by its name.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ranges: Mapping[str, Sequence[float]] | None = None,
        classes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(keys)
        self.classes = {name: list(group) for name, group in (classes or {}).items()}
        self.ranges = present_ranges(ranges or {}, self.classes)

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            mask = data[key]
            counts = class_sums(label_sums(mask[0].cpu().numpy()), self.classes)
            found = {**mask.meta["measured"], **label_volumes(counts, float(mask.affine[:3, :3].det().abs()))}
            mask.meta |= {"measured": found, VOXELS: counts, UNLIKE: out_of_range(found, self.ranges)}
        return data


def warn_if_unlike(scan: str, unlike: Sequence[str]) -> None:
    """Warn of a scan that is unlike the training cases, and say in what.

    Args:
        scan: its name.
        unlike: sentences of `out_of_range`; without any there is no warning.
    """
    if unlike:
        logger.warning(
            "%s is unlike the scans this network was trained on, do not trust its mask unseen: %s.",
            scan,
            "; ".join(unlike),
        )


class InferenceReport:
    """Writes `report.csv` into the output folder: the measures of every case, and what is unlike the training cases.

    It says of each mask in which precision the network computed it. What is unlike is also said when all scans are
    done. Rows of cases that were segmented into the folder before stay.

    Args:
        output_dir: folder for the report.
        channels: of a case, by which its id is read from rows of 0.6, which have the name of its first file alone.
        precision: of the network, such as "bfloat16".
    """

    def __init__(self, output_dir: str, channels: int = 1, precision: str = "") -> None:
        self.file, self.channels, self.precision = Path(output_dir) / "report.csv", channels, precision
        self.rows: dict[str, dict[str, object]] = {}
        self.unlike: dict[str, list[str]] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.read_earlier)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.warn)

    def read_earlier(self, engine: Engine) -> None:
        """Read the report of an earlier run, or of one at the same time, whose rows stay.

        Raises:
            UserError: a file of that name that is no such report.
        """
        if self.file.is_file():
            rows = read_table(self.file)
            if not all({"scan", UNLIKE} <= set(row) for row in rows):
                raise UserError(f"{self.file} is not a report of an inference; move it, or give another --output_dir.")
            named: list[dict[str, object]] = [
                {"case": case_id(Path(row["scan"]), self.channels), **row} for row in rows
            ]
            self.rows = {str(row["case"]): row for row in named}

    def __call__(self, engine: Engine) -> None:
        """Add the row of the case that was segmented last."""
        if isinstance(engine.state.output, list):  # else this scan could not be segmented
            meta = engine.state.output[0]["pred"].meta
            case, scan = case_of(meta), str(meta["filename_or_obj"])
            measured = {name: rounded(float(value)) for name, value in meta["measured"].items()}
            measured |= organ_columns(meta.get(ORGANS, {}))
            measured |= segmented(meta)
            made = {PRECISION: self.precision, UNLIKE: "; ".join(meta[UNLIKE])}
            self.unlike[scan] = meta[UNLIKE]
            with alone(self.file):
                self.read_earlier(engine)
                self.rows[case] = {"case": case, "scan": scan, **measured, **made}
                columns = dict.fromkeys(name for row in self.rows.values() for name in row if name not in made)
                write_table(self.file, [*columns, *made], self.rows.values())

    def warn(self, engine: Engine) -> None:
        """Warn of each scan of this run that is unlike the training cases."""
        for scan, unlike in self.unlike.items():
            warn_if_unlike(Path(scan).name, unlike)
