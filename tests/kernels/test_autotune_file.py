"""The file that remembers what `kernels="auto"` measured."""

import json
from pathlib import Path

import pytest
import torch

from scripts.kernels import autotune_file

from .test_autotune import KINDS, Fake, cache, chosen, raises, said, tuner

__all__ = ["cache"]  # a fixture

NAME = "float32, k3 in place, 8 to 16 to 8 channels, training, about 4^3 voxels"
FULL = {"ratio": 0.1, "spread": 0, "milliseconds": 1, "stock_milliseconds": 1}
CONTENTS = [
    b"", b"\xff\xfe", b"{", b"[" * 100000, b"null", b"[]", b"3", b'{"blocks": []}', b'{"blocks": null}',
    *({"blocks": blocks} for blocks in ({NAME: 1}, {NAME: []}, {NAME: {"fake": None}}, {NAME: {"fake": {}}})),
    *({"blocks": {NAME: {"fake": {**FULL, "ratio": r}}}} for r in (float("nan"), float("inf"), -1, 0, "0.5", None,
                                                                   [1], 1e99, 10**400)),
    {"blocks": {NAME: {"fake": {"ratio": 0.5}}}}, {"blocks": {NAME: {"fake": {**FULL, "spread": "wide"}}}},
    {"blocks": {NAME: {"fake": {"left_out": 1}}}}, {"blocks": {"\ud800": {"x": {"left_out": "\ud800\x00\n"}}}},
    {"blocks": {NAME.replace("4^3", e): {"fake": FULL} for e in ("", "x^3", "-4^3", "9" * 5000 + "^3")}},
]  # fmt: skip


def test_what_was_measured_is_remembered(cache):
    fake = Fake()
    assert chosen(tuner(fake)) == "fake"
    runs = fake.runs
    again = tuner(fake)
    assert chosen(again) == "fake"
    assert (fake.runs, again.news) == (runs, {})
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    assert content["machine"] == autotune_file.machine(torch.device("cpu"))
    ((name, found),) = content["blocks"].items()
    assert name == "float32, k3 in place, 8 to 16 to 8 channels, training, about 4^3 voxels"
    assert found == {"fake": {"ratio": 0.5, "spread": 0.0, "milliseconds": 500.0, "stock_milliseconds": 1000.0}}
    chosen(again, block=KINDS[1])
    assert len(json.loads(file.read_text())["blocks"]) == 2  # what was known stays known


def test_another_candidate_is_measured_where_one_is_known():
    assert chosen(tuner(Fake("a", 0.5))) == "a"
    a, b = Fake("a", 0.5), Fake("b", 0.4)
    assert chosen(tuner(a, b)) == "b"
    assert a.runs == 0 < b.runs


def test_a_measurement_depends_on_the_gpu_the_versions_and_the_sources(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "__version__", "3.1")
    monkeypatch.setattr(torch.version, "cuda", "14.2")
    monkeypatch.setattr(autotune_file, "version", lambda name: f"5.3 of {name}")
    monkeypatch.setattr(autotune_file, "_sources", lambda: "abc")
    versions = {"torch": "3.1", "triton": "5.3 of triton", "cuda": "14.2", "sources": "abc"}
    assert autotune_file.machine(torch.device("cuda:1")) == {"gpu": "GPU 1", "capability": "9.0", **versions}
    assert autotune_file.machine(torch.device("cpu")) == {"gpu": "cpu", "capability": "none", **versions}


@pytest.mark.parametrize("what", ["gpu", "capability", "torch", "triton", "cuda", "sources"])
def test_another_machine_or_version_is_measured_itself(what, cache, monkeypatch):
    chosen(tuner(Fake()))
    facts = {**autotune_file.machine(torch.device("cpu")), what: "another/../\u2028one"}
    monkeypatch.setattr(autotune_file, "machine", lambda device: facts)
    fake = Fake()
    chosen(tuner(fake))
    assert fake.runs > 0
    assert len({*cache.iterdir()}) == 2


def test_the_kernels_sources_count(tmp_path, monkeypatch):
    for name in ("triton_a.py", "mlp.py", "unrelated.py"):
        (tmp_path / name).write_text("a = 1")
    monkeypatch.setattr(autotune_file, "__file__", str(tmp_path / "autotune_file.py"))
    hashes = []
    for name in ("mlp.py", "unrelated.py", "triton_a.py"):
        hashes.append(autotune_file._sources.__wrapped__())
        (tmp_path / name).write_text("a = 2")
    hashes.append(autotune_file._sources.__wrapped__())
    assert hashes[0] != hashes[1] == hashes[2] != hashes[3]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda c: str(c)[:60])
def test_any_content_of_the_file_is_survived_and_what_is_no_result_measured_again(content, cache):
    file = autotune_file.file_for(autotune_file.machine(torch.device("cpu")))
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    fake = Fake(seconds=2)
    tuned = tuner(fake)
    assert tuned.remembered(torch.device("cpu"), NAME.removesuffix("4^3 voxels"), "fake") is None
    assert chosen(tuned) is None
    assert fake.runs > 0
    assert json.loads(file.read_text())["blocks"][NAME]["fake"]["ratio"] == 2
    assert chosen(tuner(fake)) is None


@pytest.mark.parametrize("what", ["folder", "open to others", "not a folder"])
def test_without_a_file_it_is_measured_and_said(what, cache, caplog):
    if what == "folder":
        autotune_file.file_for(autotune_file.machine(torch.device("cpu"))).mkdir()
    elif what == "open to others":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        cache.write_text("")
    tuned = tuner(Fake())
    assert chosen(tuned) == chosen(tuned) == "fake"
    assert said(tuned, caplog).endswith("not remembered, since the cache cannot be written to")


def test_nothing_is_left_beside_the_file(cache, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *a, **b: raises(OSError("no space left"))(None, None))
    assert chosen(tuner(Fake())) == "fake"
    assert [*cache.iterdir()] == []
