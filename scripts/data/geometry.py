"""Where the voxels of an image lie, and what its file holds as stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from ..utils.device import free_memory
from ..utils.errors import UserError

MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "micron": 1e-3, "meter": 1e3}  # of a header's unit of length
SAME_FORM = 1e-3  # by which the forms of a header may differ: what float32 and quaternions leave


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
    """Says where the voxels of a scan lie; checks, fingerprint, plan, network and cache ask it alone.

    Args:
        shape: voxels along the three stored axes.
        affine: (4, 4) float64, stored voxel -> world in mm, x to the right, y to the front, z up (RAS+). It is the
            sform where the header has one, else the qform, else the spacing alone, as nibabel has it.
        unit: of length, as the header names it.
        disagreement: what the header's forms say differently, as a sentence, or an empty text.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    unit: str = "mm"
    disagreement: str = field(default="", repr=False)

    @classmethod
    def from_image(cls, image: nib.spatialimages.SpatialImage) -> Geometry:
        """Take it from a nibabel image."""
        header = image.header
        unit = _unit(header) if isinstance(header, nib.Nifti1Header) else "mm"
        affine = np.array(image.affine, dtype=np.float64)
        affine[:3] *= MILLIMETRES.get(unit, 1.0)
        shape = (*image.shape, 1, 1)[:3]  # a 2D image is a single slice
        return cls(shape, affine, unit, _disagreement(image))

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
        return "".join(str(code) for code in nib.aff2axcodes(self.affine))

    def in_ras(self, per_axis: Sequence) -> list:
        """Reorder what is given for each stored axis into the order x, y, z of the network's grid."""
        order = np.argsort(nib.io_orientation(self.affine)[:, 0])
        return [per_axis[axis] for axis in order]


def _unit(header: nib.Nifti1Header) -> str:
    """Name the unit of length; a code that no standard knows says as little as "unknown"."""
    try:
        return header.get_xyzt_units()[0]
    except KeyError:
        return "unknown"


def _disagreement(image: nib.spatialimages.SpatialImage) -> str:
    """Say where a NIfTI header's sform, qform and voxel edges contradict each other."""
    header = image.header
    if not isinstance(header, nib.Nifti1Header) or not header["sform_code"]:
        return ""
    sform, edges = header.get_sform(), np.abs(header["pixdim"][1:4].astype(np.float64))
    sizes = voxel_sizes(sform)
    if not np.allclose(sizes, edges, rtol=SAME_FORM):
        return f"its sform has voxels of {_mm(sizes)}, its pixdim of {_mm(edges)}; the sform is taken"
    try:
        qform = header.get_qform() if header["qform_code"] else sform
    except (ValueError, nib.spatialimages.HeaderDataError):  # a quaternion that is none
        return ""
    if not np.allclose(qform[:3, :3], sform[:3, :3], atol=SAME_FORM * sizes.max()) or not np.allclose(
        qform[:3, 3], sform[:3, 3], atol=0.1 * sizes.min()
    ):
        one, other = (f"({', '.join(f'{x:.4g}' for x in form[:3, 3])})" for form in (sform, qform))
        return f"its sform puts the first voxel at {one} mm, its qform at {other} mm, or turned; the sform is taken"
    return ""


def _mm(lengths: Sequence[float]) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths) + " mm"


class StoredImage(NamedTuple):
    """Holds a file's voxels as stored; `voxels * slope + intercept` are its values."""

    path: str
    geometry: Geometry
    voxels: np.ndarray  # (X, Y, Z) or, with channels, (X, Y, Z, C)
    slope: float
    intercept: float

    @property
    def scaled(self) -> bool:
        """Whether values differ from what is stored."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @property
    def values(self) -> np.ndarray:
        """Voxels times slope plus intercept, as nibabel computes them."""
        return self.voxels * self.slope + self.intercept if self.scaled else self.voxels

    def channels(self) -> Iterator[StoredImage]:
        """Yield each channel as an image (X, Y, Z) of its own, sharing the memory."""
        for voxels in [self.voxels] if self.voxels.ndim == 3 else np.moveaxis(self.voxels, -1, 0):
            yield self._replace(voxels=voxels)


def three_axes(voxels: np.ndarray) -> np.ndarray:
    """Bring voxels into the form (X, Y, Z) or (X, Y, Z, C).

    Axes of one voxel behind the third go, as in ITK's vector form (X, Y, Z, 1, C); a 2D image becomes a single slice.
    """
    while voxels.ndim > 3 and (voxels.shape[-1] == 1 or (voxels.ndim > 4 and voxels.shape[3] == 1)):
        voxels = voxels[..., 0] if voxels.shape[-1] == 1 else voxels[:, :, :, 0]
    return voxels.reshape((*voxels.shape, 1, 1)[:3], order="F") if voxels.ndim < 3 else voxels


def on_one_grid(one: StoredImage, other: StoredImage) -> tuple[StoredImage, StoredImage]:
    """Lay two images (X, Y, Z) that are cropped or turned differently on the smallest grid that holds both.

    Axes and voxels' edges are those of `one`; voxels that an image lacks are 0. Nothing is interpolated, so that images
    whose voxels do not lie on each other still have affines that differ.
    """
    turn = nib.orientations.ornt_transform(*(nib.io_orientation(image.geometry.affine) for image in (other, one)))
    affine = other.geometry.affine @ nib.orientations.inv_ornt_aff(turn, other.voxels.shape)
    turned = other._replace(
        voxels=nib.orientations.apply_orientation(other.voxels, turn),
        geometry=replace(other.geometry, affine=affine),
    )
    start = np.rint(np.linalg.solve(one.geometry.affine, affine[:, 3]))[:3].astype(int)
    first = np.minimum(start, 0)
    shape = np.maximum(one.voxels.shape, start + turned.voxels.shape) - first
    return _padded(one, -first, shape), _padded(turned, start - first, shape)


def _padded(image: StoredImage, before: np.ndarray, shape: np.ndarray) -> StoredImage:
    require_memory(image.path, shape.tolist(), image.voxels.itemsize)
    voxels = np.zeros(shape, image.voxels.dtype)
    voxels[tuple(slice(low, low + n) for low, n in zip(before, image.voxels.shape, strict=True))] = image.voxels
    affine = image.geometry.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ before
    return image._replace(voxels=voxels, geometry=replace(image.geometry, shape=voxels.shape, affine=affine))


class Header(NamedTuple):
    """Says what a file's header alone tells: where its voxels lie, and how many channels they have."""

    geometry: Geometry
    channels: int


# ---- what the readers of all formats share


def from_lps(affine: np.ndarray) -> np.ndarray:
    """Turn an affine (4, 4) of ITK and DICOM, x to the left and y to the back, into this one's, or back again.

    It is rounded to float32, as NIfTI headers are, so that a scan lies at one place in whatever format it comes.
    """
    return (np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine).astype(np.float32).astype(np.float64)


def require_memory(path: str | Path, shape: Sequence[int], itemsize: int) -> None:
    """Raise UserError where a volume of that shape is larger than the memory that is free."""
    size = math.prod(shape) * itemsize
    if size > free_memory():
        raise UserError(
            f"{path} has {' x '.join(map(str, shape))} voxels, {size / 1e9:.3g} GB, and"
            f" {free_memory() / 1e9:.3g} GB of memory are free: crop it, or use a larger machine."
        )
