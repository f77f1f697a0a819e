"""Pictures (.png, .bmp, .tif, .tiff) for 2D networks, read by Pillow: one slice of pixels of 1 mm."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from ..utils.errors import UserError
from .geometry import Geometry, Header, StoredImage, require_memory

MODES = {"1": 1, "L": 1, "P": 1, "I": 1, "I;16": 1, "I;16B": 1, "F": 1, "RGB": 3}  # channels; P's are its numbers


def read(path: str | Path) -> StoredImage:
    """Read a picture to its end: columns are x, rows are y, the colours are channels.

    Raises:
        UserError: the file is missing or damaged, holds several pages, or is neither grey nor of three colours.
    """
    header = read_header(path)
    require_memory(path, header.geometry.shape, 8 * header.channels)
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of PNG
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError) as e:
        raise _damaged(path, e) from e
    voxels = np.swapaxes(pixels.astype(np.uint8) if pixels.dtype == bool else pixels, 0, 1)
    return StoredImage(str(path), header.geometry, voxels[:, :, None], 1.0, 0.0)


def read_header(path: str | Path) -> Header:
    """Read the size and the kind of pixels alone."""
    if not Path(path).is_file():
        raise UserError(f"{path} not found; add the file or remove its case.")
    try:
        with Image.open(path) as image:
            size, mode, pages = image.size, image.mode, getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise _damaged(path, e) from e
    if pages > 1:
        raise UserError(f"{path} has {pages} pages; expected one: save each as a picture, or all as a NIfTI file.")
    if mode not in MODES or not math.prod(size):
        raise UserError(f"{path} is a picture of the mode {mode}; expected one of {', '.join(MODES)}: save it as grey.")
    return Header(Geometry((*size, 1), np.eye(4)), MODES[mode])


def _damaged(path: str | Path, error: Exception) -> UserError:
    size = Path(path).stat().st_size
    return UserError(f"{path} ({size} bytes) is not a complete picture ({error}); copy or export it again.")
