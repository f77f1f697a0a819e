"""From the network's labels to a file: the values of the data set's files, and the writer of the masks."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection, PathLike
from monai.data import MetaTensor
from monai.data.folder_layout import FolderLayoutBase
from monai.data.image_writer import NibabelWriter
from monai.transforms import MapTransform
from monai.utils import convert_data_type, ensure_tuple

from ..data.images import open_image
from ..data.scans import mask_file
from ..utils.files import write_whole


class LabelValuesd(MapTransform):
    """Turns the network's labels 0, 1, 2, .. into the values that the data set's files have for them.

    Args:
        keys: labels (1, *space), integers, MetaTensors.
        values: value of each label, or None where they are 0, 1, 2, ..
        names: where to put the result, one for each key; the keys themselves by default.
    """

    def __init__(self, keys: KeysCollection, values: Sequence[int] | None, names: KeysCollection | None = None) -> None:
        super().__init__(keys)
        self.names = self.keys if names is None else ensure_tuple(names)
        self.values: torch.Tensor | None = None
        if values is not None and list(values) != list(range(len(values))):
            self.values = torch.tensor(values, dtype=torch.uint8 if max(values) < 256 else torch.int16)

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key, name in self.key_iterator(out, self.names):
            labels = out[key]
            out[name] = labels if self.values is None else MetaTensor(self.values[labels.long()], meta=labels.meta)
        return out


class MaskLayout(FolderLayoutBase):
    """Names a mask by its case: `{output_dir}/{case}_seg.nii.gz`, dots and blanks in the case's id as they are.

    Args:
        output_dir: folder for the masks.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)

    def filename(self, subject: str, idx: object = None, **parts: object) -> str:  # type: ignore[override] # as MONAI calls it
        """Return the path of a mask.

        Args:
            subject: id of the case, see data/scans.py.
            idx: unused.
            parts: unused.
        """
        return str(self.output_dir / mask_file(subject))


class LabelWriter(NibabelWriter):
    """MONAI's NIfTI writer that gives a mask the header of its scan: sform, qform, their codes, and the unit.

    So ITK, which reads the qform first, and nibabel, which reads the sform first, both lay the mask on the scan. A scan
    that was never a file has its affine in both forms, in millimetres.
    """

    def __init__(self, output_dtype: DtypeLike = None, **kwargs) -> None:
        super().__init__(output_dtype, **kwargs)
        self.scan: str | None = None

    def set_metadata(self, meta_dict: Mapping | None = None, resample: bool = False, **options) -> None:
        """Take the scan's file and place from its metadata; a mask is never resampled here."""
        found = meta_dict or {}
        self.scan = found.get("filename_or_obj")
        self.affine = convert_data_type(found.get("affine", np.eye(4)), np.ndarray)[0]

    def write(self, filename: PathLike, verbose: bool = False, **kwargs) -> None:
        """Write the mask whole or not at all."""
        mask = np.atleast_3d(convert_data_type(self.data_obj, np.ndarray)[0])
        if self.scan is not None and Path(self.scan).is_file():
            header = open_image(self.scan).header.copy()
            header.set_intent("none")
            header["cal_min"] = header["cal_max"] = 0
            image = nib.Nifti1Image(mask, None, header)
        else:
            image = nib.Nifti1Image(mask, np.asarray(self.affine))
            image.header.set_xyzt_units("mm", "sec")
            image.set_qform(image.affine, code="aligned")
        image.header.set_data_dtype(mask.dtype)
        image.header.set_slope_inter(1, 0)
        write_whole(Path(filename), lambda partial: partial.write_bytes(_compressed(image)))


def _compressed(image: nib.Nifti1Image) -> bytes:
    return gzip.compress(image.to_bytes(), 6)
