"""From the network's labels to a file: the values of the data set's files, and one writer of masks in any format."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection, PathLike
from monai.data import MetaTensor
from monai.data.folder_layout import FolderLayoutBase
from monai.data.image_writer import NibabelWriter
from monai.transforms import MapTransform
from monai.utils import convert_data_type, ensure_tuple
from PIL import Image

from ..data.geometry import StoredImage, from_lps
from ..data.images import DICOM, MASK_ENDINGS, META, NIFTI, NRRD, format_of, read_image
from ..data.itk import open_reader
from ..data.nifti import new_image, open_image
from ..data.scans import image_files, mask_file
from ..data.visualization import label_colour
from ..utils.errors import UserError
from ..utils.files import write_whole
from ..utils.packages import require_package
from . import dicom_seg

PACKAGES = {"nrrd": "SimpleITK", "mha": "SimpleITK", "dicom_seg": "highdicom"}  # that write formats
LABELS = "labels"  # of a mask's metadata: what its values mean


class LabelValuesd(MapTransform):
    """Turns the network's labels 0, 1, 2, .. into the values that the data set's files have for them.

    Args:
        keys: labels (1, *space), integers, MetaTensors.
        values: value of each label, or None where they are 0, 1, 2, ..
        names: where to put the result, one for each key; the keys themselves by default.
        meanings: name of each value, for the metadata of the result, as "labels".
    """

    def __init__(
        self,
        keys: KeysCollection,
        values: Sequence[int] | None,
        names: KeysCollection | None = None,
        meanings: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(keys)
        self.meanings = dict(meanings or {})
        self.names = self.keys if names is None else ensure_tuple(names)
        self.values: torch.Tensor | None = None
        if values is not None and list(values) != list(range(len(values))):
            self.values = torch.tensor(values, dtype=torch.uint8 if max(values) < 256 else torch.int16)

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key, name in self.key_iterator(out, self.names):
            labels = out[key]
            out[name] = labels if self.values is None else MetaTensor(self.values[labels.long()], meta=labels.meta)
            if self.meanings:
                out[name].meta[LABELS] = self.meanings
        return out


class MaskLayout(FolderLayoutBase):
    """Names a mask by its case: `{output_dir}/{case}_seg.nii.gz`, dots and blanks in the case's id as they are.

    Args:
        output_dir: folder for the masks.
        output_format: of `data.images.MASK_ENDINGS`; None for that of each scan.
        output_file: the mask of a single scan, instead of both.
        preview: whether a picture of each scan belongs to its mask.
        save_probabilities: whether its probabilities do.
    """

    def __init__(
        self,
        output_dir: str,
        output_format: str | None = None,
        output_file: str | None = None,
        preview: bool = False,
        save_probabilities: bool = False,
    ) -> None:
        self.output_dir, self.output_format, self.output_file = Path(output_dir), output_format, output_file
        self.preview, self.save_probabilities = preview, save_probabilities

    def filename(self, subject: str, idx: object = None, scan: object = None, **parts: object) -> str:  # type: ignore[override] # as MONAI calls it
        """Return the path of a mask.

        Args:
            subject: id of the case, see data/scans.py.
            idx: unused.
            scan: file or folder of the image.
            parts: unused.
        """
        return self.output_file or str(self.output_dir / mask_file(subject, scan, self.output_format))

    def mask(self, case: dict) -> Path:
        """Return the path of a case's mask."""
        return Path(self.filename(case["case"], scan=image_files(case)[0]))

    def picture(self, case: str) -> Path:
        """Return the path of a case's preview, in a folder of its own: in 2D, pictures are scans or masks."""
        return self.output_dir / "previews" / f"{case}.png"

    def probabilities(self, case: str) -> Path:
        """Return the path of a case's probabilities, named as nnU-Net names them."""
        return self.output_dir / f"{case}.npz"

    def is_whole(self, case: str) -> bool:
        """Tell whether all files are there that belong to a case's mask."""
        wanted = [self.picture(case)] * self.preview + [self.probabilities(case)] * self.save_probabilities
        return all(path.is_file() for path in wanted)

    def require(self, cases: Sequence[dict]) -> None:
        """Raise UserError unless the masks of these cases can be written so here."""
        if self.output_file and len(cases) > 1:
            raise UserError(
                f"output_file {self.output_file} is the mask of one scan, and there are {len(cases)}: give --output_dir"
                " for theirs, or one scan as --dataset_dir."
            )
        for case in cases:
            kind = _kind(self.mask(case))
            if self.output_format not in (None, kind):
                raise UserError(
                    f"output_file {self.output_file} ends as {kind} does, output_format is {self.output_format}; give"
                    " one of the two."
                )
            require_format(image_files(case)[0], kind)


