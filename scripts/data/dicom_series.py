"""DICOM files as series of slices: which belong together, in which order, and where they lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.errors import UserError
from ..utils.packages import require_package

ENDINGS = (".dcm", ".ima", ".dicom")  # of files that may lack DICOM's mark
NO_SCANS = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "DOC")  # modalities
ALIKE = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "BitsAllocated", "SamplesPerPixel")
TAGS = (
    *ALIKE, "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality",
    "ImageType", "NumberOfFrames", "ImagePositionPatient", "SliceThickness", "SpacingBetweenSlices",
    "PixelRepresentation", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
)  # fmt: skip
IN_IMAGES = ("SOPInstanceUID", "SeriesInstanceUID", "Rows", "BitsAllocated")  # of all objects the first two
EVEN = 0.1  # of the distance of two slices, by which one may lie off the line that all are on
PARALLEL = 1e-3  # by which the axes of slices may differ


class Series(NamedTuple):
    """Holds the slices of a series, files and headers, in the order in which they lie."""

    uid: str
    files: list[str]
    headers: list[Any]  # pydicom's, without pixels

    def __str__(self) -> str:
        said = f" ({self.headers[0].get('SeriesDescription')})" if self.headers[0].get("SeriesDescription") else ""
        return f"{self.uid}{said} of {self.slices} slices"

    @property
    def slices(self) -> int:
        """Slices, or frames of a file that has several."""
        return sum(int(header.get("NumberOfFrames") or 1) for header in self.headers)

    @property
    def is_multiframe(self) -> bool:
        """Whether a file has several slices."""
        return self.slices > len(self.files)

    @property
    def is_axial(self) -> bool:
        """Whether the slices lie nearer to the patient's axial plane than to the two others."""
        axes = self.headers[0].get("ImageOrientationPatient")
        return axes is not None and int(np.argmax(np.abs(np.cross(axes[:3], axes[3:])))) == 2


