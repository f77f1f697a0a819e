"""Equal transforms and files are found equal, others are not; in every process."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import save
from monai.transforms import Compose, CropForegroundd, LoadImaged, ScaleIntensityRanged, Spacingd

from scripts.preprocessing.cache_key import description, digest, file_digest
from scripts.preprocessing.intensity import Intensityd
from scripts.utils.files import remembered

SOURCE = "from monai.transforms import MapTransform\n\n\nclass Addd(MapTransform):\n    {method}\n"


def digest_of(*transforms: object) -> str:
    return digest([description(transform) for transform in transforms])


def test_what_is_made_twice_is_described_equally():
    def make():
        return (
            LoadImaged("image", reader="NibabelReader"),
            Spacingd("image", pixdim=(1, 1, 2), mode=3, dtype="float32"),
            CropForegroundd("image", "image", select_fn=lambda x: x > 3),
            functools.partial(np.clip, a_min=0),
        )

    assert digest_of(*make()) == digest_of(*make())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Spacingd("image", pixdim=(1, 1, 2)), Spacingd("image", pixdim=(1, 1, 1))),
        (Spacingd("image", (1, 1, 2), dtype=torch.float32), Spacingd("image", (1, 1, 2), dtype=torch.half)),
        (Spacingd("image", pixdim=(1, 1, 2)), Spacingd("label", pixdim=(1, 1, 2))),
        (Intensityd("image", {"clip": [0, 1], "mean": 0, "std": 1}, "grid"), Intensityd("image", "zscore", "grid")),
        (ScaleIntensityRanged("image", 0, 1, 0, 1), ScaleIntensityRanged("image", 0, 1, 0, 2)),
        (lambda x: x > 3, lambda x: x > 4),
        (functools.partial(np.clip, a_min=0), functools.partial(np.clip, a_min=1)),
        (np.arange(100), np.arange(100) * 2),
        (np.zeros(3, np.float32), np.zeros(3, np.float64)),
        (np.zeros((10, 10)), np.zeros((20, 5))),
        ([1, [2]], [[1], 2]),
        ("1", 1),
    ],
)  # fmt: skip
def test_what_differs_is_described_differently(one, other):
    assert digest_of(one) != digest_of(other)


def test_the_order_of_a_set_does_not_count():
    one, same = {0, 8}, {8, 0}
    assert list(one) != list(same)
    assert digest_of(one) == digest_of(same) != digest_of({0, 9})


def test_a_transform_that_has_run_is_still_the_same(tmp_path):
    transforms = LoadImaged("image", ensure_channel_first=True), Spacingd("image", (1, 1, 2), mode=3)
    before = digest_of(*transforms)
    Compose(transforms)({"image": str(save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.float32)))})
    assert digest_of(*transforms) == before


def test_a_function_is_known_by_what_it_remembers_too():
    def above(threshold):
        return lambda x: x > threshold

    assert digest_of(above(1)) == digest_of(above(1)) != digest_of(above(2))


def test_a_lambda_of_a_config_has_no_file_and_is_known_by_its_code():
    one, same, other = (eval(text) for text in ("lambda x: x > 3", "lambda x: x > 3", "lambda x: x > 4"))
    assert digest_of(one) == digest_of(same) != digest_of(other)


def test_an_edited_transform_is_another_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def version(method):
        (tmp_path / "of_ones_own.py").write_text(SOURCE.format(method=method))
        sys.modules.pop("of_ones_own", None)
        importlib.invalidate_caches()
        return digest_of(importlib.import_module("of_ones_own").Addd("image"))

    one, other = "__call__ = lambda self, data: data", "__call__ = lambda self, data: dict(data)"
    assert version(one) == version(one) != version(other)


def test_what_another_process_would_not_know_is_refused():
    with pytest.raises(TypeError, match="cannot be described"):
        description([object()])


def test_a_file_is_read_again_only_when_its_size_or_time_changed(tmp_path):
    path, known = save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.uint8)), {}
    first = file_digest(str(path), known)
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-1] = 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(str(path), known) == first  # not read: as large and as old as before
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file_digest(str(path), known) != first
    assert file_digest(str(path), {}) == file_digest(str(path), known)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"a": [1, 2, "x"]})], ids=["absent", "damaged", "whole"])
def test_digests_are_remembered_unless_the_file_is_damaged(content, tmp_path):
    if content is not None:
        (tmp_path / "digests.json").write_text(content)
    whole = content is not None and content.endswith("}")
    assert remembered(tmp_path / "digests.json") == ({"a": [1, 2, "x"]} if whole else {})
