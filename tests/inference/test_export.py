"""Masks have the values of the data set's files, and headers that other programs understand."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from scripts.inference.export import LabelValuesd, LabelWriter


def test_values_of_the_files_are_put_back():
    labels = MetaTensor(
        torch.tensor([[[[0, 1, 2]]]], dtype=torch.uint8), affine=torch.diag(torch.tensor([2.0, 2, 2, 1]))
    )
    found = LabelValuesd("pred", [0, 2, 300])({"pred": labels})["pred"]
    assert found.tolist() == [[[[0, 2, 300]]]]
    assert torch.equal(found.affine, labels.affine)
    for closed in (None, [0, 1, 2]):
        assert LabelValuesd("pred", closed)({"pred": labels})["pred"] is labels


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 1)], ids=["volume", "single slice"])
def test_a_mask_stays_3d_and_its_lengths_are_millimetres(shape, tmp_path):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    labels = MetaTensor(torch.ones(1, *shape, dtype=torch.uint8), affine=affine, meta={"filename_or_obj": "scan.nii"})
    options = {"output_dtype": None, "resample": False, "separate_folder": False, "print_log": False}
    SaveImaged("pred", output_dir=tmp_path, output_postfix="seg", writer=LabelWriter, **options)({"pred": labels})
    mask = nib.load(tmp_path / "scan_seg.nii.gz")
    assert mask.shape == shape
    assert mask.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(mask.affine, affine)
