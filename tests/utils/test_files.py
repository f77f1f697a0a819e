"""Files appear whole or not at all, whoever else writes them."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from scripts.utils.files import is_intact, remembered, sha256, write_whole


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
