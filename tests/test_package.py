"""`pip install .` gives the network to other projects, with torch alone."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.__main__ import COMMANDS, main

TRITON = {
    f"mednext.kernels.triton_{name}" for name in ("depthwise", "gradient", "mlp", "product")
}  # `import triton`, not torch's

TORCH_ALONE = """
import sys
site, allowed = sys.argv[1], {"mednext", *sys.stdlib_module_names, *sys.argv[2].split(",")}

class Without:  # everything but torch, what torch requires, and the standard library is not installed
    finders = [*sys.meta_path]

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in allowed:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

sys.meta_path[:] = [Without()]
sys.path.insert(0, site)
"""

IMPORT = """
import importlib
for name in sys.argv[3:]:
    importlib.import_module(name)
print(*(name for name in sys.modules if name.split(".")[0] == "mednext"))
"""

DROP_IN = """
import torch
import mednext
from mednext import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, create_mednext_v1, upkern_load_weights
from mednext.weights.checkpoints import read_weights

small = create_mednext_v1(1, 2, "S", 3, True)
large = upkern_load_weights(create_mednext_v1(1, 2, "S", kernel_size=5, deep_supervision=True), small)
outputs = large(torch.zeros(1, 1, 32, 16, 16))
outputs[0].mean().backward()
torch.save(large.state_dict(), sys.argv[3])
assert read_weights(sys.argv[3]).format == "mednext"
x = MedNeXtUpBlock(8, 4, 2, 3)(MedNeXtDownBlock(4, 8, 2, 3)(MedNeXtBlock(4, 4, 2, 3)(torch.zeros(1, 4, 8, 8, 8))))
MedNeXt(1, 4, 3, exp_r=2, kernel_size=3, dim="2d", norm_type="layer")(torch.zeros(1, 1, 32, 32))
print(mednext.__file__, [tuple(y.shape) for y in outputs[:2]], tuple(x.shape))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the contents of the wheel."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a copy, since pip leaves a build folder behind
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "scripts", source / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(source), str(source)], check=True, capture_output=True, timeout=300)
    (wheel,) = source.glob("mednext_bundle-*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def packages_of(distribution: str) -> set[str]:
    """The top-level packages of an installed distribution and of all that it requires, without its extras."""
    seen, todo = set(), [distribution]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        try:
            entries = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        seen.add(name)
        wanted = [Requirement(entry) for entry in entries]
        todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {
        package
        for package, owners in packages_distributions().items()
        if seen & {canonicalize_name(owner) for owner in owners}
    }


def run(program: str, installed: Path, *arguments: object) -> str:
    """Run a program where only torch and what it requires can be imported; return what it prints."""
    allowed = packages_of("torch")
    assert {"torch", "sympy"} <= allowed
    assert not allowed & {"monai", "numpy", "scipy", "nibabel", "ignite", "tqdm", "fire"}
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ALONE + program, str(installed), ",".join(allowed), *map(str, arguments)],
        cwd=installed.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def wheel_modules(installed: Path) -> set[str]:
    files = [path.relative_to(installed).with_suffix("") for path in (installed / "mednext").rglob("*.py")]
    return {".".join(file.parts).removesuffix(".__init__") for file in files}


def test_the_package_holds_the_rooms_of_the_network_unchanged(installed):
    rooms = ("kernels", "weights", "utils")
    files = [
        file for pattern in ("*.py", *(f"{room}/*.*" for room in rooms)) for file in ROOT.glob(f"scripts/{pattern}")
    ]
    expected = {file.relative_to(ROOT / "scripts") for file in files}
    held = {file.relative_to(installed / "mednext") for file in (installed / "mednext").rglob("*.*")}
    assert {file for file in held if file.suffix != ".pyc"} == expected
    for file in expected:
        assert (installed / "mednext" / file).read_bytes() == (ROOT / "scripts" / file).read_bytes()


def test_every_module_is_imported_with_torch_alone(installed):
    names = wheel_modules(installed)
    assert names > TRITON
    assert len(names) > 20
    imported = set(run(IMPORT, installed, *sorted(names - TRITON)).split())
    assert imported == names - TRITON  # none of the others needs Triton to be imported


@pytest.mark.parametrize("name", sorted(TRITON))
def test_what_is_excepted_needs_triton(name, installed):
    assert re.search(r"^import triton$", (installed / f"{name.replace('.', '/')}.py").read_text(), re.MULTILINE)


def test_a_package_that_torch_does_not_require_is_not_found_there(installed):
    (installed / "needs_numpy.py").write_text("import numpy")
    with pytest.raises(AssertionError, match="No module named 'n"):
        run(IMPORT, installed, "needs_numpy")
    with pytest.raises(AssertionError, match="No module named 'numpy'"):
        run("import numpy", installed)


def test_a_project_for_the_original_runs_with_torch_alone(installed, tmp_path):
    said = run(DROP_IN, installed, tmp_path / "weights.pt")
    assert said.startswith(str(installed))
    assert "[(1, 2, 32, 16, 16), (1, 2, 16, 8, 8)] (1, 4, 8, 8, 8)" in said


def test_a_command_of_the_whole_bundle_says_so_in_the_wheel(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mednext", "cross_validate"],
        cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: cross_validate needs the whole bundle; clone it and run the command there.\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_commands_are_listed(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*COMMANDS]


def test_what_is_no_command_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts", "convert"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == "error: 'convert' is no command; give one of those above."


@pytest.mark.parametrize(("module", "function", "_"), COMMANDS.values(), ids=COMMANDS)
def test_every_command_of_the_table_is_there(module, function, _):
    assert callable(getattr(importlib.import_module(f"scripts.{module}"), function))


def test_its_version_is_the_bundles():
    version = re.search(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert version == json.loads((ROOT / "configs/metadata.json").read_text())["version"]
