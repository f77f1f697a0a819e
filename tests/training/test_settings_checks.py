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


def given(data: Dataset, *, planned_for=None, recipe=None, **model) -> checks.Given:
    return checks.Given(data, ModelSettings(**model), planned_for, recipe)


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
    ],
)
def test_a_check_fires_where_it_should_and_only_there(check, right, wrong, message, data):
    check(given(data, **right))
    with pytest.raises(UserError, match=message):
        check(given(data, **wrong))


def test_every_check_is_run(data, monkeypatch):
    ran = []
    monkeypatch.setattr(checks, "CHECKS", tuple(lambda g, n=n: ran.append(n) for n in range(len(checks.CHECKS))))
    checks.check_settings(data, ModelSettings())
    assert ran == list(range(3))
    written = {name for name in vars(checks) if name.startswith("check_")} - {"check_settings"}
    assert len(written) == len(ran)  # none that is written is left out
