"""NRRD and MetaImage files (.nrrd, .nhdr, .mha, .mhd), read by SimpleITK."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.packages import require_package
from .geometry import Geometry, Header, StoredImage, from_lps, require_memory, three_axes

DATA_FILE = re.compile(rb"^(?:ElementDataFile *=|data ?file:) *(.+?)[ \r]*(?:\n|\Z)", re.IGNORECASE | re.MULTILINE)
HEADER_END = re.compile(rb"\r?\n\r?\n")  # of NRRD
COMPRESSED = re.compile(rb"^(?:CompressedData *= *True|encoding: *gz)", re.IGNORECASE | re.MULTILINE)
NRRD = (".nrrd", ".nhdr")
HEADER_BYTES = 2**20  # in which a text header ends
LOCAL, LIST = re.compile("local", re.IGNORECASE), re.compile(r"list\b", re.IGNORECASE)


def read(path: str | Path) -> StoredImage:
    """Read a file to its end, which a checksum proves where it is compressed; channels are components or a fourth axis.

    Raises:
        UserError: a file is missing or damaged, larger than the memory, or its voxels are no real numbers.
    """
    itk, reader = open_reader(path)
    components, pixel = reader.GetNumberOfComponents(), itk.GetArrayFromImage(itk.Image([1, 1], reader.GetPixelID()))
    require_memory(path, [*reader.GetSize(), components], pixel.itemsize)
    _require_intact(path, math.prod(reader.GetSize()) * components * pixel.itemsize)
    voxels = itk.GetArrayFromImage(_attempt(path, reader.Execute))  # (.., z, y, x) or (.., z, y, x, components)
    voxels = np.moveaxis(voxels, -1, 0).T if components > 1 else voxels.T
    return StoredImage(str(path), _header(reader).geometry, three_axes(voxels), 1.0, 0.0)


def read_header(path: str | Path) -> Header:
    """Read the header alone."""
    return _header(open_reader(path)[1])


def parts(path: str | Path) -> list[str]:
    """List the files that an image is made of: of a detached header, itself and those that it names."""
    path = Path(path)
    if path.suffix.lower() not in (".nhdr", ".mhd") or not path.is_file():
        return [str(path)]
    text = _beginning(path)
    found = DATA_FILE.search(text)
    named = found[1].decode(errors="surrogateescape") if found else "local"
    if LOCAL.fullmatch(named):
        return [str(path)]
    if LIST.match(named) and found:
        lines = text[found.end() :].decode(errors="surrogateescape").split("\n")
        files = [path.parent / line.strip() for line in lines if line.strip()]
    elif "%" in named:  # a pattern and the range of its numbers
        files = sorted(path.parent.glob(re.sub(r"%\d*d", "[0-9]*", named.split()[0])))
    else:
        files = [path.parent / named]
    return [str(path), *map(str, files)]


def open_reader(path: str | Path) -> tuple[Any, Any]:
    """Return SimpleITK and a reader that has read the header.

    Raises:
        UserError: a file is missing or damaged, or its voxels are no real numbers.
    """
    itk = require_package("SimpleITK", path)
    for part in parts(path):
        if not Path(part).is_file():
            of = f", which {path} names," if part != str(path) else ""
            raise UserError(f"{part}{of} not found; add the file or remove its case.")
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if str(path).lower().endswith(NRRD) else "MetaImageIO")  # ITK: by .mha, not .MHA
    _attempt(path, reader.ReadImageInformation)
    if "complex" in (kind := itk.GetPixelIDValueAsString(reader.GetPixelID())):
        raise UserError(f"{path} has complex voxels; expected real numbers: store magnitude or phase.")
    if reader.GetDimension() not in (2, 3, 4) or kind == "unknown" or min(reader.GetSize()) < 1:
        raise UserError(f"{path} has {reader.GetSize()} voxels, {kind}; expected 3 axes, or 4 with the channels last.")
    return itk, reader


def _attempt(path: str | Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError as e:  # ITK's only kind
        said = re.sub(r"\s+", " ", str(e).rpartition("ERROR:")[2]).strip()
        raise UserError(
            f"{path} ({Path(path).stat().st_size} bytes) is not a complete image file ({said[-200:]}); copy or export"
            " it again."
        ) from e


def _header(reader: Any) -> Header:
    axes, size = min(reader.GetDimension(), 3), reader.GetSize()
    affine, direction = np.eye(4), np.reshape(reader.GetDirection(), (reader.GetDimension(),) * 2)
    affine[:axes, :axes] = direction[:axes, :axes] * reader.GetSpacing()[:axes]
    affine[:axes, 3] = reader.GetOrigin()[:axes]
    channels = reader.GetNumberOfComponents() * math.prod(size[3:])
    return Header(Geometry((*size, 1)[:3], from_lps(affine)), channels)


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(HEADER_BYTES)


def _require_intact(path: str | Path, size: int) -> None:
    """Compare compressed voxels with their checksum: ITK takes what it could inflate, and leaves the rest as it is.

    Raises:
        UserError: they are damaged, or other than `size` bytes.
    """
    text = _beginning(Path(path))
    end = DATA_FILE.search(text) or HEADER_END.search(text)
    header = text[: end.end() if end else None]
    if not COMPRESSED.search(header):
        return
    _, *files = parts(path)
    found = 0
    for file in files or [str(path)]:
        inflated = zlib.decompressobj(wbits=47)  # of zlib or gzip
        try:
            with open(file, "rb") as stream:
                stream.seek(0 if files else len(header))
                while (block := stream.read(2**20)) and not inflated.eof:
                    found += len(inflated.decompress(block))
            if not inflated.eof:
                raise EOFError("it ends too early")
        except (zlib.error, EOFError) as e:
            raise UserError(f"{file} is damaged ({e}); copy or export it again.") from e
    if found != size:
        raise UserError(f"{path} has {found} bytes of voxels; expected {size}: copy or export it again.")
