"""What the docs show runs, and what they link to is there."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.__main__ import COMMANDS

PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_how_to_runs(page, tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    assert code
    (tmp_path / "mednext").symlink_to(ROOT / "scripts")  # as pip would install it
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}  # more would wait for the other tests
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_commands_name_settings_that_exist():
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", ROOT / "docs/README.md", *PAGES])
    configs = "\n".join(path.read_text() for path in (ROOT / "configs").rglob("*.json"))
    for command in re.findall(r"monai\.bundle run .*(?:\\\n.*)*", text):
        for name in re.findall(r"--(\w+)", command):
            assert name == "config_file" or f'"{name}"' in configs, f"--{name} in {command}"
    for name, (module, function, _) in COMMANDS.items():
        takes = inspect.signature(getattr(importlib.import_module(f"scripts.{module}"), function)).parameters
        commands = re.findall(rf"python -m (?:scripts|mednext) {name} ([^`\n#]*)", text)
        assert commands, name
        given = set(re.findall(r"--(\w+)", " ".join(commands)))
        assert all(name in takes or ("values" in takes and f'"{name}"' in configs) for name in given), given
