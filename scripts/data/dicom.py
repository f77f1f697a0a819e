"""DICOM series as volumes: their values, where they lie, and the files that they are made of.

pydicom reads the headers and the pixels, SimpleITK the pixels of compressions that pydicom has no decoder for, and
highdicom files with several frames.
"""

from __future__ import annotations

import locale
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.packages import require_package
from .dicom_series import Series, damaged, dicom_files, find, read_file, series_affine
from .geometry import Geometry, Header, StoredImage, from_lps, require_memory

SCALE = {"RescaleSlope": 1, "RescaleIntercept": 0}  # and what they are where they are not said, or 0


def read(path: str | Path) -> StoredImage:
    """Read a series: every slice's own scale is applied, a common one is kept beside the voxels.

    Args:
        path: a folder of files, or one file of a series.

    Raises:
        UserError: there is no series, a file is damaged or has colours, or the slices make no volume.
    """
    series = find(path)
    if series.is_multiframe:
        voxels, affine = _frames(series)
        return StoredImage(str(path), Geometry(voxels.shape, from_lps(affine)), voxels, 1.0, 0.0)
    geometry = _header(series).geometry
    scales = [_scale(*slice_) for slice_ in zip(series.files, series.headers, strict=True)]
    scale = scales[0] if len(set(scales)) == 1 else None
    stored = np.result_type(*(_kind(header) for header in series.headers))
    kind = stored if scale else np.dtype(np.float32)
    require_memory(path, geometry.shape, kind.itemsize)
    voxels = np.empty(geometry.shape, kind, order="F")
    for place, file, (slope, intercept) in zip(voxels.transpose(2, 1, 0), series.files, scales, strict=True):
        pixels = _pixels(file, place.shape, stored)
        place[:] = pixels if scale else pixels * slope + intercept
    return StoredImage(str(path), geometry, voxels, *(scale or (1.0, 0.0)))


def read_header(path: str | Path) -> Header:
    """Read the headers of all slices alone."""
    return _header(find(path))


def parts(path: str | Path) -> list[str]:
    """List the files of a series, and of one that cannot be read all that may be of it."""
    try:
        return find(path).files
    except UserError:
        return dicom_files(path) if Path(path).is_dir() else [str(path)]


def _header(series: Series) -> Header:
    first = series.headers[0]
    if series.is_multiframe:
        _, geometry = multiframe(series)
        affine, shape = geometry.affine[:, [2, 1, 0, 3]], geometry.spatial_shape[::-1]
    else:
        affine, shape = series_affine(series), (int(first.Columns), int(first.Rows), len(series.files))
    return Header(Geometry(tuple(shape), from_lps(affine)), 1)


def _kind(header: Any) -> np.dtype:
    return np.dtype(f"{'i' if header.get('PixelRepresentation') else 'u'}{int(header.BitsAllocated) // 8}")


def _scale(file: str, header: Any) -> tuple[float, float]:
    """Return slope and intercept, 1 and 0 where nothing is said."""
    try:
        slope, intercept = (float(header.get(name) or other) for name, other in SCALE.items())
    except (ValueError, TypeError) as e:
        raise damaged(file, e) from e
    if not np.isfinite([slope, intercept]).all():
        raise UserError(
            f"{file} has the slope {slope} and the intercept {intercept}; expected numbers: export it again."
        )
    return slope, intercept


def _pixels(file: str, shape: Sequence[int], kind: np.dtype) -> np.ndarray:
    """Read the stored pixels (rows, columns) of a file, whose type fits into `kind`.

    Raises:
        UserError: they are not all there, or nothing here can decode them.
    """
    pixels = require_package("pydicom.pixels", file)
    header = read_file(file)
    try:
        if "TransferSyntaxUID" not in header.file_meta:  # of a file without DICOM's mark
            uid = require_package("pydicom.uid", file)
            implicit, _ = header.original_encoding
            header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        syntax = header.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not pixels.get_decoder(syntax).is_available:
            found = _by_itk(file, header)
        else:
            found = pixels.pixel_array(header)
        if found.shape != tuple(shape) or not np.can_cast(found.dtype, kind):
            raise ValueError(f"{found.shape} pixels of {found.dtype}, expected {tuple(shape)} of {kind}")
    except UserError:
        raise
    except Exception as e:  # of damaged files and unknown compressions of many kinds
        raise damaged(file, e) from e
    return found


def _by_itk(file: str, header: Any) -> np.ndarray:
    """Let ITK's GDCM decode a file, and take its scale back."""
    itk, before = require_package("SimpleITK", file), locale.setlocale(locale.LC_ALL)
    try:
        values = itk.GetArrayFromImage(itk.ReadImage(file)).reshape(int(header.Rows), int(header.Columns))
    finally:
        locale.setlocale(locale.LC_ALL, before)  # GDCM sets the environment's, by which Python would read texts then
    slope, intercept = _scale(file, header)
    return np.rint((values.astype(np.float64) - intercept) / slope).astype(_kind(header))


# ---- several frames in a file


def multiframe(series: Series) -> tuple[Any, Any]:
    """Open a file of several frames, and say where they lie: highdicom's image, and its geometry (slice, row, column).

    Raises:
        UserError: they are no volume.
    """
    file = series.files[0]
    image = require_package("highdicom", file).imread(file, lazy_frame_retrieval=True)
    geometry = image.get_volume_geometry()
    if geometry is None:
        raise UserError(f"{file} has frames that are no stack of even slices; convert the one that is meant to NIfTI.")
    return image, geometry if np.linalg.det(geometry.affine[:3, [2, 1, 0]]) > 0 else geometry.flip_spatial(0)


def frame_numbers(series: Series) -> list[int]:
    """List the numbers of the frames, from 1, in the order in which they lie."""
    image, geometry = multiframe(series)
    groups = image.PerFrameFunctionalGroupsSequence
    positions = np.array([group.PlanePositionSequence[0].ImagePositionPatient for group in groups], np.float64)
    return (np.argsort(positions @ geometry.affine[:3, 0], kind="stable") + 1).tolist()


def _frames(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Read voxels (X, Y, Z) and their affine in DICOM's coordinates."""
    image, geometry = multiframe(series)
    require_memory(series.files[0], geometry.spatial_shape, 4)
    try:
        volume = image.get_volume(dtype=np.float32, apply_real_world_transform=False)
    except Exception as e:
        raise damaged(series.files[0], e) from e
    voxels = volume.array if np.allclose(volume.affine, geometry.affine) else volume.array[::-1]
    return voxels.transpose(2, 1, 0), geometry.affine[:, [2, 1, 0, 3]]
