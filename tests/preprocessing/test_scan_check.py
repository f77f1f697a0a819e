"""A scan that the network cannot take is named, with what is wrong and what to do."""

from __future__ import annotations

import pytest
import torch
from conftest import save_without_spacing
from monai.data import MetaTensor
from monai.transforms import LoadImage

from scripts.preprocessing.scan_check import CheckScand
from scripts.utils.errors import UserError


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (torch.zeros(2, 4, 4, 4), "scan.nii has 2 channels; the network takes 1"),
        (torch.zeros(1, 4, 4), "2 spatial axes"),
        (torch.full((1, 4, 4, 4), torch.nan), "64 NaN or infinite voxels"),
    ],
    ids=["channels", "2d", "nan"],
)
def test_a_scan_the_network_cannot_take_is_named(voxels, message):
    with pytest.raises(UserError, match=message):
        CheckScand("image", channels=1)({"image": MetaTensor(voxels, meta={"filename_or_obj": "scan.nii"})})


def test_a_spacing_of_zero_is_refused_although_nibabel_reads_it_as_one(tmp_path):
    file = save_without_spacing(tmp_path / "scan.nii")
    image = LoadImage(ensure_channel_first=True)(file)
    assert image.affine[2, 2] == 1
    with pytest.raises(UserError, match="scan.nii has a voxel spacing of 1 x 1 x 0 mm"):
        CheckScand("image", channels=1)({"image": image})
