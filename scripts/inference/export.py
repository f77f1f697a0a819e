"""From the network's labels to a file: the values of the data set's files, and the writer of the masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.image_writer import NibabelWriter
from monai.transforms import MapTransform
from monai.utils import ensure_tuple


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


class LabelWriter(NibabelWriter):
    """MONAI's NIfTI writer that keeps a single-slice scan 3D and says in the header that lengths are millimetres."""

    @classmethod
    def create_backend_obj(
        cls,
        data_array: NdarrayOrTensor,
        affine: NdarrayOrTensor | None = None,
        dtype: DtypeLike = None,
        **kwargs,
    ):
        image = super().create_backend_obj(np.atleast_3d(data_array), affine, dtype, **kwargs)
        image.header.set_xyzt_units("mm", "sec")
        return image
