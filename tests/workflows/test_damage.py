"""A flipped bit in weights, a cached case or a scan is noticed, or changes nothing of what is read.

`pytest -m fuzz` flips 200 bits of each; the ordinary run ten, at other places.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save
from monai.transforms import LoadImaged

from scripts.data.images import read_image
from scripts.inference.ensemble import member
from scripts.mednext import create_mednext
from scripts.preprocessing.cache import CachedDataset
from scripts.utils.errors import UserError
from scripts.utils.files import sha256
from scripts.weights.checkpoints import check_weights, load_checkpoint, read_weights, save_checkpoint, save_weights
from scripts.weights.convert import convert_weights
from scripts.weights.model_settings import load_model_settings, settings_file
from scripts.weights.upkern import start_from

FLIPS = 200
Read = Callable[[Path], dict[str, torch.Tensor]]


def network() -> torch.nn.Module:
    return create_mednext(1, 2, "S", n_channels=8)


def weights(path: Path) -> dict:
    check_weights(path, network())
    return load_checkpoint(path)


def foreign(path: Path) -> dict:
    return read_weights(path).state


def scan(path: Path) -> dict:
    found = read_image(path)
    return {"voxels": torch.from_numpy(found.values.copy()), "affine": torch.from_numpy(found.geometry.affine)}


def case(path: Path) -> dict:
    """Read what training reads of a case, from the entry in `path`, which is made again if it is damaged."""
    cached = cases(path.parents[1]).cached(0)
    return {"image": cached["image"].as_tensor().clone(), "affine": cached["image"].affine.clone()}


def cases(folder: Path) -> CachedDataset:
    data = [{"case": "a", "image": str(folder.parent / "scan.nii.gz")}]
    return CachedDataset(data, [[LoadImaged("image", ensure_channel_first=True)]], str(folder), (1.0, 1.0, 1.0))


@pytest.fixture
def files(tmp_path) -> dict[str, tuple[Path, Read]]:
    """Write one file of each kind; name them with what reads them."""
    torch.manual_seed(0)
    voxels = np.random.default_rng(0).normal(size=(20, 24, 18)).astype(np.float32)
    found: dict[str, tuple[Path, Read]] = {
        "weights": (tmp_path / "model.pt", weights),
        "weights without a SHA-256": (tmp_path / "plain.pt", weights),
        "weights in a checkpoint": (tmp_path / "checkpoint.pt", foreign),
        "scan": (save(tmp_path / "scan.nii.gz", voxels), scan),
    }
    state = network().state_dict()
    save_weights(state, tmp_path / "model.pt", {"size": "S"})
    save_checkpoint(state, tmp_path / "plain.pt")
    save_checkpoint({"epoch": 3, "model": state}, tmp_path / "checkpoint.pt")
    cached = cases(tmp_path / "cache")
    cached.prepare()
    return found | {"cached case": (cached.entries[0][0].path, case)}


def flip(file: Path, whole: bytes, place: int) -> None:
    """Put a file with one other bit in the place of `file`, which may be mapped into memory."""
    content = bytearray(whole)
    content[place // 8] ^= 1 << place % 8
    file.unlink()
    file.write_bytes(content)


def trials(file: Path, read: Read, seeds: range) -> Counter:
    """Count what becomes of bits flipped one at a time: an error, an entry made again, or nothing changed."""
    whole, expected, found = file.read_bytes(), read(file), Counter()
    for seed in seeds:
        flip(file, whole, place := int(np.random.default_rng(seed).integers(8 * len(whole))))
        damaged = file.read_bytes()
        try:
            content = read(file)
        except UserError:
            found["refused"] += 1
            continue
        assert content.keys() == expected.keys(), place
        assert all(torch.equal(content[key], expected[key]) for key in expected), place
        found["unchanged" if file.read_bytes() == damaged else "made again"] += 1
    return found


KINDS = ("weights", "weights without a SHA-256", "weights in a checkpoint", "scan", "cached case")


@pytest.mark.parametrize("kind", KINDS)
def test_ten_flipped_bits_are_noticed(kind, files):
    found = trials(*files[kind], range(FLIPS, FLIPS + 10))
    assert found["refused"] + found["made again"] >= 8


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_flipped_bits_are_noticed(kind, files):
    found = trials(*files[kind], range(FLIPS))
    print(kind, dict(found))
    assert found.total() == FLIPS
    assert found["refused"] + found["made again"] >= 0.8 * FLIPS


LOADED = {
    "inference and scoring": lambda path: check_weights(path, network()),
    "building a network by its settings": load_model_settings,
    "ensemble": lambda path: member(str(path), network()),
    "fine-tuning": lambda path: start_from(network(), path),
    "conversion": lambda path: convert_weights(str(path), str(path.with_name("new.pt"))),
}
READ = {name: load for name, load in LOADED.items() if load is not load_model_settings}


@pytest.mark.parametrize("load", LOADED.values(), ids=LOADED)
def test_weights_that_took_the_place_of_others_are_refused_with_both_hashes_and_what_to_do(load, files):
    path, before = files["weights"][0], sha256(files["weights"][0])
    load(path)
    path.with_name("new.pt").unlink(missing_ok=True)
    save_checkpoint({key: value + 1 for key, value in network().state_dict().items()}, path)
    said = (
        f"{path} has the SHA-256 {sha256(path)}, but {settings_file(path)} was written for {before}: .*or train again"
    )
    with pytest.raises(UserError, match=said):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("load", READ.values(), ids=READ)
def test_weights_that_are_not_finite_are_refused_with_the_tensor_and_what_to_do(load, value, files):
    path = files["weights"][0]
    state = network().state_dict()
    state["bottleneck.0.conv1.weight"].view(-1)[3] = value
    save_weights(state, path, {"size": "S"})
    said = f"{path} holds NaN or infinity in bottleneck.0.conv1.weight; expected finite weights: .*--learning_rate"
    with pytest.raises(UserError, match=said):
        load(path)
    assert not path.with_name("new.pt").exists()


def test_weights_without_a_sha256_say_so_once(files, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    path, read = files["weights without a SHA-256"]
    with caplog.at_level("INFO", "mednext"):
        read(path)
        read(path)
    assert [m for m in caplog.messages if str(path) in m] == [
        f"{path} has no SHA-256 in {settings_file(path)}: whether it is as it was written is not known."
    ]
