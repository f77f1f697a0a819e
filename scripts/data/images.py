"""One reader for the images on disk, whatever their format: a table of endings, and of what reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import dicom, itk, nifti, pictures
from .dicom_series import dicom_files, is_dicom
from .geometry import Header, StoredImage


class Format(NamedTuple):
    """Says what reads a format, and in which one the masks of such scans are written."""

    endings: tuple[str, ...]
    read: Callable[[str | Path], StoredImage]
    read_header: Callable[[str | Path], Header]
    parts: Callable[[str | Path], list[str]]
    mask: str  # of MASK_ENDINGS


def _itself(path: str | Path) -> list[str]:
    return [str(path)]


NIFTI = Format((".nii.gz", ".nii"), nifti.read, nifti.read_header, _itself, "nii.gz")
NRRD = Format((".nrrd", ".nhdr"), itk.read, itk.read_header, itk.parts, "nrrd")
META = Format((".mha", ".mhd"), itk.read, itk.read_header, itk.parts, "mha")
PICTURE = Format((".png", ".bmp", ".tif", ".tiff"), pictures.read, pictures.read_header, _itself, "png")
DICOM = Format((), dicom.read, dicom.read_header, dicom.parts, "dicom_seg")  # known by what is inside
ENDINGS = (*NIFTI.endings, *NRRD.endings, *META.endings)  # of volumes
MASK_ENDINGS = {"nii.gz": ".nii.gz", "nrrd": ".seg.nrrd", "mha": ".mha", "png": ".png", "dicom_seg": ".dcm"}


def format_of(path: str | Path) -> Format:
    """Tell the format of a file by its ending, and of a folder or a file without one of these by what is inside."""
    name = Path(path).name.lower()
    for kind in (NIFTI, NRRD, META, PICTURE):
        if name.endswith(kind.endings):
            return kind
    return DICOM if os.path.isdir(path) or is_dicom(path) else NIFTI


def read_image(path: str | Path) -> StoredImage:
    """Read an image to its end, with its checksum where the format has one.

    Args:
        path: a file, or of DICOM a folder or one file of a series.

    Raises:
        UserError: the file is missing, damaged, larger than the memory, of a kind that is no scan, or has no grid.
    """
    return format_of(path).read(path)


def read_header(path: str | Path) -> Header:
    """Read the header alone, and check it as `read_image` does."""
    return format_of(path).read_header(path)


def is_image(path: str | Path) -> bool:
    """Tell whether there is a file, or a folder with DICOM files."""
    return os.path.isfile(path) or (os.path.isdir(path) and bool(dicom_files(path)))


def parts(path: str | Path) -> list[str]:
    """List the files that an image is made of, whether they are there or not."""
    return format_of(path).parts(path)


def first_channel(path: str | Path) -> StoredImage:
    """Read an image (X, Y, Z), of several channels the first: what pictures show."""
    return next(read_image(path).channels())
