"""Which precision "auto" is on a CPU: by the processor's instructions, else by pairs that agree."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.kernels import native, precision

FLAGS = "model name\t: a processor\nflags\t\t: fpu sse2 avx512f {}\n"
FAST, SLOW, BETWEEN = [0.5, 0.6, 0.55, 0.7, 0.6], [1.5, 1.0, 1.2, 0.95, 2.0], [0.7, 1.1, 0.8, 0.95, 1.3]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """Give what the pairs will measure, on a processor that says nothing of its instructions."""
    coming: list[float] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "processor", lambda: b"aarch64")
    monkeypatch.setattr(precision, "_pairs", lambda: lambda: coming.pop(0))
    yield coming
    precision.bfloat16_pays.cache_clear()


def pays() -> bool:
    precision.bfloat16_pays.cache_clear()  # as in a new process
    return precision.bfloat16_pays()


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512_bf16", True), ("amx_tile avx512_bf16", True), ("avx512_vnni", False), ("", False)]
)
def test_instructions_decide_whether_bfloat16_pays_and_nothing_is_measured(flags, expected, pairs, monkeypatch, caplog):
    monkeypatch.setattr(native, "processor", lambda: FLAGS.format(flags).encode())
    with caplog.at_level("INFO", "mednext"):
        assert pays() is expected
        assert precision.bfloat16_pays() is expected
    (said,) = caplog.messages
    assert said.startswith('cpu_precision "auto" is bfloat16' if expected else 'cpu_precision "auto" is float32')


@pytest.mark.parametrize(("ratios", "expected"), [(FAST, True), (SLOW, False), (BETWEEN + [0.5] * 20, True)])
def test_where_instructions_are_unknown_pairs_are_measured_until_they_agree(ratios, expected, pairs, tmp_path, caplog):
    pairs += ratios
    with caplog.at_level("INFO", "mednext"):
        assert pays() is expected
    used = ratios[: len(ratios) - len(pairs)]
    (file,) = (tmp_path / "mednext").glob("bfloat16-*.json")
    assert json.loads(file.read_text()) == {"ratios": used}
    assert f"in {len(used)} pairs" in caplog.text
    pairs[:] = used[:1]
    assert pays() is expected  # remembered, after one pair that agrees


def test_pairs_that_never_agree_are_float32_and_not_remembered(pairs, tmp_path, caplog):
    pairs += BETWEEN * 20
    with caplog.at_level("INFO", "mednext"):
        assert pays() is False
    assert len(BETWEEN) * 20 - len(pairs) == precision.MOST_PAIRS
    assert "undecided" in caplog.text
    assert not [*(tmp_path / "mednext").iterdir()]
    pairs[:] = FAST
    assert pays() is True  # measured again


def test_a_remembered_measurement_that_is_contradicted_is_made_again(pairs, tmp_path):
    pairs += SLOW  # beside other work
    assert pays() is False
    pairs[:] = [0.5, *FAST]
    assert pays() is True
    (file,) = (tmp_path / "mednext").glob("bfloat16-*.json")
    assert json.loads(file.read_text()) == {"ratios": FAST}
    pairs[:] = [1.5, *FAST]  # the pair was the one that erred
    assert pays() is True


@pytest.mark.parametrize(
    "damaged", ["", "True", "[]", '{"ratios": 1}', '{"ratios": ["a", "b", "c", "d", "e"]}', '{"ratios": [0.5]}', "\0"]
)
def test_a_damaged_measurement_is_made_again(damaged, pairs, tmp_path):
    pairs += FAST
    assert pays() is True
    (file,) = (tmp_path / "mednext").glob("bfloat16-*.json")
    file.write_text(damaged)
    pairs[:] = SLOW
    assert pays() is False


def test_a_measurement_is_of_a_processor_and_a_version(pairs, monkeypatch):
    pairs += FAST
    assert pays() is True
    for name, module, value in (("processor", native, lambda: b"riscv"), ("__version__", torch, "3.0")):
        monkeypatch.setattr(module, name, value)
        pairs[:] = SLOW
        assert pays() is False
        assert not pairs


def test_without_a_folder_of_its_own_it_is_measured_every_time(pairs, tmp_path, monkeypatch):
    def refuses() -> None:
        raise OSError

    monkeypatch.setattr(native, "cache", refuses)
    for ratios, expected in ((FAST, True), (SLOW, False)):
        pairs[:] = ratios
        assert pays() is expected


def test_a_pair_is_a_ratio_and_draws_no_numbers():
    before = torch.get_rng_state()
    assert precision._pairs()() > 0
    assert torch.equal(torch.get_rng_state(), before)
