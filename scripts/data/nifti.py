"""NIfTI files, read by nibabel to their end, which a gzip checksum proves."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.fileholders import FileHolder

from ..utils.errors import UserError
from .geometry import Geometry, Header, StoredImage, require_memory, three_axes

ENDINGS = (".nii", ".nii.gz")
START = 1024  # bytes, with the header of either version


def read(path: str | Path) -> StoredImage:
    """Read a file to its end, which a gzip checksum proves.

    Axes of one voxel behind the third are dropped; ITK's vector form (X, Y, Z, 1, C) has its channels last.

    Raises:
        UserError: the file is missing, damaged, larger than the memory, of a kind that is no scan, or has no grid.
    """
    with _opened(path) as (image, stream):
        proxy = image.dataobj
        assert isinstance(proxy, ArrayProxy)  # of every file that nibabel opens
        voxels = _voxels(path, proxy, stream)
    return StoredImage(str(path), Geometry.from_image(image), voxels, float(proxy.slope), float(proxy.inter))


def read_header(path: str | Path) -> Header:
    """Read the header alone."""
    image = open_image(path)
    return Header(Geometry.from_image(image), math.prod(image.shape[3:]))


def open_image(path: str | Path) -> nib.Nifti1Image:
    """Read a file's header alone, and check it.

    Raises:
        UserError: the file is missing or no NIfTI file, or its header cannot be that of a scan.
    """
    with _opened(path) as (image, _):
        return image


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[nib.Nifti1Image, IO[bytes]]]:
    """Open a file once, for its header, which is checked, and for what follows; see `open_image`."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found; add the file or remove its case.")
    with ExitStack() as stack:
        try:
            opened = gzip.open if str(path).lower().endswith(".gz") else open
            stream: Any = stack.enter_context(opened(path, "rb"))
            start = stream.read(START)
            image = _load(path, stream, start)
        except Exception as e:  # nibabel raises header, type, size and value errors of many kinds for damaged headers
            raise _incomplete(path, e) from e
        yield _checked(path, image, start), stream


def _checked(path: str | Path, image: nib.filebasedimages.FileBasedImage, start: bytes) -> nib.Nifti1Image:
    if not isinstance(image, nib.Nifti1Image):
        raise UserError(f"{path} is a {type(image).__name__}; expected a NIfTI file: convert it.")
    kind, shape = np.dtype(image.get_data_dtype()), image.shape
    if kind.names:
        raise UserError(f"{path} has colours ({', '.join(kind.names)}); expected one number a voxel: make it grey.")
    if kind.kind == "c":
        raise UserError(f"{path} has complex voxels; expected real numbers: store magnitude or phase.")
    if not shape or min(shape) < 1:
        raise UserError(f"{path} has the shape {shape}; expected at least one voxel along each axis: export it again.")
    _require_spacing(path, image, start)
    return image


def new_image(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Make an image of voxels that were no NIfTI file: its affine is in both forms, in millimetres."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(image.affine, code="aligned")
    return image


def _load(path: str | Path, stream: Any, start: bytes) -> nib.filebasedimages.FileBasedImage:
    """Load as nibabel does, from the very file that is named: where it ends with .Nii, nibabel looks for .nii."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        if str(path).lower().endswith(ENDINGS) and kind.header_class.may_contain_header(start):
            file = FileHolder(filename=str(path), fileobj=stream)
            return kind.from_file_map({"image": file, "header": file})
    return nib.load(path)


def _incomplete(path: str | Path, error: Exception) -> UserError:
    size = Path(path).stat().st_size
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} ({size} bytes) is not a complete NIfTI file ({said}); copy or export it again.")


def _voxels(path: str | Path, proxy: ArrayProxy, stream: IO[bytes]) -> np.ndarray:
    """Read the stored voxels, and what is left of the file behind them, so that its checksum is compared."""
    size = math.prod(proxy.shape) * proxy.dtype.itemsize
    require_memory(path, proxy.shape, proxy.dtype.itemsize)
    try:
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


def _require_spacing(path: str | Path, image: nib.Nifti1Image, start: bytes) -> None:
    """Raise UserError unless the stored voxel spacing and the affine span a volume.

    nibabel silently reads a spacing of 0 as 1 mm, so the header is taken from the file's start without its repairs.
    """
    kind = type(image.header)
    header = kind(start[: kind.template_dtype.itemsize], check=False)
    spacing = header["pixdim"][1 : 1 + min(len(image.shape), 3)]
    affine = image.affine[:3, :3]
    spans = np.isfinite(affine).all() and np.isfinite(image.affine).all() and np.linalg.det(affine)
    if not (np.isfinite(spacing).all() and spacing.all() and spans):
        found = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(f"{path} has a voxel spacing of {found} mm; expected it positive: repair the header.")
