"""What planning and checks need to know of a data set: every case measured once, and nnU-Net's fingerprint of all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..data.checks import check_image, check_same_grid, label_indices
from ..data.geometry import Geometry, StoredImage
from ..data.images import read_image
from ..data.labels import Labels
from ..data.scans import image_files
from ..utils.errors import UserError

QUANTILES = np.linspace(0, 1, 201)  # of foreground intensities; every half per cent


def fingerprint_case(case: dict, channels: int, labels: Labels) -> dict:
    """Check one case in every way and measures it; nothing stays in memory.

    Args:
        case: "case", "image" and "label", see data/datasets.py.
        channels: image channels that dataset.json names.
        labels: that dataset.json names.

    Returns:
        orientation ("RAS" ..); tilt (degrees); header (what its forms say differently); in the order of RAS axes: shape
        (voxels), spacing (mm), cropped (shape of the smallest box with all non-zero voxels); labels (voxels of each
        label, those to ignore last); channels (mean, std of non-zero voxels); foreground (of each channel: mean, std,
        min, max and QUANTILES of the voxels with a label, None where there are none); digest (of the image's voxels).

    Raises:
        UserError: one sentence about what is wrong with it.
    """
    label = read_image(case["label"])
    measured: _Channels | None = None
    for path in image_files(case):
        image = read_image(path)
        check_image(image)
        if measured is None:
            check_same_grid(label.path, label.geometry, path, image.geometry)
            indices = label_indices(label, labels.file_values)
            measured = _Channels(path, image.geometry, (indices > 0) & (indices < len(labels.values)))
        check_same_grid(path, image.geometry, measured.path, measured.geometry)
        for channel in image.channels():
            measured.add(channel)
    if measured is None or len(measured.inside) != channels:
        found = 0 if measured is None else len(measured.inside)
        raise UserError(
            f"{image_files(case)[0]} and its case have {found} channels; dataset.json names {channels}: correct either."
        )
    geometry = measured.geometry
    counts = [np.bincount(plane.ravel(), minlength=len(labels.file_values)) for plane in indices]
    return {
        "shape": geometry.in_ras(geometry.shape),
        "spacing": geometry.in_ras(geometry.spacing),
        "orientation": geometry.orientation,
        "tilt": geometry.tilt,
        "header": geometry.disagreement,
        "cropped": geometry.in_ras(measured.cropped()),
        "labels": np.sum(counts, axis=0).tolist(),
        "channels": measured.everywhere,
        "foreground": measured.inside,
        "digest": measured.digest.hexdigest(),
    }


class _Channels:
    """What is measured of a case, one channel at a time."""

    def __init__(self, path: str, geometry: Geometry, foreground: np.ndarray) -> None:
        self.path, self.geometry, self.foreground = path, geometry, foreground
        self.filled = [np.zeros(n, dtype=bool) for n in geometry.shape]  # where each axis has non-zero voxels
        self.everywhere: list[dict | None] = []
        self.inside: list[dict | None] = []
        self.digest = hashlib.sha1(usedforsecurity=False)

    def add(self, channel: StoredImage) -> None:
        self.digest.update(np.ascontiguousarray(channel.voxels).data)
        values = channel.voxels * channel.slope + channel.intercept if channel.scaled else channel.voxels
        nonzero = values != 0
        for axis, occupied in enumerate(self.filled):
            occupied |= nonzero.any(axis=tuple(a for a in range(3) if a != axis))
        self.everywhere.append(_moments(channel, nonzero))
        self.inside.append(_moments(channel, self.foreground, quantiles=True))

    def cropped(self) -> list[int]:
        boxes = [np.flatnonzero(occupied) for occupied in self.filled]
        return [
            int(box[-1] - box[0] + 1) if len(box) else len(filled)
            for box, filled in zip(boxes, self.filled, strict=True)
        ]


def _moments(channel: StoredImage, mask: np.ndarray, quantiles: bool = False) -> dict | None:
    stored = channel.voxels[mask]
    if not stored.size:
        return None
    values = stored.astype(np.float32) * np.float32(channel.slope) + np.float32(channel.intercept)
    found: dict = {"mean": float(values.mean(dtype=np.float64)), "std": float(values.std(dtype=np.float64))}
    if quantiles:
        found |= {"min": float(values.min()), "max": float(values.max())}
        found["quantiles"] = [float(f"{q:.9g}") for q in np.quantile(values, QUANTILES)]
    return found


# ---- the data set


def dataset_fingerprint(records: Sequence[dict]) -> dict:
    """Make nnU-Net's `dataset_fingerprint.json`: spacings, shapes after cropping, foreground intensities by channel.

    Every case counts alike, as there; percentiles come from each case's quantiles.
    """
    channels = len(records[0]["foreground"])
    return {
        "spacings": [record["spacing"] for record in records],
        "shapes_after_crop": [record["cropped"] for record in records],
        "foreground_intensity_properties_per_channel": {
            str(c): _pooled([r["foreground"][c] for r in records if r["foreground"][c]]) for c in range(channels)
        },
        "median_relative_size_after_cropping": float(
            np.median([np.prod(record["cropped"]) / np.prod(record["shape"]) for record in records])
        ),
    }


def _pooled(found: Sequence[dict]) -> dict | None:
    if not found:
        return None
    means, deviations = (np.array([f[name] for f in found]) for name in ("mean", "std"))
    quantiles = np.array([f["quantiles"] for f in found])
    values = np.quantile(quantiles, np.linspace(0, 1, 2001))  # where to look at the mean of the cases' distributions
    share = np.mean([np.interp(values, q, QUANTILES) for q in quantiles], axis=0)
    low, median, high = np.interp([0.005, 0.5, 0.995], share, values)
    return {
        "mean": float(means.mean()),
        "median": float(median),
        "std": float(np.sqrt((deviations**2 + means**2).mean() - means.mean() ** 2)),
        "min": min(f["min"] for f in found),
        "max": max(f["max"] for f in found),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }
