"""Files appear whole or not at all, whoever else writes them."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from scripts.utils.errors import UserError
from scripts.utils.files import is_intact, read_table, remembered, sha256, write_table, write_whole


def test_a_failed_write_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    write_whole(tmp_path / "new" / "a.txt", lambda partial: partial.write_text("whole"))

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "new" / "a.txt", fail)
    assert [(p.name, p.read_text()) for p in (tmp_path / "new").iterdir()] == [("a.txt", "whole")]


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