class LabelWriter(NibabelWriter):
    """MONAI's writer of masks, in the format of their ending, on the very place of their scan.

    As NIfTI, a mask of a NIfTI file has its header: sform, qform, their codes, and the unit. So ITK, which reads the
    qform first, and nibabel, which reads the sform first, both lay the mask on the scan. Of any other scan it has the
    affine in both forms, in millimetres.
    """

    def __init__(self, output_dtype: DtypeLike = None, **kwargs) -> None:
        super().__init__(output_dtype, **kwargs)
        self.scan = Scan()

    def set_metadata(self, meta_dict: Mapping | None = None, resample: bool = False, **options) -> None:
        """Take the scan's file and place from its metadata; a mask is never resampled here."""
        found = meta_dict or {}
        affine = convert_data_type(found.get("affine", np.eye(4)), np.ndarray)[0]
        self.scan = Scan(found.get("filename_or_obj"), affine, found.get(LABELS, {}))

    def write(self, filename: PathLike, verbose: bool = False, **kwargs) -> None:
        """Write the mask whole or not at all.

        Raises:
            UserError: the scan has no such form.
        """
        mask = np.atleast_3d(convert_data_type(self.data_obj, np.ndarray)[0])
        write_mask(Path(filename), mask, self.scan)


@dataclass
class Scan:
    """Says what a mask is of: file or folder, affine (4, 4) in RAS+ mm, and names of the label values."""

    path: str | None = None
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    labels: Mapping[int, str] = field(default_factory=dict)

    def is_of(self, *kinds: object) -> bool:
        """Tell whether it is a file or folder of one of these formats."""
        return self.path is not None and Path(self.path).exists() and format_of(self.path) in kinds


def write_mask(path: Path, mask: np.ndarray, scan: Scan) -> None:
    """Write a mask (X, Y, Z) whole or not at all, in the format of its ending.

    Raises:
        UserError: the scan has no such form.
    """
    kind = _kind(path)
    require_format(scan.path, kind)
    write_whole(path, lambda partial: WRITERS[kind](partial, mask, scan))


def _kind(path: str | Path) -> str:
    """Name the format, of `MASK_ENDINGS`, that the ending of a mask says."""
    endings = {ending.removeprefix(".seg"): kind for kind, ending in MASK_ENDINGS.items()}
    for ending, kind in endings.items():
        if str(path).lower().endswith(ending):
            return kind
    raise UserError(f"{path} does not end as a mask does; expected {', '.join(endings)}: give it one of these endings.")


def require_format(scan: str | None, kind: str) -> None:
    """Raise UserError unless the mask of a scan can be written in a format, of `MASK_ENDINGS`, here."""
    if kind == "dicom_seg" and not (scan and format_of(scan) is DICOM):
        raise UserError(
            f"{scan or 'the image'} is no DICOM series, which a DICOM SEG refers to: give --output_format nii.gz."
        )
    if kind in PACKAGES:
        require_package(PACKAGES[kind], scan)


