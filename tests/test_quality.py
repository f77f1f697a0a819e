"""Style, layout and types of the code are checked by ruff and mypy, with the settings of pyproject.toml.

`python tests/test_quality.py` writes the table of type errors anew after some of them are gone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("type_errors.json")  # file -> number of errors; it may only shrink
WITHOUT_ERRORS = re.compile(r"scripts/(mednext\.py|blocks\.py|(kernels|weights|data|utils)/)")
UPDATE = "python tests/test_quality.py"

Errors = dict[str, list[str]]


def tool(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def type_errors(cache: Path) -> Errors:
    """Run mypy once; return its errors by file."""
    done = tool("mypy", "--cache-dir", str(cache), "--no-pretty", "--no-error-summary", "--hide-error-context")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy could not check the code: {done.stdout}{done.stderr}")
    return by_file(done.stdout)


def by_file(output: str) -> Errors:
    """Sort mypy's errors by file; its notes are left out."""
    errors = defaultdict(list)
    for line in output.splitlines():
        if match := re.match(r"(.+?):\d+: error: ", line):
            errors[match[1].replace("\\", "/")].append(line)
    return dict(errors)


def changes(errors: Errors, table: dict[str, int]) -> tuple[list[str], list[str]]:
    """One sentence for each file with more errors than the table has, and one for each with fewer."""
    more = [
        f"{file} has {len(found)} type errors, the table {table.get(file, 0)}; mend what is new of:\n  "
        + "\n  ".join(found)
        for file, found in errors.items()
        if len(found) > table.get(file, 0)
    ]
    fewer = [
        f"{file} has {len(errors.get(file, ()))} type errors, the table {count}; write it anew: {UPDATE}"
        for file, count in table.items()
        if len(errors.get(file, ())) < count
    ]
    return more, fewer


def write_table(errors: Errors) -> None:
    """Write the number of errors of each file that may have any.

    Raises:
        SystemExit: a file has more errors than the table that is there allows.
    """
    if TABLE.exists() and (more := changes(errors, json.loads(TABLE.read_text()))[0]):
        sys.exit("error: the table may only shrink. " + "\n".join(more))
    table = {file: len(found) for file, found in sorted(errors.items()) if not WITHOUT_ERRORS.match(file)}
    TABLE.write_text(json.dumps(table, indent=4) + "\n")
    print(f"wrote {TABLE}: {sum(table.values())} errors in {len(table)} files")


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> Errors:
    return type_errors(tmp_path_factory.mktemp("mypy"))


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(command):
    done = tool("ruff", *command, "--quiet", "--no-cache", "--output-format", "concise")
    assert done.returncode == 0, f"ruff {' '.join(command)}\n{done.stdout}{done.stderr}"


def test_rooms_without_type_errors_stay_so(errors):
    found = [line for file, lines in errors.items() if WITHOUT_ERRORS.match(file) for line in lines]
    assert not found, "\n".join(found)


def test_type_errors_elsewhere_only_become_fewer(errors):
    table = json.loads(TABLE.read_text())
    assert not [file for file in table if WITHOUT_ERRORS.match(file)]
    elsewhere = {file: lines for file, lines in errors.items() if not WITHOUT_ERRORS.match(file)}
    more, fewer = changes(elsewhere, table)
    assert not more, "\n".join(more)
    assert not fewer, "\n".join(fewer)


def test_the_count_is_of_errors_by_file():
    assert by_file(
        "scripts/a.py:3: error: x  [index]\nscripts/a.py:3: note: y\nscripts/b.py:1: error: z  [misc]\n"
    ) == {
        "scripts/a.py": ["scripts/a.py:3: error: x  [index]"],
        "scripts/b.py": ["scripts/b.py:1: error: z  [misc]"],
    }


def test_more_errors_are_listed_and_fewer_say_how_to_update():
    errors = {"scripts/a.py": ["scripts/a.py:3: error: x", "scripts/a.py:4: error: y"], "scripts/new.py": ["z"]}
    more, fewer = changes(errors, {"scripts/a.py": 1, "scripts/b.py": 2})
    assert [line.split(";")[0] for line in more] == [
        "scripts/a.py has 2 type errors, the table 1",
        "scripts/new.py has 1 type errors, the table 0",
    ]
    assert "scripts/a.py:4: error: y" in more[0]
    assert fewer == ["scripts/b.py has 0 type errors, the table 2; write it anew: python tests/test_quality.py"]
    assert changes(errors, {"scripts/a.py": 2, "scripts/new.py": 1}) == ([], [])


def test_the_table_is_not_written_with_more_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "TABLE", tmp_path / "type_errors.json")
    write_table({"scripts/a.py": ["x", "y"], "scripts/data/b.py": ["z"]})
    assert json.loads(TABLE.read_text()) == {"scripts/a.py": 2}
    with pytest.raises(SystemExit, match="may only shrink. scripts/a.py has 3 type errors"):
        write_table({"scripts/a.py": ["x", "y", "z"]})
    write_table({})
    assert json.loads(TABLE.read_text()) == {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_table(type_errors(Path(folder)))
