"""Coarse first: a network on a coarse grid looks where the labels are, and the network itself segments that box alone.

Both come from one training, see training/coarse.py. The coarse weights lie in the folder `coarse` beside the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from scipy.ndimage import find_objects, generate_binary_structure
from scipy.ndimage import label as components

from ..preprocessing.intensity import SCALES, Intensityd, scales_of_whole
from ..preprocessing.part import PART, SEGMENTED
from ..preprocessing.resampling import GridSpacingd, decide_labels
from ..preprocessing.scan_check import CheckGridd
from ..utils.errors import UserError
from ..weights.model_settings import ModelSettings
from .memory import CheckMemoryd
from .predictor import Predictor

MARGIN = 20.0  # mm about what was found: TotalSegmentator's for its coarse networks, seven voxels of 3 mm
SPECK_VOXELS, SPECK_SHARE = 8, 0.1  # below both, the share of its label's largest one, a component is left out
ALIKE = (  # of both networks
    *("in_channels", "labels", "label_values", "regions", "regions_class_order", "intensity", "crop_to_nonzero", "dim"),
)

logger = logging.getLogger("mednext")


class FindBoxd(MapTransform):
    """Finds the part of a scan that is to be segmented, by the coarse network, and notes it in the metadata.

    The part is the box of all that the coarse network labels, specks left out, with a margin; and at least a window of
    the network, which costs the same as less of it. Where nothing is found, all of the scan is segmented, with a
    warning. What normalises the whole scan is noted, too, so that the part is normalised by it.

    Args:
        keys: images (C, X, Y, Z) on their stored voxels in RAS order, cropped if they are to be.
        weights: of the network itself; the coarse ones lie in `coarse` beside them.
        model: the settings of these.
        patch_size: the network's window.
        settings: of the coarse network's inference, such as `device`.

    Raises:
        UserError: there are no coarse weights, or they were trained for something else.
    """

    def __init__(
        self, keys: KeysCollection, weights: str | Path, model: ModelSettings, patch_size: Sequence[int], **settings
    ) -> None:
        super().__init__(keys)
        file = coarse_weights(weights)
        if not file.is_file():
            raise UserError(
                f"{file} not found, by which --fast finds where to look; train both networks by one command: python -m"
                " monai.bundle run training --config_file \"['configs/train.json','configs/fast.json']\" --dataset_dir"
                f" FOLDER --ckpt_dir {file.parents[1]} (with --resume auto where the other is trained already); or"
                " leave --fast out."
            )
        self.coarse = Predictor.load(file, **settings)
        for name in ALIKE:
            one, other = getattr(self.coarse.model, name), getattr(model, name)
            if one != other:
                raise UserError(
                    f"{file} was trained with {name} {one}, {weights} with {other}; train both by one command, or leave"
                    " --fast out."
                )
        self.window = np.array(patch_size) * model.spacing  # in mm
        steps = self.coarse.from_file.transforms
        to_grid = [step for step in steps if isinstance(step, CheckGridd | CheckMemoryd | Intensityd | GridSpacingd)]
        self.to_grid = Compose(to_grid[:-1])
        self.normalise = Intensityd("image", model.intensity, "resampled")

    def __call__(self, data: dict) -> dict:
        """Note the part of each image.

        Raises:
            UserError: the scan has too few voxels on the coarse grid, or too many.
        """
        for key in self.key_iterator(data):
            image = data[key]
            thinned = self.to_grid({"image": image})["image"]  # type: ignore[index,call-overload]
            labels = self._labels(thinned)
            name = str(image.meta.get("filename_or_obj", "the image"))
            spacing = np.array(image.pixdim.tolist())
            if (found := box_of(labels)) is None:
                logger.warning("%s: the coarse network finds nothing; the whole scan is segmented.", name)
                image.meta[SEGMENTED] = "all: the coarse network found nothing"
                continue
            to_scan = torch.linalg.inv(image.affine.double().cpu()) @ thinned.affine.double().cpu()
            part = with_margin(_faces(found, to_scan), image.shape[1:], spacing, self.window)
            image.meta[PART] = part.tolist()
            image.meta[SCALES] = scales_of_whole(image, thinned, self.normalise.intensity)
            edges = (size * spacing for size in (part[1] - part[0], image.shape[1:]))
            image.meta[SEGMENTED] = " of ".join(" x ".join(f"{edge:.0f}" for edge in each) for each in edges) + " mm"
            logger.info("%s: %s are segmented.", name, image.meta[SEGMENTED])
        return data

    def _labels(self, image: MetaTensor) -> np.ndarray:
        """Segment an image on the coarse grid there, before it is normalised: (X, Y, Z), background 0."""
        with torch.inference_mode():
            scores = self.coarse.segment(
                self.normalise({"image": image})["image"], self.coarse.inferer.keeping_scores()
            )
            return decide_labels(scores, self.coarse.labels.region_order).cpu().numpy()


def coarse_weights(weights: str | Path) -> Path:
    """Name the coarse weights beside others: `models/model.pt` -> `models/coarse/model.pt`."""
    return Path(weights).parent / "coarse" / "model.pt"


def on_whole_scan(native: Sequence, measure: MapTransform, find_box: FindBoxd | None) -> list:
    """List the steps before a scan is resampled.

    Whether its grid is too large for this computer depends on its part, which `CheckMemoryd` knows.
    """
    if find_box is None:
        return [*native, measure]
    return [*(step for step in native if not isinstance(step, CheckGridd)), measure, find_box]


def box_of(labels: np.ndarray) -> np.ndarray | None:
    """Find the box (2, 3), first and behind the last voxel, of all labels but 0 without their specks; None without any.

    A speck is a component, voxels with a common corner belonging together, that is both small and small beside the
    largest one of its label.
    """
    boxes = []
    for value, around in enumerate(find_objects(labels), 1):
        if around is None:
            continue
        numbered, _ = components(labels[around] == value, generate_binary_structure(3, 3))
        sizes = np.bincount(numbered.ravel())[1:]
        for size, within in zip(sizes, find_objects(numbered), strict=True):
            if size >= min(SPECK_VOXELS, SPECK_SHARE * sizes.max()):
                boxes.append([[a.start + b.start, a.start + b.stop] for a, b in zip(around, within, strict=True)])
    if not boxes:
        return None
    found = np.array(boxes)
    return np.array([found[:, :, 0].min(axis=0), found[:, :, 1].max(axis=0)])


def with_margin(faces: np.ndarray, shape: Sequence[int], edges: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Widen a box (2, 3) in a scan's voxels by the margin, and to a window where the scan has as much.

    Args:
        faces: of the box, whole numbers lying between voxels.
        shape: voxels of the scan.
        edges: of these in mm.
        window: of the network in mm.

    Returns:
        First and behind the last voxel.
    """
    size = np.array(shape)
    low = np.maximum(np.floor(faces[0] - MARGIN / edges), 0).astype(int)
    high = np.minimum(np.ceil(faces[1] + MARGIN / edges), size).astype(int)
    wanted = np.minimum(np.ceil(window / edges).astype(int), size)
    lacking = np.maximum(wanted - (high - low), 0)
    low = np.where(lacking > 0, np.clip(low - lacking // 2, 0, size - wanted), low)
    return np.array([low, np.where(lacking > 0, low + wanted, high)])


def _faces(box: np.ndarray, to_scan: torch.Tensor) -> np.ndarray:
    """Map the faces of a box of one grid's voxels (2, 3) to another grid, whose axes are the same."""
    return (box - 0.5) @ to_scan[:3, :3].numpy().T + to_scan[:3, 3].numpy() + 0.5
