"""DICOM made of known volumes, with the traits of scanners, archives and exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
STUDY, FRAME = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=["frame"])


def header(series: str, number: int, modality: str = "CT", syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    """Make a file with what every slice has."""
    kind = CTImageStorage if modality == "CT" else MRImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = kind, syntax
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = "Doe^Jane", "1", "19700101", "F"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = STUDY, series, FRAME
    made.StudyDate, made.StudyTime, made.StudyID, made.AccessionNumber = "20260101", "120000", "1", "1"
    made.Modality, made.Manufacturer, made.SeriesNumber, made.InstanceNumber = modality, "Maker", 3, number + 1
    made.ReferringPhysicianName, made.PositionReferenceIndicator, made.PatientPosition = "", "", "HFS"
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    return made


def put_pixels(made: FileDataset, stored: np.ndarray) -> None:
    """Put pixels (rows, columns) into a file."""
    made.Rows, made.Columns = stored.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 8 * stored.dtype.itemsize
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(stored.dtype.kind == "i")
    made.PixelData = np.ascontiguousarray(stored).tobytes()


def slices(voxels: np.ndarray, affine: np.ndarray, series: str = "", scales=None, **options) -> list[FileDataset]:
    """Make a file of each slice of stored voxels (X, Y, Z) that lie by an affine in RAS+ mm.

    Args:
        voxels: stored values.
        affine: 4 x 4.
        series: its UID.
        scales: slope and intercept of each slice, or None for (1, 0).
        options: of `header`.
    """
    series = series or generate_uid(entropy_srcs=["series"])
    lps = LPS @ affine
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    found = []
    for k in range(voxels.shape[2]):
        made = header(series, k, **options)
        put_pixels(made, voxels[:, :, k].T)
        made.ImagePositionPatient = [text(x) for x in lps[:3] @ [0, 0, k, 1]]
        made.ImageOrientationPatient = [text(x) for x in (lps[:3, :2] / edges[:2]).T.ravel()]
        made.PixelSpacing, made.SliceThickness = [text(edges[1]), text(edges[0])], text(edges[2])
        made.RescaleSlope, made.RescaleIntercept = scales[k] if scales else (1, 0)
        found.append(made)
    return found


def text(number: float) -> str:
    """Write a number as a decimal string of DICOM, in at most 16 characters."""
    return next(f"{number:.{digits}g}" for digits in range(15, 0, -1) if len(f"{number:.{digits}g}") <= 16)


def save_slices(folder: Path, found: list[FileDataset], name: str = "IM{:04d}", shuffle: bool = True) -> Path:
    """Write files under names that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(found)) if shuffle else range(len(found))
    for number, made in zip(order, found, strict=True):
        pydicom.dcmwrite(folder / name.format(number), made, enforce_file_format=True)
    return folder


def multiframe(path: Path, voxels: np.ndarray, affine: np.ndarray, scale=(1, 0)) -> Path:
    """Write an Enhanced CT file of all slices."""
    lps = LPS @ affine
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    made = header(generate_uid(entropy_srcs=["frames"]), 0)
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    put_pixels(made, voxels[:, :, 0].T)
    made.NumberOfFrames = voxels.shape[2]
    made.PixelData = np.ascontiguousarray(voxels.transpose(2, 1, 0)).tobytes()

    def item(**values) -> pydicom.Dataset:
        found = pydicom.Dataset()
        for key, value in values.items():
            setattr(found, key, value)
        return found

    axes = [text(x) for x in (lps[:3, :2] / edges[:2]).T.ravel()]
    made.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[
                item(
                    PixelSpacing=[text(edges[1]), text(edges[0])],
                    SliceThickness=text(edges[2]),
                    SpacingBetweenSlices=text(edges[2]),
                )
            ],
            PlaneOrientationSequence=[item(ImageOrientationPatient=axes)],
            PixelValueTransformationSequence=[item(RescaleSlope=scale[0], RescaleIntercept=scale[1], RescaleType="HU")],
        )
    ]
    made.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[text(x) for x in lps[:3] @ [0, 0, k, 1]])],
            FrameContentSequence=[item(InStackPositionNumber=k + 1, StackID="1", DimensionIndexValues=[k + 1])],
        )
        for k in range(voxels.shape[2])
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path
