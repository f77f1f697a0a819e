"""The table of settings has all that the page of settings lists, and the names that the rooms above it have."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from scripts import mednext
from scripts.inference import sliding_window
from scripts.kernels.precision import CPU_PRECISIONS
from scripts.preprocessing import intensity
from scripts.utils import settings_table as table
from scripts.utils.errors import UserError
from scripts.weights.model_settings import ModelSettings


def test_every_documented_setting_has_a_kind():
    page = (ROOT / "docs/reference/settings.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert {*rows} <= {*table.SETTINGS}, {*rows} - {*table.SETTINGS}


def test_everything_beside_the_weights_has_a_kind():
    assert list(table.MODEL) == [field.name for field in fields(ModelSettings)]


def test_names_are_those_of_the_rooms_above():
    assert (tuple(mednext.SIZES), mednext.KERNEL_SIZES) == (table.SIZES, table.KERNEL_SIZES)
    assert table.SCHEMES == intensity.SCHEMES
    for name in sliding_window.WINDOW_SCHEMES:
        assert table.kind_of("window_scheme").of(name, "window_scheme") == name
    for name in CPU_PRECISIONS:
        assert table.kind_of("cpu_precision").of(name, "cpu_precision") == name
    for style in table.STYLES:
        mednext.create_mednext_v1(1, 2, "S", checkpoint_style=style)


def test_it_imports_with_torch_alone():
    code = "import sys; sys.modules |= dict.fromkeys(('monai', 'nibabel')); import scripts.utils.settings"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ODD = ["[" * 9999, "9" * 5000, "-" * 9999, b"1", object(), 1 + 2j, {1, 2}, range(3), float("nan"), 10**400]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_no_value_is_a_traceback(value):
    for name in table.SETTINGS:
        try:
            table.kind_of(name).of(value, name)
        except UserError as e:
            assert len(str(e)) < 400  # noqa: PT017
