"""The network leaves eager mode: script and compile; tests/weights/test_programs.py has the exported files."""

from __future__ import annotations

import pytest
import torch

from scripts.mednext import MedNeXt

SMALL = {"exp_r": 2, "kernel_size": 3, "block_counts": [1] * 9, "do_res": True, "do_res_up_down": True}


def net(**options) -> MedNeXt:
    torch.manual_seed(0)
    made = MedNeXt(1, 4, 3, **{**SMALL, **options}).double()
    for name, parameter in made.named_parameters():
        if "norm" in name or "grn" in name:  # zeros and ones would hide errors
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("branches", [False, True], ids=["as deployed", "with the branches of training"])
def test_a_scripted_network_computes_the_same(branches):
    options = {"deep_supervision": True, "grn": True, "checkpoint_style": "expansion"} if branches else {}
    network, x = net(**options).eval(), image(1, 1, 9, 14, 30)  # to be padded
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(x), network(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", [None, "expansion", "block"])
def test_a_compiled_training_step_is_one_graph_with_the_same_gradients(style):
    network, x = net(deep_supervision=True, grn=True, checkpoint_style=style), image(1, 1, 32, 32, 16)
    # the graph that inductor compiles, without its C++ compiler
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")

    def step(of) -> list[torch.Tensor]:
        return torch.autograd.grad(sum(y.square().mean() for y in of(x)), list(network.parameters()))

    torch.testing.assert_close(step(compiled), step(network), rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()
