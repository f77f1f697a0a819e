"""One reader for the image files on disk: where their voxels lie, and what they hold as stored."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.fileholders import FileHolder

from ..utils.device import free_memory
from ..utils.errors import UserError

ENDINGS = (".nii.gz", ".nii")
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "micron": 1e-3, "meter": 1e3}  # of a header's unit of length
SAME_FORM = 1e-3  # by which the forms of a header may differ: what float32 and quaternions leave

logger = logging.getLogger("mednext")


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


def read_image(path: str | Path) -> StoredImage:
    """Read a file to its end, which a gzip checksum proves.

    Axes of one voxel behind the third are dropped; ITK's vector form (X, Y, Z, 1, C) has its channels last.

    Raises:
        UserError: the file is missing, damaged, larger than the memory, of a kind that is no scan, or has no grid.
    """
    image = open_image(path)
    proxy = image.dataobj
    assert isinstance(proxy, ArrayProxy)  # of every file that nibabel opens
    voxels = _voxels(path, proxy)
    return StoredImage(str(path), Geometry.from_image(image), voxels, float(proxy.slope), float(proxy.inter))


def open_image(path: str | Path) -> nib.Nifti1Image:
    """Read a file's header alone, and check it.

    Raises:
        UserError: the file is missing or no NIfTI file, or its header cannot be that of a scan.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} not found; add the file or remove its case.")
    try:
        image = _load(path)
    except Exception as e:  # nibabel raises header, type, size and value errors of many kinds for damaged headers
        raise _incomplete(path, e) from e
    if not isinstance(image, nib.Nifti1Image):
        raise UserError(f"{path} is a {type(image).__name__}; expected a NIfTI file: convert it.")
    kind, shape = np.dtype(image.get_data_dtype()), image.shape
    if kind.names:
        raise UserError(f"{path} has colours ({', '.join(kind.names)}); expected one number a voxel: make it grey.")
    if kind.kind == "c":
        raise UserError(f"{path} has complex voxels; expected real numbers: store magnitude or phase.")
    if not shape or min(shape) < 1:
        raise UserError(f"{path} has the shape {shape}; expected at least one voxel along each axis: export it again.")
    _require_spacing(path, image)
    return image


def _load(path: str | Path) -> nib.filebasedimages.FileBasedImage:
    """Load as nibabel does, from the very file that is named: where it ends with .Nii, nibabel looks for .nii."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        if Path(path).stat().st_size and kind.path_maybe_image(path)[0]:
            file = FileHolder(filename=str(path))
            return kind.from_file_map({"image": file, "header": file})
    return nib.load(path)


def _incomplete(path: str | Path, error: Exception) -> UserError:
    size = Path(path).stat().st_size
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} ({size} bytes) is not a complete NIfTI file ({said}); copy or export it again.")


@contextmanager
def _uncompressed(path: str | Path) -> Iterator[IO[bytes]]:
    with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as stream:
        yield stream  # type: ignore[misc] # GzipFile is not declared as one


def _voxels(path: str | Path, proxy: ArrayProxy) -> np.ndarray:
    """Read the stored voxels, and what is left of the file behind them, so that its checksum is compared."""
    size = math.prod(proxy.shape) * proxy.dtype.itemsize
    if size > free_memory():
        raise UserError(
            f"{path} has {' x '.join(map(str, proxy.shape))} voxels, {size / 1e9:.3g} GB, and"
            f" {free_memory() / 1e9:.3g} GB of memory are free: crop it, or use a larger machine."
        )
    try:
        with _uncompressed(path) as stream:
            stream.seek(int(proxy.offset))
            content = stream.read(size)
            while stream.read(2**20):
                pass
        if len(content) < size:
            raise EOFError(f"{len(content)} of {size} bytes of voxels are there")
        voxels = np.frombuffer(content, proxy.dtype).reshape(proxy.shape, order="F")
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError) as e:
        raise _incomplete(path, e) from e
    return three_axes(voxels)


def three_axes(voxels: np.ndarray) -> np.ndarray:
    """Bring voxels into the form (X, Y, Z) or (X, Y, Z, C).

    Axes of one voxel behind the third go, as in ITK's vector form (X, Y, Z, 1, C); a 2D image becomes a single slice.
    """
    while voxels.ndim > 3 and (voxels.shape[-1] == 1 or (voxels.ndim > 4 and voxels.shape[3] == 1)):
        voxels = voxels[..., 0] if voxels.shape[-1] == 1 else voxels[:, :, :, 0]
    return voxels.reshape((*voxels.shape, 1, 1)[:3], order="F") if voxels.ndim < 3 else voxels


def first_channel(image: nib.Nifti1Image) -> np.ndarray:
    """Read the values (X, Y, Z) of a file as float32, of several channels the first: what pictures show."""
    voxels = three_axes(np.asanyarray(image.dataobj, dtype=np.float32))
    return voxels[..., 0] if voxels.ndim == 4 else voxels


def _require_spacing(path: str | Path, image: nib.Nifti1Image) -> None:
    """Raise UserError unless the stored voxel spacing and the affine span a volume.

    nibabel silently reads a spacing of 0 as 1 mm, so the header is read again without its repairs.
    """
    with _uncompressed(path) as stream:
        header = type(image.header).from_fileobj(stream, check=False)
    spacing = header["pixdim"][1 : 1 + min(len(image.shape), 3)]
    affine = image.affine[:3, :3]
    spans = np.isfinite(affine).all() and np.isfinite(image.affine).all() and np.linalg.det(affine)
    if not (np.isfinite(spacing).all() and spacing.all() and spans):
        found = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(f"{path} has a voxel spacing of {found} mm; expected it positive: repair the header.")
