"""Descriptions of data sets with anything in them: each works or ends in one UserError, never in a raw exception.

`pytest -m fuzz` runs all of them; the ordinary run a share, drawn by a fixed seed.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import save

from scripts.data.datasets import Dataset
from scripts.planning.integrity import inspect_dataset
from scripts.planning.planner import plan_training
from scripts.utils.errors import UserError

DESCRIPTIONS, SPLITS = 700, 160
SHARE = 10  # of which the ordinary run takes one

JUNK = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, float("nan"), float("inf"), 10**30, "", " ", "a", "0", "-1", "²",
    "\x00",
    "a" * 5000, "../..", "/", "imagesTr", "$x", "@data", "a#b", "_target_", "\n", "é", "ignore", "background", [], {},
    [[]], [None], [0], [1, 2], ["a", "b"], {"0": 0}, {"a": "b"}, {"train": [], "val": []}, [{}], {"": ""},
)  # fmt: skip
TEXTS = ("", "{", "[" * 20_000, "\ufeff{}", "null", "NaN", '{"a": 1,}', '"\\ud800"', "9" * 6000, "\x00", "[1] []")


def places(value: object, path: tuple = ()) -> list[tuple]:
    """List the way to every part of a JSON value, the whole first."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def replaced(value: object, place: tuple, change: Callable) -> object:
    if not place:
        return change(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = change(inner[place[-1]])
    return value


def dropped(value: object, place: tuple) -> object:
    if place:
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
    return value


def mutated(value: object, rng: random.Random) -> bytes:
    """Change a JSON value in one to three places, as data or as text."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(places(value))
        kind = rng.randrange(5)
        if kind < 2:
            value = replaced(value, place, lambda _: copy.deepcopy(rng.choice(JUNK)))
        elif kind == 2:
            value = dropped(value, place)
        elif kind == 3:  # another key, or the part twice
            key = rng.choice(("0", "7", "x", "ignore", "-1", "train", "image", "labels", "channel_names"))
            more = {key: rng.choice(JUNK)}
            value = replaced(value, place, lambda p, more=more: {**p, **more} if isinstance(p, dict) else [p, p])
        else:
            other = rng.choice(places(value))
            part = value
            for key in other:
                part = part[key]
            value = replaced(value, place, lambda _, part=part: copy.deepcopy(part))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        text = rng.choice(TEXTS).encode()
    elif rng.random() < 0.15:
        at = rng.randrange(len(text) + 1)
        text = rng.choice((text[:at], text[:at] + bytes([rng.randrange(256)]) + text[at:], text[at:], text + text))
    return text


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Make a Decathlon and an nnU-Net folder of four cases, with what their dataset.json says."""
    root = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    for folder in (root / "decathlon", root / "nnunet"):
        for number in range(4):
            suffix = "_0000" if folder.name == "nnunet" else ""
            image, label = rng.integers(1, 99, (18, 6, 5)), rng.integers(0, 3, (18, 6, 5))
            save(folder / f"imagesTr/c{number}{suffix}.nii.gz", image.astype(np.int16))
            save(folder / f"labelsTr/c{number}.nii.gz", label.astype(np.uint8))
    listed = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(4)]
    listed[3]["image"] = [listed[3]["image"]]
    decathlon = {
        "name": "fuzz", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}, "numTraining": 4,
        "training": listed, "test": [],
    }  # fmt: skip
    nnunet = {
        "channel_names": {"0": "T1"}, "labels": {"background": 0, "all": [1, 2], "core": [2]},
        "regions_class_order": [1, 2], "numTraining": 4, "file_ending": ".nii.gz",
    }  # fmt: skip
    return {"decathlon": (root / "decathlon", decathlon), "nnunet": (root / "nnunet", nnunet)}


def used(folder: Path, remembered: str) -> None:
    """Do with a data set what checking, planning and training do before they compute."""
    data = Dataset(folder)
    findings = inspect_dataset(data, remembered)
    json.dumps([finding._asdict() for finding in findings], ensure_ascii=False).encode()
    for fold in (0, "all"):
        data.split(fold)
    known = json.loads(Path(remembered).read_text()) if Path(remembered).is_file() else {}
    records = [r for case in data.cases if "error" not in (r := known[case["label"]])]
    if records:
        json.dumps(plan_training(data, records, "median"))


def attempt(folder: Path, file: str, text: bytes, remembered: Path, seed: int) -> bool:
    """Use a data set one file of which has this text; say whether it could be used."""
    (folder / file).write_bytes(text)
    remembered.unlink(missing_ok=True)
    try:
        used(folder, str(remembered))
    except UserError as e:
        said = str(e)
    except BaseException as e:
        raise AssertionError(f"seed {seed}: {file} with {text[:600]!r}") from e
    else:
        return True
    said.encode()
    assert 0 < len(said.strip()) < 20_000, seed
    return False


def fuzz(folders: dict, file: str, seeds: list[int], remembered: Path) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        folder, description = folders[rng.choice(sorted(folders))]
        (folder / "splits_final.json").unlink(missing_ok=True)
        (folder / "dataset.json").write_text(json.dumps(description))
        names = [f"c{number}" for number in range(4)]
        split = [{"train": names[:n] + names[n + 1 :], "val": [names[n]]} for n in range(4)]
        attempt(folder, file, mutated(description if file == "dataset.json" else split, rng), remembered, seed)


def share(count: int, ordinary: bool) -> list[int]:
    return [seed for seed in range(count) if (seed % SHARE == 0) == ordinary]


def test_unchanged_files_can_be_used(folders, tmp_path):
    for folder, description in folders.values():
        assert attempt(folder, "dataset.json", json.dumps(description).encode(), tmp_path / "checked.json", -1)


FILES = {"dataset.json": DESCRIPTIONS, "splits_final.json": SPLITS}


@pytest.mark.parametrize("file", FILES)
def test_a_share_of_descriptions_ends_in_sentences(file, folders, tmp_path):
    fuzz(folders, file, share(FILES[file], ordinary=True), tmp_path / "checked.json")


@pytest.mark.fuzz
@pytest.mark.parametrize("file", FILES)
def test_all_other_descriptions_end_in_sentences(file, folders, tmp_path):
    fuzz(folders, file, share(FILES[file], ordinary=False), tmp_path / "checked.json")