def is_dicom(path: str | Path) -> bool:
    """Tell a DICOM file by its mark, or by its ending."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM" or str(path).lower().endswith(ENDINGS)
    except OSError:
        return False


def dicom_files(folder: str | Path) -> list[str]:
    """List the DICOM files in a folder and below it, sorted: empty ones of their ending, too, hidden ones not."""
    found = [
        os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if not name.startswith(".")
    ]
    known = [path for path in found if is_dicom(path)]
    endings = {os.path.splitext(path)[1] for path in known}
    empty = (path for path in found if os.path.splitext(path)[1] in endings and not os.path.getsize(path))
    return sorted({*known, *empty})


def find_series(folder: str | Path) -> list[Series]:
    """Find the series of slices in a folder and those below it, the one first that `read` takes.

    That is the axial one with the most slices; where none is axial, the one with the most slices. Localizers, and what
    has no place in the patient, are none.

    Raises:
        UserError: a file is damaged.
    """
    groups: dict[str, dict[str, tuple[str, Any]]] = {}
    for file in dicom_files(folder):
        header = read_file(file, stop_before_pixels=True, specific_tags=list(TAGS))
        _require_whole(file, header)
        if _is_slice(header):
            series = groups.setdefault(str(header.SeriesInstanceUID), {})
            series.setdefault(str(header.SOPInstanceUID), (file, header))  # a file that was copied counts once
    found = [
        Series(uid, [file for file, _ in members.values()], [header for _, header in members.values()])
        for uid, members in groups.items()
    ]
    return sorted(found, key=lambda s: (not s.is_axial, -s.slices, int(s.headers[0].get("SeriesNumber") or 0), s.uid))


def _require_whole(file: str, header: Any) -> None:
    """Raise UserError for a header that ends before it says what every image says; pydicom takes it as it is."""
    kind = header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID")
    name = kind.name if kind else ""
    wanted = IN_IMAGES if "Image Storage" in name else () if "Directory" in name else IN_IMAGES[:2]
    if not name or not all(key in header for key in wanted):
        raise damaged(file, EOFError("its header ends too early"))


def _is_slice(header: Any) -> bool:
    localizer = "LOCALIZER" in (header.get("ImageType") or [])
    placed = "ImagePositionPatient" in header or int(header.get("NumberOfFrames") or 1) > 1
    return "Rows" in header and placed and not localizer and header.get("Modality") not in NO_SCANS


def find(path: str | Path) -> Series:
    """Find the series that a path stands for: of a folder, its first by `find_series`; of a file, the one it is of.

    Its slices are in the order in which they lie.

    Raises:
        UserError: there is none, a file is damaged, or the slices make no volume.
    """
    require_package("pydicom", path)
    try:
        if Path(path).is_dir():
            found = find_series(path)
        else:
            own = read_file(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]).get("SeriesInstanceUID")
            found = [series for series in find_series(Path(path).parent) if series.uid == str(own)]
        if not found:
            raise UserError(
                f"{path} has no DICOM series of slices that have a place in the patient; give another folder."
            )
        return _in_order(found[0])
    except UserError:
        raise
    except Exception as e:  # of headers that have other things where the standard has numbers
        raise UserError(f"{path} has DICOM files that make no volume ({e}); export the series again.") from e


def file_of(path: str | Path, uid: str) -> str:
    """Find a DICOM series by its UID in a folder, or beside a file: return a file that stands for it, see `find`.

    Raises:
        UserError: there is no such path or series, or it lies in several folders.
    """
    if not Path(path).exists():
        raise UserError(
            f"{path} does not exist, where the series {uid} is looked for; give its folder or a file of it."
        )
    found = find_series(path if Path(path).is_dir() else Path(path).parent)
    wanted = [series for series in found if series.uid == uid]
    if not wanted:
        there = ", ".join(map(str, found)) or "none"
        raise UserError(f"{path} has no series {uid}; there are: {there}. Give the UID of one of them.")
    folders = sorted({Path(file).parent for file in wanted[0].files})
    if len(folders) > 1:
        raise UserError(f"series {uid} lies in {', '.join(map(str, folders))}; move its files into one folder.")
    return wanted[0].files[0]


def read_file(path: str | Path, **options: Any) -> Any:
    """Read a file with pydicom, whatever it thinks of values that the standard does not allow."""
    pydicom = require_package("pydicom", path)
    try:
        with pydicom.config.disable_value_validation():
            return pydicom.dcmread(path, force=True, **options)
    except Exception as e:  # of damaged files of many kinds
        raise damaged(path, e) from e


def damaged(path: str | Path, error: Exception) -> UserError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    size = Path(path).stat().st_size
    return UserError(f"{path} ({size} bytes) is not a complete DICOM file ({said}); copy or export it again.")


# ---- where slices lie


def _in_order(series: Series) -> Series:
    """Sort the slices along their normal, and check that they make a volume."""
    first = series.headers[0]
    for file, header in zip(series.files, series.headers, strict=True):
        _require_alike(file, header, series.files[0], first)
    if len(series.files) == 1:
        return series
    if series.is_multiframe:
        raise UserError(f"{series.files[0]} and {len(series.files) - 1} more of its series have several frames each;"
                        " expected one file: give it alone.")  # fmt: skip
    axes = np.array(first.ImageOrientationPatient, np.float64)
    heights = _positions(series) @ np.cross(axes[:3], axes[3:])
    order = np.argsort(heights, kind="stable")
    ordered = Series(series.uid, [series.files[i] for i in order], [series.headers[i] for i in order])
    _require_even(ordered, heights[order])
    return ordered


def _positions(series: Series) -> np.ndarray:
    return np.array([header.ImagePositionPatient for header in series.headers], np.float64)


def _require_alike(file: str, header: Any, other_file: str, other: Any) -> None:
    """Raise UserError unless two slices are of one stack."""
    if header.get("ModalityLUTSequence") or int(header.get("SamplesPerPixel") or 1) > 1:
        what = "colours" if int(header.get("SamplesPerPixel") or 1) > 1 else "a table for its values"
        raise UserError(f"{file} has {what}; expected one number a voxel: convert the series to NIfTI or NRRD.")
    if int(header.get("NumberOfFrames") or 1) > 1:
        return
    for name in ALIKE:
        one, two = (np.array(h.get(name), dtype=np.float64) for h in (header, other))
        if np.isnan(one).any() or one.shape != two.shape or not np.allclose(one, two, rtol=PARALLEL, atol=PARALLEL):
            raise UserError(
                f"{file} has the {name} {header.get(name)}, {other_file} of the same series {other.get(name)};"
                " expected one stack of slices: move what is not of it out of the folder."
            )


def _require_even(series: Series, heights: np.ndarray) -> None:
    """Raise UserError where slices lie on each other, apart, or beside the line that the others are on."""
    gaps, files = np.diff(heights), series.files
    usual = float(np.median(gaps))
    if (same := np.flatnonzero(gaps <= EVEN * usual)).size:
        one, other = files[same[0]], files[same[0] + 1]
        raise UserError(
            f"{one} and {other} lie at one place, {len(same) + 1} slices of the series {series.uid} do so; expected one"
            " volume: give the files of one time, echo or reconstruction alone."
        )
    at = int(np.argmax(np.abs(gaps - usual)))
    positions = _positions(series)
    line = np.linspace(positions[0], positions[-1], len(positions))
    if abs(gaps[at] - usual) > EVEN * usual or np.abs(positions - line).max() > EVEN * usual:
        missing = round(gaps[at] / usual) - 1
        what = f"{missing} slices are missing there" if missing > 0 else "they are not evenly spaced"
        raise UserError(
            f"{files[at]} and {files[at + 1]} are {gaps[at]:.4g} mm apart, slices of the series {series.uid} usually"
            f" {usual:.4g} mm: {what}; export the whole series, or resample it evenly."
        )


def series_affine(series: Series) -> np.ndarray:
    """Return the affine (4, 4) of (column, row, slice) in DICOM's coordinates; a tilted gantry shears it."""
    first, positions = series.headers[0], _positions(series)
    row, column = np.array(first.ImageOrientationPatient, np.float64).reshape(2, 3)
    between_rows, between_columns = map(float, first.PixelSpacing)
    if len(positions) > 1:
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
    else:
        step = np.cross(row, column) * float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1)
    affine = np.eye(4)
    affine[:3] = np.stack([row * between_columns, column * between_rows, step, positions[0]], axis=1)
    if not np.isfinite(affine).all() or not np.linalg.det(affine):
        raise UserError(f"{series.files[0]} has the affine {affine.tolist()}; expected it to span a volume.")
    return affine
