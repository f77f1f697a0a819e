"""Each check of the settings fires where it should, and only there."""

from __future__ import annotations

import json

import pytest

from scripts.data.datasets import Dataset
from scripts.training import settings_checks as checks
from scripts.utils.errors import UserError
from scripts.weights.model_settings import ModelSettings

LABELS = {"background": 0, "organ": 1}
RECIPE = {
    "name": "CT",
    "channels": ["CT"],
    "labels": ["background", "organ"],
    "label_values": [0, 1],
    "needs_plan": False,
}


@pytest.fixture
def data(tmp_path) -> Dataset:
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": LABELS}))
    return Dataset(tmp_path)


def given(data: Dataset, *, switches=None, planned_for=None, recipe=None, **model) -> checks.Given:
    return checks.Given(data, ModelSettings(**model), switches or {}, planned_for, recipe)


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (
            checks.check_plan,
            {"planned_for": {"cases": 3, "labels": ["background", "organ"]}},
            {"planned_for": {"labels": ["background", "liver"]}},
            r"the plan is for the labels \['background', 'liver'\], the data set has \['background', 'organ'\]; plan",
        ),
        (
            checks.check_recipe,
            {"recipe": RECIPE},
            {"recipe": RECIPE | {"channels": ["T1", "T2"]}},
            r"the recipe CT is for the channels \['T1', 'T2'\], the data set has \['CT'\]; write dataset.json as docs",
        ),
        (
            checks.check_recipe,
            {"recipe": RECIPE | {"needs_plan": True}, "planned_for": {}},
            {"recipe": RECIPE | {"needs_plan": True}},
            "the recipe CT takes its intensities from a plan; make one",
        ),
        (
            checks.check_labels,
            {"labels": ["background", "organ"], "label_values": [0, 1]},
            {"labels": ["background", "organ"], "label_values": [0, 2]},
            r"the weights were trained for the label_values \[0, 2\], the data set has \[0, 1\]; score them",
        ),
        (checks.check_labels, {"labels": None}, {"labels": ["a"], "label_values": [0]}, "trained for the labels"),
        (
            checks.check_switches,
            {"switches": {"tta": False, "amp": True}},
            {"switches": {"tta": "false"}},
            "tta is 'false'; expected True or False: give --tta False",
        ),
        (
            checks.check_switches,
            {},
            {"switches": {"skip_heads": 1}},
            "fine_tuning#skip_heads is 1; expected True or False",
        ),
        (checks.check_network, {"size": "v2-B"}, {"size": "XL"}, "size is 'XL'; expected one of S, B, M, L"),
        (checks.check_network, {"kernel_size": 7}, {"kernel_size": 4}, "kernel_size is 4; expected one of 3, 5, 7"),
        (checks.check_network, {"dim": "2d"}, {"dim": "1d"}, "dim is '1d'; expected 2d or 3d"),
        (
            checks.check_patch_size,
            {"patch_size": [16, 32, 16]},
            {"patch_size": [16, 16, 16]},
            r"patch_size is \[16, 16, 16\]; expected three multiples of 16",
        ),
        (checks.check_patch_size, {"patch_size": [32] * 3}, {"patch_size": [40, 32, 32]}, "multiples of 16"),
        (checks.check_patch_size, {"patch_size": [32] * 3}, {"patch_size": [32, 32]}, "three multiples"),
        (
            checks.check_patch_size,
            {"patch_size": [32, 32, 1], "dim": "2d"},
            {"patch_size": [32, 32, 32], "dim": "2d"},
            "two multiples of 16 voxels and 1",
        ),
        (checks.check_spacing, {"spacing": [0.5, 1, 3]}, {"spacing": [1, 1, 0]}, r"spacing is \[1, 1, 0\] mm"),
        (checks.check_spacing, {}, {"spacing": [1.0, 1.0, float("nan")]}, "three positive lengths"),
    ],
)
def test_a_check_fires_where_it_should_and_only_there(check, right, wrong, message, data):
    check(given(data, **right))
    with pytest.raises(UserError, match=message):
        check(given(data, **wrong))


def test_every_check_is_run(data, monkeypatch):
    ran = []
    monkeypatch.setattr(checks, "CHECKS", tuple(lambda g, n=n: ran.append(n) for n in range(len(checks.CHECKS))))
    checks.check_settings(data, ModelSettings(), {})
    assert ran == list(range(7))
    written = {name for name in vars(checks) if name.startswith("check_")} - {"check_settings"}
    assert len(written) == len(ran)  # none that is written is left out
