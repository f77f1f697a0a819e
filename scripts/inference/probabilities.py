"""Probabilities of each class on a scan's own grid, in a file as nnU-Net writes them, a few classes at a time.

`CASE.npz` holds "probabilities" (classes, Z, Y, X), float16; "affine", of (X, Y, Z) in RAS+ mm; and "about", JSON with
the scan's file and what the classes are.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..data.labels import Labels
from ..data.scans import case_of
from ..preprocessing.resampling import ScoresOnGrid, scan_grid
from ..utils.errors import UserError
from ..utils.files import write_whole
from .export import MaskLayout

AT_ONCE = 2**28  # voxels of all classes that are interpolated and written together
LEVEL = 1  # of compression: probabilities of 0 and 1 are most of them
ARRAY, HALF = "probabilities.npy", np.dtype("<f2")
DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, zlib.error, zipfile.BadZipFile)


class SaveProbabilitiesd(MapTransform):
    """Writes probabilities on the network's grid to a file on the scan's, before they become labels.

    Args:
        keys: probabilities (classes, *network grid).
        layout: names the files.
        labels: what the classes are.
        reference: the image that they were computed from.
    """

    def __init__(self, keys: KeysCollection, layout: MaskLayout, labels: Labels, reference: str = "image") -> None:
        super().__init__(keys)
        self.layout, self.labels, self.reference = layout, labels, reference

    def __call__(self, data: dict) -> dict:
        for key in self.key_iterator(data):
            image, scores = data[self.reference], data[key]
            affine, shape = scan_grid(image.meta)
            about = {"scan": os.path.abspath(image.meta["filename_or_obj"]), "labels": asdict(self.labels)}
            write_probabilities(
                self.layout.probabilities(case_of(image.meta)),
                (len(scores), *shape),
                affine.numpy(),
                about,
                on_scan_grid(scores, image, self.labels, AT_ONCE),
            )
        return data


def on_scan_grid(
    scores: torch.Tensor, image: MetaTensor, labels: Labels, at_once: int | None = None
) -> Iterator[torch.Tensor]:
    """Interpolate probabilities linearly on the grid of a scan, and yield them (some classes, X, Y, Z), float16.

    Args:
        scores: (classes, *network grid).
        image: that they were computed from, with the scan's grid in its metadata.
        labels: what the classes are; beyond the network's grid all is background.
        at_once: so many voxels of all classes together are made at once; None for all.
    """
    affine, shape = scan_grid(image.meta)
    step = len(scores) if at_once is None else max(1, at_once // math.prod(shape))
    outside = [float(labels.regions is None), *[0.0] * (len(scores) - 1)]
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        made = ScoresOnGrid(part.shape, image.affine, affine, shape, outside[start : start + step])
        made.add(part.as_tensor() if isinstance(part, MetaTensor) else part)
        yield made.scores


def write_probabilities(
    path: Path, shape: tuple[int, ...], affine: np.ndarray, about: dict, groups: Iterator[torch.Tensor]
) -> None:
    """Write a file of probabilities, whole or not at all.

    Args:
        path: of the file.
        shape: (classes, X, Y, Z).
        affine: of its voxels.
        about: goes into it as JSON.
        groups: the probabilities, some classes at a time.
    """
    classes, *space = shape
    header = {"descr": HALF.str, "fortran_order": False, "shape": (classes, *reversed(space))}

    def fill(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
            with archive.open(ARRAY, "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for group in groups:
                    for volume in group:
                        stream.write(np.ascontiguousarray(volume.numpy().T).data)
            for name, value in {"affine": affine, "about": np.array(json.dumps(about))}.items():
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, value, allow_pickle=False)

    write_whole(path, fill)


class ProbabilityFile:
    """Reads a file of probabilities class by class.

    Args:
        path: of the file.

    Raises:
        UserError: it is damaged, or none of this bundle's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                self.affine = found["affine"]
            self.scan, self.labels = str(about["scan"]), Labels(**about["labels"])
            with zipfile.ZipFile(path) as archive, archive.open(ARRAY) as stream:
                self.shape = self._shape(stream)
        except DAMAGED as e:
            raise self._refusal(e) from e

    def _shape(self, stream: IO[bytes]) -> tuple[int, ...]:
        np.lib.format.read_magic(stream)
        shape, fortran, kind = np.lib.format.read_array_header_1_0(stream)
        if fortran or kind != HALF or len(shape) != 4 or shape[0] != len(self.labels.names):
            raise ValueError(f"it has {kind} of the shape {shape} for {len(self.labels.names)} classes")
        return shape

    def volumes(self) -> Iterator[np.ndarray]:
        """Yield the probabilities (Z, Y, X) of each class; the file's checksum is compared at the end.

        Raises:
            UserError: it is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(ARRAY) as stream:
                classes, *space = self._shape(stream)
                for _ in range(classes):
                    read = stream.read(math.prod(space) * HALF.itemsize)
                    yield np.frombuffer(read, HALF).reshape(space)
                if stream.read(1):
                    raise ValueError("it is longer than it says")
        except DAMAGED as e:
            raise self._refusal(e) from e

    def _refusal(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} is no whole file of probabilities ({error}); expected one that --save_probabilities True"
            " wrote: segment its scan again."
        )
