"""`pip install .` gives the network to other projects, with torch alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

DROP_IN = """
import sys
for name in ("monai", "nibabel", "ignite", "numpy", "scipy", "tensorboard", "tqdm", "fire"):
    sys.modules[name] = None  # as if it were not installed
import torch
import mednext
from mednext import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, create_mednext_v1, upkern_load_weights
from mednext.weights.checkpoints import read_weights

small = create_mednext_v1(1, 2, "S", 3, True)
large = upkern_load_weights(create_mednext_v1(1, 2, "S", kernel_size=5, deep_supervision=True), small)
outputs = large(torch.zeros(1, 1, 32, 16, 16))
outputs[0].mean().backward()
torch.save(large.state_dict(), sys.argv[1])
assert read_weights(sys.argv[1]).format == "mednext"
x = MedNeXtUpBlock(8, 4, 2, 3)(MedNeXtDownBlock(4, 8, 2, 3)(MedNeXtBlock(4, 4, 2, 3)(torch.zeros(1, 4, 8, 8, 8))))
MedNeXt(1, 4, 3, exp_r=2, kernel_size=3, dim="2d", norm_type="layer")(torch.zeros(1, 1, 32, 32))
print(mednext.__file__, [tuple(y.shape) for y in outputs[:2]], tuple(x.shape))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a copy, since pip leaves a build folder behind
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "scripts", source / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), str(source)], check=True, capture_output=True, timeout=300)
    return folder


def test_the_package_holds_the_same_files(installed):
    for file in (ROOT / "scripts").glob("*.py"):
        assert (installed / "mednext" / file.name).read_bytes() == file.read_bytes()


def test_a_project_for_the_original_runs_with_torch_alone(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DROP_IN, str(tmp_path / "weights.pt")],
        cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "[(1, 2, 32, 16, 16), (1, 2, 16, 8, 8)] (1, 4, 8, 8, 8)" in done.stdout


def test_its_version_is_the_bundles():
    version = re.search(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert version == json.loads((ROOT / "configs/metadata.json").read_text())["version"]
