"""Masks as DICOM segmentations of the series that they are from, written and read by highdicom."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data import dicom
from ..data.dicom_series import find
from ..data.geometry import Geometry, StoredImage, from_lps
from ..data.visualization import label_colour
from ..utils.errors import UserError
from ..utils.packages import require_package
from .environment import bundle

SIDES = {"left": "Left", "right": "Right"}
LESIONS = {"tumor": "Neoplasm", "tumour": "Neoplasm", "cancer": "Neoplasm", "lesion": "Lesion", "cyst": "Cyst"}
PLURAL = {"vertebrae": "vertebra", "lungs": "lung", "kidneys": "kidney", "ventricles": "ventricle"}
GROUPS = {"cid7192": "AnatomicalStructure", "cid7159": "MorphologicallyAbnormalStructure"}  # and their category
WORD, CAPITALIZED = re.compile(r"[a-z0-9]+"), re.compile(r"[A-Z][a-z0-9]*")
NAMED = (  # what a segmentation repeats of its slices, if only as unknown
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
UNICODE = "ISO_IR 192"
SERIES_NUMBER = 300  # behind those of scanners
MODEL = "MedNeXt"  # as the maker of a segmentation


def write(path: Path, mask: np.ndarray, scan: str, names: Mapping[int, str]) -> None:
    """Write a mask as a segmentation on the frames of its series, without those that are empty.

    Args:
        path: of the file.
        mask: (X, Y, Z) label values on the series' grid.
        scan: folder or a file of the series.
        names: of the label values.

    Raises:
        UserError: `scan` is no DICOM series, or a package is missing.
    """
    highdicom = require_package("highdicom", scan)
    pydicom = require_package("pydicom", scan)
    series = find(scan)
    with pydicom.config.disable_value_validation():
        sources = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in series.files]
        for source in sources:
            _complete(source, series.uid)
        values = dict(
            sorted({**names, **{int(v): f"label {v}" for v in np.unique(mask) if v and v not in names}}.items())
        )
        numbers = np.zeros(max(values) + 1, np.uint8 if len(values) < 256 else np.uint16)
        numbers[list(values)] = np.arange(1, len(values) + 1)
        pixels = np.ascontiguousarray(numbers[mask].transpose(2, 1, 0))
        made = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=dicom.multiframe(series)[1].with_array(pixels) if series.is_multiframe else pixels,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _segment(number, value, name) for number, (value, name) in enumerate(values.items(), 1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="MedNeXt MONAI bundle",
            manufacturer_model_name=MODEL,
            software_versions=bundle()["version"],
            device_serial_number="0",
            content_label="SEGMENTATION",
            series_description="MedNeXt segmentation",
        )
        made.save_as(path)


def read(path: str | Path, scan: str) -> StoredImage:
    """Read a segmentation onto the grid of its series: the values are those that `write` was given.

    Raises:
        UserError: it is damaged, no segmentation, or of other slices.
    """
    series, header = find(scan), dicom.read_header(scan)
    with _segmentation(path, f"segmentation of {scan}") as found:
        if (of := str(found.ReferencedSeriesSequence[0].SeriesInstanceUID)) != series.uid:
            raise ValueError(f"it is of the series {of}")
        uids = [str(image.SOPInstanceUID) for image in series.headers]
        options: dict[str, Any] = {"combine_segments": True, "ignore_spatial_locations": True}
        options |= {"assert_missing_frames_are_empty": True}
        if series.is_multiframe:
            planes = found.get_pixels_by_source_frame(uids[0], dicom.frame_numbers(series), **options)
        else:
            planes = found.get_pixels_by_source_instance(uids, **options)
        return StoredImage(str(path), header.geometry, _values(found)[planes.transpose(2, 1, 0)], 1.0, 0.0)


def read_alone(path: str | Path) -> StoredImage:
    """Read a segmentation that anything made without its series: on a grid of the slices from its first to its last.

    Values are label values where this bundle wrote it, else the numbers of the segments.

    Raises:
        UserError: it is damaged, no segmentation, its slices are no volume, or its segments overlap.
    """
    with _segmentation(path, "segmentation on a stack of even slices") as found:
        volume = found.get_volume(combine_segments=True)
        voxels = _values(found)[volume.array.transpose(2, 1, 0)]
        return StoredImage(
            str(path), Geometry(voxels.shape, from_lps(volume.affine[:, [2, 1, 0, 3]])), voxels, 1.0, 0.0
        )


@contextmanager
def _segmentation(path: str | Path, what: str) -> Iterator[Any]:
    """Open a segmentation with highdicom; whatever is wrong with it is a UserError."""
    highdicom, pydicom = require_package("highdicom", path), require_package("pydicom", path)
    try:
        with pydicom.config.disable_value_validation():
            yield highdicom.seg.segread(path)
    except Exception as e:  # of damaged files of many kinds
        raise UserError(f"{path} is no {what} ({e}); make it again.") from e


def _values(found: Any) -> np.ndarray:
    """Return the label value of each segment by its number, 0 of none: as its tracking ID says where this wrote it."""
    numbers = list(found.segment_numbers)
    said = numbers
    if found.get("ManufacturerModelName") == MODEL:
        said = [int(found.get_segment_description(n).tracking_id.rpartition(" ")[2]) for n in numbers]
    values = np.zeros(max(numbers) + 1, np.uint8 if max(said) < 256 else np.int16)
    values[numbers] = said
    return values


def _complete(source: Any, series: str) -> None:
    """Put into a header what a segmentation repeats of it, where it was taken out, and make its texts Unicode."""
    generate_uid = require_package("pydicom.uid", series).generate_uid
    for name in NAMED:
        if name not in source:
            setattr(source, name, None)
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if not source.get(name):
            setattr(source, name, generate_uid(entropy_srcs=[name, series]))  # one for all slices, and for all runs
    source.decode()
    source.SpecificCharacterSet = UNICODE


def _text(name: str) -> str:
    """Make a name one that DICOM allows: a line of less than 64 characters without its separator."""
    return " ".join(name.replace("\\", "/").split())[:62] or "?"


def _segment(number: int, value: int, name: str) -> Any:
    """Describe a segment: its name, its codes and colour, and its label value as the end of its tracking ID."""
    highdicom = require_package("highdicom", name)
    codes = require_package("pydicom.sr.codedict", name).codes
    category, kind, side = property_codes(name)
    made = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=_text(name),
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=MODEL, version=bundle()["version"], family=codes.cid7162.ArtificialIntelligence
        ),
        tracking_uid=highdicom.UID(),
        tracking_id=f"{_text(name)[:48]} {value}",
        display_color=highdicom.color.CIELabColor.from_rgb(*map(int, label_colour(value))),
    )
    if side is not None:
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            highdicom.sr.CodedConcept.from_code(side)
        ]
    return made


def property_codes(name: str) -> tuple[Any, Any, Any]:
    """Look a label's name up among DICOM's own codes of anatomy and of lesions.

    Returns:
        Category, type, and side or None; "Tissue" where the name is none of the standard's.
    """
    codes = require_package("pydicom.sr.codedict", name).codes
    words = [PLURAL.get(word, word) for word in WORD.findall(name.lower())]
    rest = [word for word in words if word not in SIDES]
    side = next((SIDES[word] for word in words if word in SIDES), None)
    for group, category in GROUPS.items():
        known = _known(group)
        for wanted, of_side in ((words, None), (rest, side)):
            if found := known.get(frozenset(wanted), known.get("".join(wanted))):
                return getattr(codes.cid7150, category), found, of_side and getattr(codes.cid247, of_side)
    if lesion := next((LESIONS[word] for word in words if word in LESIONS), None):
        return codes.cid7150.MorphologicallyAbnormalStructure, getattr(codes.cid7159, lesion), None
    return codes.cid7150.Tissue, codes.cid7166.Tissue, None


@functools.cache
def _known(group: str) -> dict[object, Any]:
    """List the codes of a group by the set of the words of their names, and by their names in one word."""
    found: dict[object, Any] = {}
    codes = getattr(require_package("pydicom.sr.codedict", group).codes, group)
    for keyword in sorted(codes.dir(), reverse=True):  # of two with the same words, the first
        words = [word.lower() for word in CAPITALIZED.findall(keyword)]
        found |= dict.fromkeys((frozenset(words) - {"of", "the"}, "".join(words)), getattr(codes, keyword))
    return found
