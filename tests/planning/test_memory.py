"""What a training step keeps is counted without computing anything."""

import re

import pytest
import torch
from conftest import python_m

from scripts.mednext import create_mednext
from scripts.planning import memory
from scripts.planning.memory import Network, check_memory, cpu_step_bytes, kept_bytes, step_bytes
from scripts.utils.errors import UserError


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


def test_a_step_grows_with_the_batch_and_recomputing_needs_room_for_a_block():
    patch = [64, 64, 64]
    one, two = (step_bytes(patch, Network(1, 3), n) for n in (1, 2))
    assert 1.8 * one < two < 2 * one
    whole, recomputed = (step_bytes(patch, Network(1, 3), style=style) for style in (None, "block"))
    with torch.device("meta"):
        network = create_mednext(1, 3, "S", deep_supervision=True, checkpoint_style="block")
        kept = 2 * kept_bytes(network, torch.zeros(1, 1, *patch))
    assert kept + 2 * 64**3 * 4 * (3 * 32 + 2 * 64) < recomputed < 0.5 * whole  # a block's layers, two of them wide


def test_networks_that_are_large_for_their_patch_need_their_gradients_at_the_end():
    parameters = sum(p.numel() for p in create_mednext(1, 2, "M", deep_supervision=True).parameters())
    assert cpu_step_bytes([32, 32, 32], Network(1, 2, "M"), 1, "block") >= 16 * parameters


@pytest.mark.parametrize(("size", "classes"), [("S", 2), ("S", 15)])
def test_the_prediction_is_near_what_linux_measures(size, classes):
    done = python_m(
        "scripts", "benchmark_peak", "--size", size, "--out_channels", classes, "--patch_size", "[48,48,48]",
        "--batch_size", 1, "--cpu_precision", "float32", "--steps", 2, process=True,
    )  # fmt: skip
    measured, predicted = map(float, re.findall(r"(?:measured|predicted) ([\d.]+) GB", done.stdout))
    assert predicted == pytest.approx(measured, rel=0.2)


def network(dim: str = "3d", **more) -> torch.nn.Module:
    return create_mednext(1, 3, "S", dim=dim, deep_supervision=True, **more)


class TestCheckMemory:
    """A training says before it starts what it takes of this computer's memory."""

    @pytest.mark.parametrize(("dim", "patch"), [("3d", [48, 48, 48]), ("2d", [64, 64, 1])])
    def test_a_training_on_a_cpu_says_what_it_takes(self, dim, patch, caplog, monkeypatch):
        monkeypatch.setattr(memory.logger, "propagate", True)
        with caplog.at_level("INFO", "mednext"):
            check_memory(network(dim), 1, patch, 2, "cpu", "float32")
        said = re.fullmatch(rf"2 patches of {re.escape(str(patch))} voxels in a step take about ([\d.]+) GB .* free", (
            caplog.messages[-1]))  # fmt: skip
        assert said
        if dim == "3d":
            expected = 1 + cpu_step_bytes(patch, Network(1, 3), 2, cpu_precision="float32") / 1e9
            assert float(said[1]) == pytest.approx(expected, rel=0.05)

    def test_one_that_the_computer_cannot_hold_is_refused_before_it_starts(self, monkeypatch):
        monkeypatch.setattr(memory, "total_memory", lambda: 3e9)
        check_memory(network(), 1, [48, 48, 48], 2, "cpu", "float32")
        said = r"2 patches of \[128, 128, 128\] voxels .* about \d+ GB .* has 3: give a smaller --batch_size or"
        with pytest.raises(UserError, match=said):
            check_memory(network(), 1, [128, 128, 128], 2, "cpu", "float32")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        with pytest.raises(UserError, match="2 patches"):
            check_memory(network(), 1, [48, 48, 48], 2, "cpu", "float32")

    @pytest.mark.parametrize(("device", "trained"), [("cuda", network()), ("cpu", torch.nn.Linear(1, 1))])
    def test_a_gpu_and_other_networks_pass(self, device, trained, monkeypatch):
        monkeypatch.setattr(memory, "total_memory", lambda: 1.0)
        check_memory(trained, 1, [128, 128, 128], 2, device)
