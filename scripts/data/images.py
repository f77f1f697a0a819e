"""One reader for the image files on disk: where their voxels lie, and what they hold as stored."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener

from ..utils.errors import UserError

ENDINGS = (".nii.gz", ".nii")


def tilt(affine: np.ndarray) -> float:
    """Measure how far the stored axes lie off the patient's, in degrees: the largest angle to the nearest one, 0 to 90.

    Reorientation turns axes onto the nearest of the patient's; this is what it leaves.
    """
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    columns = columns / np.linalg.norm(columns, axis=0)
    nearest = nib.io_orientation(np.asarray(affine, dtype=np.float64))[:, 0]
    if not np.isfinite(nearest).all():
        return 0.0
    along = [abs(columns[int(axis), stored]) for stored, axis in enumerate(nearest)]
    return float(np.degrees(np.arccos(np.clip(min(along), 0.0, 1.0))))


@dataclass(frozen=True, eq=False)
class Geometry:
    """Says where the voxels of a scan lie; checks, fingerprint, plan and cache ask it alone.

    Args:
        shape: voxels along the three stored axes.
        affine: (4, 4) float64, stored voxel -> world in mm, x to the right, y to the front, z up (RAS+).
    """

    shape: tuple[int, ...]
    affine: np.ndarray

    @classmethod
    def from_image(cls, image: nib.spatialimages.SpatialImage) -> Geometry:
        """Take it from a nibabel image, whose affine is the sform where there is one, else the qform."""
        return cls(tuple(image.shape[:3]), np.asarray(image.affine, dtype=np.float64))

    @property
    def spacing(self) -> tuple[float, ...]:
        """Edges of a voxel along the stored axes in mm."""
        return tuple(float(f"{edge:.7g}") for edge in voxel_sizes(self.affine))  # headers are float32

    @property
    def tilt(self) -> float:
        """Degrees by which the axes lie off the patient's, see `tilt`."""
        return round(tilt(self.affine), 2)

    @property
    def orientation(self) -> str:
        """Directions in which the stored axes rise, for example "RAS"."""
        return "".join(nib.aff2axcodes(self.affine))

    def in_ras(self, per_axis: tuple | list) -> list:
        """Reorders what is given for each stored axis into the order x, y, z of the network's grid."""
        order = np.argsort(nib.io_orientation(self.affine)[:, 0])
        return [per_axis[axis] for axis in order]


class StoredImage(NamedTuple):
    """Hold a file's voxels as stored; `voxels * slope + intercept` are its values."""

    path: str
    geometry: Geometry
    voxels: np.ndarray  # (X, Y, Z) or, with channels, (X, Y, Z, C)
    slope: float
    intercept: float

    @property
    def scaled(self) -> bool:
        """Whether values differ from what is stored."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    def channels(self) -> Iterator[StoredImage]:
        """Yield each channel as an image (X, Y, Z) of its own, sharing the memory."""
        for voxels in [self.voxels] if self.voxels.ndim == 3 else np.moveaxis(self.voxels, -1, 0):
            yield self._replace(voxels=voxels)


def read_image(path: str | Path) -> StoredImage:
    """Read a file to its end.

    Raises:
        UserError: the file is missing, cannot be read to its end, or has no grid.
    """
    image = open_image(path)
    try:
        stored = image.dataobj
        assert isinstance(stored, ArrayProxy)  # of every file that nibabel opens
        voxels = np.asanyarray(stored.get_unscaled())
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as e:
        raise _incomplete(path, e) from e
    require_spacing(path, image)
    return StoredImage(str(path), Geometry.from_image(image), voxels, stored.slope, stored.inter)


def open_image(path: str | Path) -> nib.Nifti1Image:
    """Read a file's header alone.

    Raises:
        UserError: the file is missing or no NIfTI file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} not found; add the file or remove its case.")
    try:
        image = nib.load(path)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as e:
        raise _incomplete(path, e) from e
    if not isinstance(image, nib.Nifti1Image):
        raise UserError(f"{path} is a {type(image).__name__}; expected a NIfTI file: convert it.")
    return image


def _incomplete(path: str | Path, error: Exception) -> UserError:
    size = Path(path).stat().st_size
    return UserError(f"{path} ({size} bytes) is not a complete NIfTI file ({error}); copy or export it again.")


def require_spacing(path: str | Path, image: nib.Nifti1Image) -> None:
    """Raise UserError unless the stored voxel spacing and the affine span a volume.

    nibabel silently reads a spacing of 0 as 1 mm, so the header is read again without its repairs.
    """
    with ImageOpener(str(path)) as file:
        header = type(image.header).from_fileobj(file, check=False)
    spacing = header["pixdim"][1:4]
    affine = image.affine[:3, :3]
    if not (np.isfinite(spacing).all() and spacing.all() and np.isfinite(affine).all() and np.linalg.det(affine)):
        found = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(f"{path} has a voxel spacing of {found} mm; expected it positive: repair the header.")
