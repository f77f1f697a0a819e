"""The network leaves PyTorch's eager mode: script, export, compile, and ONNX through MONAI's command line."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from conftest import python_m

from scripts.mednext import MedNeXt, create_mednext_v1
from scripts.weights.checkpoints import save_checkpoint

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


def test_an_exported_network_takes_any_multiple_of_16():
    network = net(deep_supervision=True, grn=True).eval()
    sizes = {axis: 16 * torch.export.Dim(f"n{axis}", min=2, max=32) for axis in (2, 3, 4)}
    exported = torch.export.export(network, (image(1, 1, 32, 48, 64),), dynamic_shapes=(sizes,))
    operators = [node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}  # PyTorch's own
    with torch.no_grad():
        for shape in ((1, 1, 32, 48, 64), (1, 1, 48, 32, 32)):
            torch.testing.assert_close(exported.module()(image(*shape)), network(image(*shape)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", [None, "expansion", "block"])
def test_a_compiled_training_step_is_one_graph_with_the_same_gradients(style):
    network, x = net(deep_supervision=True, grn=True, checkpoint_style=style), image(1, 1, 32, 32, 16)
    # the graph that inductor compiles, without its C++ compiler
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")

    def step(of) -> list[torch.Tensor]:
        return torch.autograd.grad(sum(y.square().mean() for y in of(x)), list(network.parameters()))

    torch.testing.assert_close(step(compiled), step(network), rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


ONNX = ("--net_id", "network_def", "--config_file", "configs/inference.json", "--input_shape", "[1,1,32,32,32]")
AXES = "{'input_names': ['image'], 'output_names': ['pred'], 'dynamic_axes': {'image': {2: 'D', 3: 'H', 4: 'W'}}}"


def test_onnx_export_runs_on_any_size_with_stock_operators(tmp_path):
    torch.manual_seed(0)
    network = create_mednext_v1(1, 4, "S", deep_supervision=True)
    save_checkpoint(network.state_dict(), tmp_path / "model.pt")
    weights = tmp_path / "model.pt"
    python_m(
        "monai.bundle", "onnx_export", *ONNX, "--converter_kwargs", AXES, "--ckpt_file", weights,
        "--model_file", weights, "--filepath", tmp_path / "m.onnx",
    )  # fmt: skip
    assert {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node} == {""}  # ONNX's own operators

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for shape in ((1, 1, 32, 32, 32), (1, 1, 33, 17, 50)):
        x = image(*shape).float()
        with torch.no_grad():
            exact = network.double().eval()(x.double())
            ours = network.float()(x)
        theirs = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
        assert theirs.shape == exact.shape
        assert (theirs - exact).abs().max() <= 4 * (ours - exact).abs().max()  # both are float32 roundings of one thing
