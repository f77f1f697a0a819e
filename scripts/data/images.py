"""Reading NIfTI files so that a damaged one is an error with a name and not a guess."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener

from ..utils.errors import UserError


def read(path: str | Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """A file's header and its voxels as stored (before slope and intercept).

    Raises:
        UserError: the file is missing, cannot be read to its end, or has no grid.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} not found; add the file or remove its case.")
    try:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj.get_unscaled())
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as e:
        size = Path(path).stat().st_size
        raise UserError(f"{path} ({size} bytes) is not a complete NIfTI file ({e}); copy or export it again.") from e
    check_spacing(path, image)
    return image, voxels


def check_spacing(path: str | Path, image: nib.Nifti1Image) -> None:
    """Raises UserError unless the stored voxel spacing and the affine span a volume.

    nibabel silently reads a spacing of 0 as 1 mm, so the header is read again without its repairs.
    """
    with ImageOpener(path) as file:
        header = type(image.header).from_fileobj(file, check=False)
    spacing = header["pixdim"][1:4]
    affine = image.affine[:3, :3]
    if not (np.isfinite(spacing).all() and spacing.all() and np.isfinite(affine).all() and np.linalg.det(affine)):
        found = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(f"{path} has a voxel spacing of {found} mm; expected it positive: repair the header.")
