"""Cases of a host, which have no ids, get some: by their files, and no two files the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.data.scans import named_cases, stem

LISTS = {
    "one folder": (["/d/a.nii.gz", "/d/b.nii"], ["a", "b"]),
    "a folder a site": (["/s1/a.nii.gz", "/s2/a.nii.gz", "/s2/b.nii.gz"], ["s1_a", "s2_a", "b"]),
    "a folder a patient, below a folder a site": (
        ["/s1/p/a.nii.gz", "/s2/p/a.nii.gz", "/s2/q/a.nii.gz"], ["s1_p_a", "s2_p_a", "s2_q_a"]
    ),
    "relative": (["a.nii.gz", "x/a.nii.gz"], ["a", "x_a"]),
    "the same file twice": (["/d/a.nii.gz", "/d/a.nii.gz"], ["a", "a"]),
    "paths": ([Path("/d/a.nii.gz"), Path("/e/a.nii.gz")], ["d_a", "e_a"]),
    "a file a channel": ([["/d/a_0000.nii.gz", "/d/a_0001.nii.gz"], ["/d/b_0000.nii.gz"]], ["a", "b"]),
    "none": ([], []),
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_cases_are_named_by_their_files(kind):
    images, names = LISTS[kind]
    assert [case["case"] for case in named_cases([{"image": image, "label": "l"} for image in images])] == names


def test_an_id_stays_and_paths_become_texts():
    (found,) = named_cases([{"case": "k", "image": [Path("/d/a.nii.gz")], "label": Path("/l/a.nii.gz"), "age": 3}])
    assert found == {"case": "k", "image": ["/d/a.nii.gz"], "label": "/l/a.nii.gz", "age": 3}


def test_a_name_that_no_file_can_have_has_a_stem():
    assert stem(Path("a" * 5000)) == "a" * 5000
