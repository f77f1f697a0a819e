"""Files appear whole or not at all, whoever else writes them."""

from __future__ import annotations

import ast
import csv
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from conftest import ROOT, files_end_at

from scripts.utils import files
from scripts.utils.errors import UserError
from scripts.utils.files import (
    check_writable,
    copy_file,
    is_intact,
    read_table,
    remembered,
    sha256,
    write_folder_whole,
    write_table,
    write_text,
    write_whole,
)


def test_a_failed_write_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "whole")

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="a.txt could not be written .disk full.; make room there or mend"):
        write_whole(tmp_path / "new" / "a.txt", fail)
    assert [(p.name, p.read_text()) for p in (tmp_path / "new").iterdir()] == [("a.txt", "whole")]


LONG = "x" * 30_000
WRITERS = {
    "text": lambda path: write_text(path, LONG),
    "table": lambda path: write_table(path, ["a"], [{"a": LONG}]),
    "copy": lambda path: copy_file(ROOT / "configs/train.json", path),
    "torch": lambda path: write_whole(path, lambda partial: torch.save(torch.zeros(9999), partial)),
    "folder": lambda path: write_folder_whole(path, lambda partial: (partial / "b").write_text(LONG)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_disk_without_room_leaves_nothing_and_is_one_sentence(write, tmp_path):
    refused = pytest.raises(
        UserError, match=r"a could not be written \((File too large|the disk takes no more)\); make"
    )
    with files_end_at(9_000), refused:
        write(tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_other_errors_of_torch_stay_what_they_are(tmp_path):
    def fail(partial):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        write_whole(tmp_path / "a", fail)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_where_a_folder_should_be_is_named(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a could not be written \((File exists|Not a directory): .*/file\)"):
        write(tmp_path / "file" / "a")


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "of another").write_text("kept")
    (tmp_path / "a").symlink_to(tmp_path / "of another")
    write_text(tmp_path / "a", "new")
    assert not (tmp_path / "a").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("a", "of another")] == ["new", "kept"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(os.fstat(descriptor).st_size), sync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(to), replace(path, to)))
    write_text(tmp_path / "a", "four")
    assert done[:2] == [4, tmp_path / "a"]
    assert len(done) == 3  # the folder


HALF = """
import sys, time
from scripts.utils.files import {writer}
def half(partial):
    {make}
    print("x", flush=True)
    time.sleep(60)
{writer}(sys.argv[1], half)
"""
MADE = {
    "file": HALF.format(writer="write_whole", make="partial.write_text('half')"),
    "folder": HALF.format(writer="write_folder_whole", make="(partial / 'a').write_text('half')"),
}


@pytest.mark.parametrize("code", MADE.values(), ids=MADE)
def test_what_a_killed_process_left_is_removed_by_the_next_one_that_writes_there(code, tmp_path):
    (tmp_path / "somebody's own.part").touch()
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, stdout=subprocess.PIPE)
        for name in "ab"
    ]
    for writer in writers:
        writer.stdout.readline()
    killed, alive = writers
    killed.kill()
    killed.communicate()
    write_text(tmp_path / "c", "whole")
    left = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    alive.kill()
    alive.communicate()
    assert left == {"b", "c", "somebody's own"}


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_was_killed_before_it_wrote_anything_is_removed_too(make, tmp_path):
    make(tmp_path / f"a.{'a' * 32}.part")
    write_text(tmp_path / "c", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_is_swept_before_it_is_locked_is_made_again(write, tmp_path, monkeypatch):
    locked, swept = files._locked, []

    def late(partial):
        swept.append(partial)
        if len(swept) == 1:  # before it is opened
            files._remove(partial)
        lock = locked(partial)
        if len(swept) == 2:  # before it is locked
            files._remove(partial)
        return lock

    monkeypatch.setattr(files, "_locked", late)
    write(tmp_path / "a")
    assert len(swept) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class TestCheckWritable:
    def test_nothing_is_left(self, tmp_path):
        check_writable(tmp_path, tmp_path / "a/b", need=1)
        assert not [*tmp_path.iterdir()]

    def test_a_place_that_takes_nothing_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file/a/b"):
            with pytest.raises(
                UserError, match=rf"{folder} could not be written \(Not a directory\); make room there or"
            ):
                check_writable(tmp_path, folder)
        refused = pytest.raises(UserError, match=f"{tmp_path} could not be written .File too large")
        with files_end_at(0), refused:
            check_writable(tmp_path)

    def test_too_little_room_is_told_with_what_is_needed(self, tmp_path):
        with pytest.raises(UserError, match=r"has \d+ MB of free space, 1000000000000 MB are needed; make room"):
            check_writable(tmp_path, need=10**18)


def test_several_may_write_one_file_at_the_same_time(tmp_path):
    together = Barrier(4)

    def write(letter: str) -> None:
        def fill(partial):
            with open(partial, "w") as file:
                for _ in range(3):
                    together.wait()  # all files are open and grow at once
                    file.write(letter * 1000)
                    file.flush()

        write_whole(tmp_path / "a.txt", fill)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "a.txt").read_text() in [letter * 3000 for letter in "abcd"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("text", "expected"), [(None, {}), ("{", {}), ('{"a": 1}', {"a": 1})])
