"""scripts/ is a house of rooms: what each may import is a table, nothing goes up, and nothing in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

ROOMS = {  # from the ground up: room -> the rooms below that it may import; utils is open to all
    "utils": set(),
    "kernels": {"utils"},
    "blocks": {"utils", "kernels"},
    "mednext": {"utils", "kernels", "blocks"},
    "weights": {"utils", "mednext"},
    "data": {"utils"},
    "planning": {"utils", "kernels", "blocks", "data", "mednext"},
    "preprocessing": {"utils", "data"},
    "inference": {"utils", "kernels", "mednext", "weights", "data", "preprocessing"},
    "training": {"utils", "kernels", "mednext", "weights", "data", "preprocessing"},
    "evaluation": {"utils", "weights", "data", "preprocessing", "inference"},
    "publishing": {"utils", "mednext", "weights", "data", "evaluation"},
    "nnunet_mednext": {"blocks", "mednext", "weights"},  # the original's names
    "__init__": {"blocks", "mednext", "weights"},  # what the wheel offers
    "__main__": {"utils"},  # the table of commands, which it imports by name
}
ROOMS["benchmarks"] = {*ROOMS} - {"nnunet_mednext", "__init__", "__main__"}


class Import(NamedTuple):
    """A line of `source` that imports `target`; both are modules of scripts/, such as "data.images"."""

    source: str
    line: int
    target: str


def modules(root: Path) -> dict[str, Path]:
    """Every module below `root`, by its name without the package's: "data.images", "data" for its __init__.py."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import of one module below `root` by another, also those inside functions and for type checkers."""
    paths = modules(root)
    found = []
    for source, path in paths.items():
        package = path.relative_to(root).parent.parts
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _targets(node, package, root.name):
                target = name or "__init__"
                while target not in paths and "." in target:  # a function or a class of that module
                    target = target.rpartition(".")[0]
                if target in paths and target != source:
                    found.append(Import(source, node.lineno, target))
                elif target not in paths:  # a name that the package's own __init__.py has
                    found.append(Import(source, node.lineno, "__init__"))
    return [*dict.fromkeys(found)]  # one line may import several names of a module


def _targets(node: ast.AST, package: tuple[str, ...], root: str) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        return [".".join(filter(None, [*base, alias.name])) for alias in node.names]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == root:
        return [".".join([*node.module.split(".")[1:], alias.name]) for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == root]
    return []


def room(module: str) -> str:
    return module.split(".")[0]


def faults(root: Path) -> list[str]:
    """One sentence for each import below `root` that the table does not allow."""
    return [
        f"scripts/{source.replace('.', '/')}.py:{line} imports {target}, but {room(source)} may only import"
        f" {', '.join(sorted(ROOMS[room(source)])) or 'nothing'}: move what it needs into a room below."
        for source, line, target in imports(root)
        if room(source) != room(target) and room(target) not in ROOMS[room(source)]
    ]


def test_every_module_is_in_a_room_of_the_table():
    assert {room(module) for module in modules(ROOT / "scripts")} == {*ROOMS}


def test_the_table_goes_down_only():
    above = list(ROOMS)
    for name, below in ROOMS.items():
        assert below <= {*above[: above.index(name)]}, name


def test_rooms_import_what_the_table_allows():
    found = faults(ROOT / "scripts")
    assert not found, "\n".join(found)


def test_modules_import_one_another_in_no_circle():
    graph = {module: set() for module in modules(ROOT / "scripts")}
    for source, _, target in imports(ROOT / "scripts"):
        graph[source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"{' imports '.join(reversed(e.args[1]))}: move what both need into a module of its own.")


def test_modules_import_one_another_by_relative_names():
    for path in (ROOT / "scripts").rglob("*.py"):  # the wheel calls the package mednext
        for node in ast.walk(ast.parse(path.read_text())):
            assert not _targets(node, (), "scripts") or getattr(node, "level", 0), f"{path}:{node.lineno}"


def test_tests_stand_in_the_rooms_of_what_they_test():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders <= {*ROOMS, "workflows"}


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("from ..inference.predictor import Predictor", "inference.predictor"),
        ("from ..inference import predictor", "inference.predictor"),
        ("from .. import inference", "inference"),
        ("from ..inference import *", "inference"),
        ("from scripts.inference.predictor import Predictor", "inference.predictor"),
        ("from scripts import inference", "inference"),
        ("import scripts.inference.predictor as p", "inference.predictor"),
        ("def f():\n    from ..inference import predictor", "inference.predictor"),
        ("if TYPE_CHECKING:\n    from ..inference import predictor", "inference.predictor"),
        ("from .. import create_mednext", "__init__"),
    ],
)
def test_an_import_that_goes_up_is_found_however_it_is_written(line, target, tmp_path):
    root = tmp_path / "scripts"
    for name, text in {"data/images.py": line, "inference/predictor.py": "", "__init__.py": ""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).parent.joinpath("__init__.py").touch()
        (root / name).write_text(text)
    assert [(source, found) for source, _, found in imports(root)] == [("data.images", target)]
    assert len(faults(root)) == 1
    assert "data may only import utils: move what it needs into a room below" in faults(root)[0]
