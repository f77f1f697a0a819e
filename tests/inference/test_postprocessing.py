"""What was decided for the labels of a network is done to them, and for no other labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.inference.postprocessing import KeepLargestd, postprocessing_file, read_steps
from scripts.utils.errors import UserError

LABELS = ["background", "organ", "tumour"]


def planes(text: str) -> np.ndarray:
    """Draw one label a plane of 2 x 2 voxels: "1102" is two planes of 1, one of background, one of 2."""
    return np.repeat([int(c) for c in text], 4).astype(np.uint8).reshape(-1, 2, 2)


def test_the_transform_keeps_affine_metadata_and_type():
    affine = torch.diag(torch.tensor([1.5, 2.0, 3.0, 1.0], dtype=torch.float64))
    label = MetaTensor(torch.as_tensor(planes("1102"))[None], affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    out = KeepLargestd("pred", [[1, 2]])({"pred": label, "other": 1})
    kept = out["pred"]
    assert isinstance(kept, MetaTensor)
    assert torch.equal(kept.affine, affine)
    assert kept.meta["filename_or_obj"] == "a.nii.gz"
    assert kept.dtype == torch.uint8
    assert np.array_equal(kept[0].numpy(), planes("1100"))
    assert np.array_equal(label[0].numpy(), planes("1102"))


def test_without_steps_the_transform_passes_everything_on():
    label = torch.as_tensor(planes("1101"))[None]
    assert KeepLargestd("pred", [])({"pred": label})["pred"] is label


def test_without_a_decision_there_are_no_steps(tmp_path):
    assert postprocessing_file(tmp_path / "model.pt") is None
    assert read_steps(postprocessing_file(tmp_path / "model.pt"), None) == []
    assert read_steps("none", LABELS) == []
    with pytest.raises(UserError, match="postprocessing.json not found; give another --postprocessing_file"):
        read_steps(str(tmp_path / "postprocessing.json"), LABELS)
    (tmp_path / "postprocessing.json").touch()
    assert postprocessing_file(tmp_path / "model.pt") == str(tmp_path / "postprocessing.json")


@pytest.mark.parametrize("labels", [["background", "liver"], [*LABELS, "cyst"], LABELS[::-1], None], ids=str)
def test_a_decision_for_other_labels_is_refused(labels, tmp_path):
    path = str(tmp_path / "postprocessing.json")
    Path(path).write_text(json.dumps({"labels": LABELS, "steps": {"all foreground": [1, 2]}}))
    assert read_steps(path, LABELS) == [[1, 2]]
    with pytest.raises(UserError) as error:
        read_steps(path, labels)
    assert path in str(error.value)
    assert str(LABELS) in str(error.value)
    assert str(labels if labels else "no labels") in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"labels": ["background"]}', '{"labels": [], "steps": [1]}'])
def test_a_damaged_decision_is_refused(content, tmp_path):
    path = tmp_path / "postprocessing.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"postprocessing.json is not a post-processing decision"):
        read_steps(str(path), LABELS)