def test_what_an_earlier_run_left_is_read_where_it_is_whole(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert remembered(tmp_path / "a.json") == expected


def test_a_file_larger_than_a_block_has_the_sha256_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_an_archive_is_intact_unless_a_bit_of_a_record_or_of_its_end_is_another(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("record", b"voxels")
    assert is_intact(tmp_path / "a.zip")
    whole = (tmp_path / "a.zip").read_bytes()
    for damaged in (whole.replace(b"voxels", b"voxelr"), whole[:-30], whole[30:], b"", b"PK"):
        (tmp_path / "b.zip").write_bytes(damaged)
        assert not is_intact(tmp_path / "b.zip")
    with pytest.raises(FileNotFoundError):
        is_intact(tmp_path / "c.zip")


TEXTS = [
    "=cmd|' /C calc'!A0", "+1-cmd", "-2+3+cmd|x", "@SUM(1)", "\t=1", "\r=1", "\n=1", "'=1", "''-a", "'", "'a", "-5",
    "-1e3", "-inf", "\uff1d1", "a,\"b\"", "a\r\nb", " =1", "", "ordinary", "\udce9", "é",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_texts_of_a_table_are_read_back_and_none_is_a_formula(text, tmp_path):
    write_table(tmp_path / "a.csv", [text or "x", "n"], [{text or "x": text, "n": -1.5}] * 2)
    assert read_table(tmp_path / "a.csv") == [{text or "x": text, "n": "-1.5"}] * 2
    with open(tmp_path / "a.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        for cell in [cell for row in csv.reader(file) for cell in row if cell]:
            assert cell[0] not in "=+-@\t\r\n\uff1d" or float(cell) is not None


def test_a_table_that_was_read_is_written_as_it_was(tmp_path):
    write_table(tmp_path / "a.csv", ["a", "b"], [{"a": "-x", "b": -2.0}])
    write_table(tmp_path / "b.csv", ["a", "b"], read_table(tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() == b"a,b\r\n'-x,-2.0\r\n"


@pytest.mark.parametrize("content", [b"a,b\n1\n", b"\xff\x00a,b\n1,2,3\n", b'a\n"' + b"x" * 200000])
def test_what_is_no_table_is_one_sentence(content, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match="a.csv is not a table in CSV"):
        read_table(tmp_path / "a.csv")


def test_a_table_that_a_spreadsheet_or_an_editor_saved_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffa,b\r\n1,é\r\n\r\n".encode())
    assert read_table(tmp_path / "a.csv") == [{"a": "1", "b": "é"}]


ELSEWHERE = {  # writes that are no outputs, or that write_whole and write_folder_whole ask for
    "utils/ownership.py", "data/convert.py", "data/phantom.py", "training/log_figure.py",
    "benchmarks/compile_triton.py", "benchmarks/peak.py", "inference/environment.py", "inference/probabilities.py",
    "publishing/package.py", "publishing/model_card.py",
}  # fmt: skip
PLACE = {"open": 0, "savefig": 0, "save": 1, "copy": 1, "copy2": 1, "copyfile": 1, "copytree": 1}  # of the path


def written(call: ast.Call) -> ast.expr | None:
    """Return the path that a call writes to, None where it writes nothing."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("write_text", "write_bytes", "to_filename", "touch") and isinstance(call.func, ast.Attribute):
        return call.func.value
    if name == "open" and not re.search("'[^']*[wax+]", "".join(map(ast.unparse, call.args[1:2]))):
        return None
    return call.args[PLACE[name]] if name in PLACE and len(call.args) > PLACE[name] else None


def test_nothing_is_written_but_by_these_functions():
    found = {}
    for path in (ROOT / "scripts").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        paths = {ast.unparse(target) for call in calls if (target := written(call)) is not None}
        if others := paths - {"partial", "buffer"}:
            found[str(path.relative_to(ROOT / "scripts"))] = others
    assert set(found) == ELSEWHERE, found