def _nifti(partial: Path, mask: np.ndarray, scan: Scan) -> None:
    if scan.is_of(NIFTI):
        header = open_image(str(scan.path)).header.copy()
        header.set_intent("none")
        header["cal_min"] = header["cal_max"] = 0
        image = nib.Nifti1Image(mask, None, header)
    else:
        image = new_image(mask, np.asarray(scan.affine))
    image.header.set_data_dtype(mask.dtype)
    image.header.set_slope_inter(1, 0)
    partial.write_bytes(gzip.compress(image.to_bytes(), 6))


def _itk(partial: Path, mask: np.ndarray, scan: Scan, ending: str) -> None:
    """Write with SimpleITK, which chooses the format by the ending and knows what 2D scans and sheared grids may be."""
    itk = require_package("SimpleITK", partial)
    image = itk.GetImageFromArray(mask.T)
    affine = from_lps(np.asarray(scan.affine, np.float64))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    if scan.is_of(NRRD, META):
        _copy_place(str(scan.path), image)
    for key, value in (slicer_segments(mask.shape, scan.labels) if ending == ".nrrd" else {}).items():
        image.SetMetaData(key, value)
    made = partial.with_name(partial.name + ending)
    try:
        itk.WriteImage(image, str(made), True)
        made.replace(partial)
    finally:
        made.unlink(missing_ok=True)


def _copy_place(scan: str, image: Any) -> None:
    """Give a mask the very numbers of its scan's header, which may have more digits than an affine of ours."""
    _, reader = open_reader(scan)
    if reader.GetDimension() >= 3:
        axes = np.reshape(reader.GetDirection(), (reader.GetDimension(),) * 2)[:3, :3]
        image.SetSpacing(reader.GetSpacing()[:3])
        image.SetOrigin(reader.GetOrigin()[:3])
        image.SetDirection(axes.ravel().tolist())


def slicer_segments(shape: Sequence[int], labels: Mapping[int, str]) -> dict[str, str]:
    """Name the fields by which 3D Slicer knows the segments of a .seg.nrrd file, their names and colours."""
    fields = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, (value, name) in enumerate(sorted(labels.items())):
        colour = label_colour(value) / 255
        fields |= {
            f"Segment{number}_ID": f"Segment_{value}",
            f"Segment{number}_Name": " ".join(name.split()),
            f"Segment{number}_NameAutoGenerated": "0",
            f"Segment{number}_Color": " ".join(f"{part:.6f}" for part in colour),
            f"Segment{number}_ColorAutoGenerated": "0",
            f"Segment{number}_LabelValue": str(value),
            f"Segment{number}_Layer": "0",
            f"Segment{number}_Extent": " ".join(f"0 {n - 1}" for n in shape[:3]),
            f"Segment{number}_Tags": "|",
        }
    return fields


def _png(partial: Path, mask: np.ndarray, scan: Scan) -> None:
    if mask.shape[2] > 1:
        raise UserError(
            f"{scan.path} has {mask.shape[2]} slices; expected one for a png mask: give --output_format nii.gz."
        )
    pixels = mask[:, :, 0].T.astype(np.uint8 if mask.max() < 256 else np.uint16)
    Image.fromarray(np.ascontiguousarray(pixels)).save(partial, format="png")


WRITERS: dict[str, Callable[[Path, np.ndarray, Scan], None]] = {  # by MASK_ENDINGS
    "nii.gz": _nifti,
    "nrrd": lambda path, mask, scan: _itk(path, mask, scan, ".nrrd"),
    "mha": lambda path, mask, scan: _itk(path, mask, scan, ".mha"),
    "png": _png,
    "dicom_seg": lambda path, mask, scan: dicom_seg.write(path, mask, str(scan.path), scan.labels),
}


def read_mask(path: str | Path, scan: str) -> StoredImage:
    """Read a mask that `write_mask` wrote of a scan."""
    return dicom_seg.read(path, scan) if _kind(path) == "dicom_seg" else read_image(path)
