"""A scan that the network cannot take is named, with what is wrong and what to do."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

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
