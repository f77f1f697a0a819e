"""Reads every case once and remembers it: whether it can be used, and what planning and checks need to know of it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from ..data.checks import check_image, check_label, check_same_grid
from ..data.datasets import cases, channel_names, image_files
from ..data.images import read
from ..data.labels import read as read_labels
from ..data.labels import stored
from ..utils.device import loader_workers
from ..utils.errors import UserError
from ..utils.files import remembered, write_whole

QUANTILES = np.linspace(0, 1, 201)  # of foreground intensities; every half per cent
SAVE_EVERY = 20  # seconds

logger = logging.getLogger("mednext")


def examine(case: dict, channels: int, values: Sequence[int], ignore: int | None = None) -> dict:
    """All checks of one case, and its measures; nothing stays in memory.

    Args:
        case: "case", "image" and "label", see data.py.
        channels: image channels that dataset.json names.
        values: of the labels that dataset.json names, background first.
        ignore: value of voxels that nobody annotated, or None.

    Returns:
        orientation ("RAS" ..); in the order of RAS axes: shape (voxels), spacing (mm), cropped (shape of the smallest
        box with all non-zero voxels); labels (voxels of each label, those to ignore last); channels (mean, std of
        non-zero voxels); foreground (of each channel: mean, std, min, max and QUANTILES of the voxels with a label,
        None where there are none); digest (of the image's voxels).

    Raises:
        UserError: one sentence about what is wrong with it.
    """
    paths = image_files(case)
    label_image, label = read(case["label"])
    first, foreground, digest, filled = None, None, hashlib.sha1(usedforsecurity=False), None
    everywhere, inside = [], []
    for path, image, voxels in _channels(paths):
        if first is None:
            first = image
            check_same_grid(case["label"], label_image, path, image)
            label = check_label(case["label"], label_image, label, stored(values, ignore))
            foreground = (label > 0) & (label < len(values))
            filled = [np.zeros(n, dtype=bool) for n in voxels.shape]
        check_same_grid(path, image, paths[0], first)
        digest.update(np.ascontiguousarray(voxels))
        scale, nonzero = _nonzero(image, voxels)
        for axis, occupied in enumerate(filled):
            occupied |= nonzero.any(axis=tuple(a for a in range(3) if a != axis))
        everywhere.append(_moments(voxels[nonzero], *scale))
        inside.append(_moments(voxels[foreground], *scale, quantiles=True))
    if len(inside) != channels:
        raise UserError(
            f"{paths[0]} and its case have {len(inside)} channels; dataset.json names {channels}: correct either."
        )
    boxes = [np.flatnonzero(occupied) for occupied in filled]
    cropped = [int(box[-1] - box[0] + 1) if len(box) else n for box, n in zip(boxes, first.shape, strict=False)]
    ras = _ras(first)
    return {
        **_grid(first),
        "orientation": "".join(nib.aff2axcodes(first.affine)),
        "cropped": [cropped[axis] for axis in ras],
        "labels": sum(np.bincount(plane.ravel(), minlength=len(stored(values, ignore))) for plane in label).tolist(),
        "channels": everywhere,
        "foreground": inside,
        "digest": digest.hexdigest(),
    }


def _ras(image: nib.Nifti1Image) -> np.ndarray:
    """Which stored axis is the grid's x, y, z."""
    return np.argsort(nib.io_orientation(image.affine)[:, 0])


def _grid(image: nib.Nifti1Image) -> dict:
    ras, zooms = _ras(image), image.header.get_zooms()
    return {"shape": [image.shape[axis] for axis in ras], "spacing": [float(zooms[axis]) for axis in ras]}


def _nonzero(image: nib.Nifti1Image, voxels: np.ndarray) -> tuple[tuple[float, float], np.ndarray]:
    """Slope and intercept of the file, and where its stored voxels stand for something else than zero."""
    scale = image.dataobj.slope, image.dataobj.inter
    return scale, voxels != 0 if scale == (1.0, 0.0) else voxels * scale[0] + scale[1] != 0


def _channels(paths: Sequence[str]) -> Iterator[tuple[str, nib.Nifti1Image, np.ndarray]]:
    """(file, header, stored voxels (X, Y, Z)) of each channel, one at a time."""
    for path in paths:
        image, voxels = read(path)
        check_image(path, voxels)
        for channel in [voxels] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0):
            yield path, image, channel


def _moments(stored: np.ndarray, slope: float, intercept: float, quantiles: bool = False) -> dict | None:
    if not stored.size:
        return None
    values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    found = {"mean": float(values.mean(dtype=np.float64)), "std": float(values.std(dtype=np.float64))}
    if quantiles:
        found |= {"min": float(values.min()), "max": float(values.max())}
        found["quantiles"] = [round(float(q), 6) for q in np.quantile(values, QUANTILES)]
    return found


def survey(
    items: Sequence[dict], channels: int, values: Sequence[int], memory: str, ignore: int | None = None
) -> list[dict]:
    """The records of all cases: `examine`'s, with "case", "file" and, where it cannot be used, "error" alone.

    Cases that were read before and have not changed since, by size and time of their files, are not read again; what
    has been read is kept at least every 20 seconds, so that an interrupted survey goes on.

    Args:
        items: cases with "image" and "label".
        channels: image channels that dataset.json names.
        values: of the labels that dataset.json names, background first.
        memory: JSON file to remember the records in.
        ignore: value of voxels that nobody annotated, or None.
    """
    path = Path(memory)
    known = remembered(path)
    signatures = {case["label"]: _signature(case, channels, values, ignore) for case in items}
    pending = [case for case in items if known.get(case["label"], {}).get("signature") != signatures[case["label"]]]

    def attempt(case: dict) -> tuple[dict, dict]:
        try:
            return case, examine(case, channels, values, ignore)
        except UserError as e:
            return case, {"error": str(e)}

    saved = time.monotonic()
    try:
        with ThreadPoolExecutor(loader_workers() + 1) as pool:
            for case, record in tqdm(
                pool.map(attempt, pending), total=len(pending), desc="reading", disable=not pending
            ):
                # a fault is not remembered: it may have been the disk's or the network's
                signature = None if "error" in record else signatures[case["label"]]
                names = {"case": case["case"], "file": image_files(case)[0], "signature": signature}
                known[case["label"]] = names | record
                if time.monotonic() - saved > SAVE_EVERY:
                    write_whole(path, lambda partial: partial.write_text(json.dumps(known)))
                    saved = time.monotonic()
    finally:
        if pending:
            write_whole(path, lambda partial: partial.write_text(json.dumps(known)))
    return [known[case["label"]] for case in items]


def survey_folder(dataset_dir: str, memory: str) -> list[dict]:
    """`survey` of all labelled cases of a Decathlon or nnU-Net v2 folder.

    Raises:
        UserError: the folder or its dataset.json cannot be used at all.
    """
    labels = read_labels(dataset_dir)
    return survey(cases(dataset_dir), len(channel_names(dataset_dir)), labels.values, memory, labels.ignore)


def _signature(case: dict, channels: int, values: Sequence[int], ignore: int | None) -> list:
    states = [(p, Path(p).stat()) for p in (*image_files(case), case["label"]) if Path(p).exists()]
    return [channels, list(values), ignore, *([p, s.st_size, s.st_mtime_ns] for p, s in states)]
