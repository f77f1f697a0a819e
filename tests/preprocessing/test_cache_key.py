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

from scripts.preprocessing import cache_key
from scripts.preprocessing.cache_key import description, digest, file_digest, versions
from scripts.preprocessing.definition import definitions
from scripts.preprocessing.intensity import Intensityd
from scripts.utils.files import remembered

OF_ONES_OWN = """
from monai.transforms import MapTransform

LIMIT = 3
TABLE = {"double": lambda x: 2 * x}


def helper(x):
    return x + LIMIT


class Base(MapTransform):
    def __call__(self, data):
        return {key: self.change(value) for key, value in data.items()}


class Addd(Base):
    def change(self, x):
        return TABLE["double"](helper(x))


def neighbour(x):
    return x
"""


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
        (Intensityd("image", {"clip": [0, 1], "mean": 0, "std": 1}, "native"), Intensityd("image", "zscore", "native")),
        (Intensityd("image", "zscore", "native"), Intensityd("image", "zscore", "resampled")),
        (ScaleIntensityRanged("image", 0, 1, 0, 1), ScaleIntensityRanged("image", 0, 1, 0, 2)),
        (lambda x: x > 3, lambda x: x > 4),
        (lambda x: x[..., 0], lambda x: x[..., 1]),
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


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return a function that writes the module of the user's own, edited once, and describes its transform."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def edit(before: str = "", after: str = "") -> str:
        assert before in OF_ONES_OWN
        (tmp_path / "of_ones_own.py").write_text(OF_ONES_OWN.replace(before, after, 1) if before else OF_ONES_OWN)
        sys.modules.pop("of_ones_own", None)
        importlib.invalidate_caches()
        return digest_of(importlib.import_module("of_ones_own").Addd("image"))

    yield edit
    sys.modules.pop("of_ones_own", None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('TABLE["double"](helper(x))', "helper(x)"),
        ("return x + LIMIT", "return x - LIMIT"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("2 * x", "3 * x"),
        ("data.items()", "sorted(data.items())"),
        ("class Addd(Base):", "class Addd(Base):\n    backend = ()\n"),
    ],
    ids=["its method", "a helper", "a constant of a helper", "a function in a table", "its base class", "an attribute"],
)
def test_an_edited_transform_is_another_one(before, after, edited):
    assert edited(before, after) != edited() == edited()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def neighbour(x):\n    return x", "def neighbour(x):\n    return -x"),
        ("def neighbour(x):", "def other(x):\n    return neighbour(x)\n\n\ndef neighbour(x):"),
        ("LIMIT = 3", "LIMIT = 3  # as published\nOTHER = 4"),
        ("def change(self, x):", 'def change(self, x):\n        """Add, then double."""\n        # the order counts'),
        ("def change(self, x):", "def change(self, x: float) -> float:"),
        ("class Addd(Base):", "\n\n\nclass Addd(Base):\n"),
        ('TABLE["double"](helper(x))', "TABLE['double'](\n            helper(x),\n        )"),
    ],
    ids=["a neighbour", "a new one", "constants", "a docstring", "annotations", "its place", "its layout"],
)
def test_what_it_does_not_depend_on_may_be_edited(before, after, edited):
    assert edited(before, after) == edited()


def test_helpers_of_another_module_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    using = "import helpers_of_ones_own as helpers\n\n\ndef used(x):\n    return helpers.add(x)\n"
    (tmp_path / "users_of_ones_own.py").write_text(using)

    def version(helper: str) -> str:
        (tmp_path / "helpers_of_ones_own.py").write_text(helper)
        for name in ("helpers_of_ones_own", "users_of_ones_own"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return digest_of(importlib.import_module("users_of_ones_own").used)

    one = "def add(x):\n    return x + 1\n\n\ndef other(x):\n    return x\n"
    assert version(one) == version(one.replace("return x\n", "return 2 * x\n")) != version(one.replace("+ 1", "+ 2"))


def test_the_definition_of_the_bundles_own_transform_is_what_it_needs_and_no_more():
    found = definitions(Intensityd)
    names = {name.split(".")[-1].split("[")[0] for name in found}
    assert {"schemes", "_normalise", "_clear_outside", "EPSILON", "RINGING", "SCHEMES"} <= names
    assert "CropNonzerod" not in names
    assert "zero mean and unit variance" not in str(found)


def test_the_version_of_the_cache_belongs_to_the_key(monkeypatch):
    before = digest(versions())
    monkeypatch.setattr(cache_key, "CACHE_VERSION", cache_key.CACHE_VERSION + 1)
    assert digest(versions()) != before


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
