"""The memory command tells what recomputing saves."""

import pytest
import torch

from scripts.benchmarks.memory import STYLES, kept_bytes, memory
from scripts.mednext import create_mednext


def kept(style, batch: int = 1, device: str = "meta", kernels: str = "auto") -> int:
    with torch.device(device):
        network = create_mednext(1, 3, "S", deep_supervision=True, checkpoint_style=style, kernels=kernels)
        return kept_bytes(network, torch.zeros(batch, 1, 32, 32, 32))


def test_recomputing_more_keeps_less():
    assert kept(None) > 2 * kept("expansion") > 4 * kept("block")
    assert kept("block") >= 32**3 * 32 * 4 * 4  # inputs of the four full-resolution blocks, 32 channels of float32


def test_what_is_kept_grows_with_the_batch_since_parameters_are_not_counted():
    assert kept(None, batch=2) == 2 * kept(None)


@pytest.mark.parametrize("style", [None, "expansion", "block"])
def test_counting_without_computing_gives_the_same(style):
    assert kept(style, device="meta") == kept(style, device="cpu", kernels="reference")


def test_the_kernels_of_a_cpu_keep_less_than_recomputing_the_wide_layers_does():
    assert kept(None, device="cpu") == kept("expansion", device="cpu") < 0.7 * kept("expansion")
    assert kept("block", device="cpu") < 0.55 * kept(None, device="cpu")


def test_the_table_has_a_row_for_each_way(capsys):
    memory(patch_size=(32, 32, 16), batch_size=1, repeats=1, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(STYLES)
    assert "1 x [32, 32, 16], cpu" in lines[0]
    assert all(line.endswith(" s") and "GiB" in line for line in lines[2:])
    memory(size="L", device="meta")
    assert "['block', 'block', None, None, None]" in capsys.readouterr().out
