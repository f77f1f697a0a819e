"""What a training step keeps is counted without computing anything."""

import pytest
import torch

from scripts.mednext import create_mednext
from scripts.planning.memory import kept_bytes


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


def test_logits_and_their_gradient_are_counted_with_every_class():
    with torch.device("meta"):
        few, many = (
            kept_bytes(create_mednext(1, n, "S", deep_supervision=False), torch.zeros(1, 1, 32, 32, 32))
            for n in (3, 143)
        )
    assert many - few == 2 * 4 * 140 * 32**3
