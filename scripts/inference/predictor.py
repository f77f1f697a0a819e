"""Inference from Python: an array or a file in, labels on its own grid out, nothing on the disk.

Everything is taken from `configs/inference.json`, so the voxels are those that the command writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImaged

from ..data.geometry import Geometry, three_axes
from ..data.scans import find_scans
from ..preprocessing.loading import LoadScand, as_scan
from ..utils.device import amp_kwargs
from ..utils.errors import UserError, first_cause
from ..utils.settings import give, prepare
from ..weights import checkpoints
from ..weights.model_settings import BUNDLE_ROOT
from .engines import ScanDataset
from .out_of_distribution import UNLIKE, warn_if_unlike
from .probabilities import SaveProbabilitiesd, on_scan_grid
from .sliding_window import SlidingWindowInferer

Image = nib.spatialimages.SpatialImage | np.ndarray


class Predictor:
    """A network with its weights, the way to its grid and the way back.

    Args:
        config: `configs/inference.json`, with the settings that it is to have.
    """

    def __init__(self, config: ConfigParser) -> None:
        with _unwrapped():
            checkpoints.check_weights(config.get_parsed_content("model_file"), config.get_parsed_content("network_def"))
            weights = checkpoints.load_checkpoint(config.get_parsed_content("model_file"))
            config.get_parsed_content("network_def").load_state_dict(weights)
            self.network = config.get_parsed_content("evaluator#network").eval()
            self.inferer = config.get_parsed_content("evaluator#inferer")
            self.device = torch.device(config.get_parsed_content("device"))
            self.amp = config.get_parsed_content("amp")
            self.model = config.get_parsed_content("model")
            self.labels = config.get_parsed_content("labels")
            self.from_file = config.get_parsed_content("preprocessing")
            to_file = config.get_parsed_content("postprocessing")
        self.from_memory = Compose([t for t in self.from_file.transforms if not isinstance(t, LoadScand)])
        self.to_memory = Compose([t for t in to_file.transforms if not isinstance(t, SaveImaged | SaveProbabilitiesd)])

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device | None = None, **settings) -> Predictor:
        """Load weights with the settings beside them.

        Args:
            weights: `models/model.pt` of the bundle by default.
            device: the first GPU by default, else the CPU.
            settings: values for names of `configs/inference.json`, for example `overlap=0.75`.

        Raises:
            UserError: the weights are missing or another network's, a name is no setting, or a value cannot be.
        """
        path = Path(BUNDLE_ROOT) / "configs/inference.json"
        if not path.is_file():
            raise UserError(f"{path} not found; predicting takes a clone of the bundle, whose root is on PYTHONPATH.")
        config = ConfigParser()
        config.read_config(str(path))
        given = {"model_file": weights and str(weights), "device": device and str(device)}
        give(config, {**settings, **{name: value for name, value in given.items() if value}})
        with _unwrapped():
            prepare(config)
        return cls(config)

    def __call__(self, image: str | Path | Image, affine: np.ndarray | None = None) -> np.ndarray:
        """Segment an image: labels (X, Y, Z) on its own grid, uint8 or int16, with the values of the data set's files.

        What about the scan is unlike the training cases is a warning of the logger "mednext".

        Args:
            image: a file in any format (of a case with a file a channel, any of them), a DICOM folder, a nibabel image,
                or an array (X, Y, Z) or (channels, X, Y, Z).
            affine: affine of an array, 4 x 4, voxel -> world (mm, x to the right, y to the front, z up).

        Raises:
            UserError: what the command would say of a file; an array without an affine.
        """
        with _unwrapped(), torch.inference_mode():
            case = self._preprocessed(image, affine)
            scores = self.segment(case["image"], self.inferer)
            mask = self.to_memory({**case, "pred": scores})["pred"]
            warn_if_unlike(str(case["image"].meta.get("filename_or_obj", "the image")), mask.meta[UNLIKE])
            return mask[0].numpy()

    def probabilities(self, image: str | Path | Image, affine: np.ndarray | None = None) -> np.ndarray:
        """Compute the probabilities of the classes, or regions, on an image's own grid: (classes, X, Y, Z), float16.

        Args:
            image: and `affine`, as for segmenting.
            affine: affine of an array.

        Raises:
            UserError: as for segmenting.
        """
        with _unwrapped(), torch.inference_mode():
            case = self._preprocessed(image, affine)
            scores = self.segment(case["image"], self.inferer.keeping_scores())
            (found,) = on_scan_grid(scores, case["image"], self.labels)
            return np.ascontiguousarray(found.numpy())

    def segment(self, image: torch.Tensor, inferer: SlidingWindowInferer) -> torch.Tensor:
        """Run the network over an image (C, X, Y, Z) that is on its grid, and return what `inferer` gives of it."""
        with torch.autocast(self.device.type, enabled=self.amp, **amp_kwargs(self.device)):
            return inferer(image[None].to(self.device), self.network)[0]

    def _preprocessed(self, image: str | Path | Image, affine: np.ndarray | None) -> dict:
        if not isinstance(image, str | Path):
            return self.from_memory({"image": in_memory(image, affine)})
        cases = find_scans(str(image), self.model.in_channels, dim=self.model.dim)
        if len(cases) > 1:
            raise UserError(f"{image} holds {len(cases)} scans; give one of its files.")
        case = ScanDataset(cases, self.from_file)[0]
        if "failure" in case:
            raise UserError(case["failure"])
        return case


def in_memory(image: Image, affine: np.ndarray | None = None) -> MetaTensor:
    """Make of an image what MONAI's LoadImage makes of a file.

    Args:
        image: a nibabel image, channels last if any, or an array, channels first if any.
        affine: affine of an array, 4 x 4.

    Returns:
        (channels, X, Y, Z) float32, with affine and shape of the native grid.

    Raises:
        UserError: an array whose affine is missing or spans no volume.
    """
    if isinstance(image, nib.spatialimages.SpatialImage):
        geometry, stored = Geometry.from_image(image), three_axes(np.asanyarray(image.dataobj))
        voxels = np.moveaxis(stored, -1, 0) if stored.ndim > 3 else stored
    else:
        voxels = np.asarray(image)
        geometry = Geometry(voxels.shape[-3:], _affine(affine))
    if not (np.isfinite(geometry.affine).all() and np.linalg.det(geometry.affine[:3, :3])):
        raise UserError(
            f"the affine of an image of the shape {voxels.shape} is {affine}; expected 4 x 4 numbers that span a"
            " volume: give that of its file, or numpy.diag([sx, sy, sz, 1]) for voxels of sx x sy x sz mm."
        )
    return as_scan(np.array(voxels if voxels.ndim > 3 else voxels[None], dtype=np.float32), geometry)


def _affine(given: np.ndarray | None) -> np.ndarray:
    """Return 4 x 4 numbers, nan where something else was given."""
    found = np.empty(0) if given is None else np.asarray(given)
    return np.full((4, 4), np.nan) if found.shape != (4, 4) else found.astype(np.float64)


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Let what an expression or a transform raises come out as it was raised, without what MONAI wraps it in."""
    try:
        yield
    except RuntimeError as e:
        raise first_cause(e) from None
