"""Masks have the values of the data set's files, and headers that other programs understand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

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


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5)], ids=["volume", "single slice, squeezed by MONAI"])
def test_a_mask_is_3d_and_its_lengths_are_millimetres(shape):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    mask = LabelWriter.create_backend_obj(np.ones(shape, np.uint8), affine=affine)
    assert mask.shape == (*shape, 1)[:3]
    assert mask.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(mask.affine, affine)
