import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from scripts import kernels
from scripts.blocks import MedNeXtBlock
from scripts.kernels import CPU, REFERENCE, cpu_mlp, native
from scripts.kernels.backend import Weights
from scripts.mednext import create_mednext

CONVOLUTIONS = [(1, False), (2, False), (2, True)]
SIZES = [(9, 12, 15), (1, 2, 3), (17, 4, 33), (12, 15), (2, 33)]


@pytest.fixture(params=["native", "fallback"])
def helper(request, monkeypatch):
    """Both ways of doing what oneDNN does not."""
    if request.param == "fallback":
        monkeypatch.setattr(native.Native, "suits", lambda *_: False)
    elif not native.available():
        pytest.skip("no C++ compiler here, so that only `fallback` can run")
    return request.param


def tensors(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def convolution_inputs(dtype, size, edge, channels=32, cases=2):
    x, weight, bias = tensors(dtype, (cases, channels, *size), (channels, 1, *[edge] * len(size)), (channels,))
    return x + 1, weight / edge ** (len(size) / 2), bias


def mlp_inputs(dtype, size, channels=32, made=16, offset=0.0):
    hidden = 2 * channels
    shapes = [(2, channels, *size), (2, made, *size), (channels,), (channels,), (hidden, channels), (hidden,)]
    shapes += [(made, hidden), (made,), (hidden,), (hidden,)]
    y, residual, gamma, beta, w1, b1, w2, b2, *grn = tensors(dtype, *shapes)
    return y + offset, residual, gamma, beta, w1 / channels**0.5, b1, w2 / hidden**0.5, b2, *grn


def run_mlp(ops, y, residual, *weights, over_sum=False):
    return ops.mlp(y, Weights(*weights), 1e-5, over_sum, residual)


MLPS = {
    "plain": (run_mlp, lambda inputs: inputs[:-2]),
    "no residual": (lambda ops, y, *rest: run_mlp(ops, y, None, *rest), lambda inputs: [inputs[0], *inputs[2:-2]]),
    "GRN": (run_mlp, lambda inputs: inputs),
    "GRN over the sum": (lambda *a: run_mlp(*a, over_sum=True), lambda inputs: inputs),
}


def outputs_and_gradients(operation, inputs):
    """In the precision of the inputs; the gradient that comes in is the same for all."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = operation(*inputs)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, incoming)]


def assert_as_exact_as_stock(operation, inputs, ours=CPU):
    """Root mean square errors against float64, of outputs and all gradients: at most twice those of stock PyTorch.

    The floor, for what stock computes exactly by luck, is one rounding of float32, or a hundredth of one of bfloat16.
    """
    exact = outputs_and_gradients(lambda *a: operation(REFERENCE, *a), [x.double() for x in inputs])
    stock = outputs_and_gradients(lambda *a: operation(REFERENCE, *a), inputs)
    made = outputs_and_gradients(lambda *a: operation(ours, *a), inputs)
    for number, (truth, theirs, result) in enumerate(zip(exact, stock, made, strict=True)):
        assert result.dtype == theirs.dtype
        floor = max(0.01 * torch.finfo(result.dtype).eps, torch.finfo(torch.float32).eps)
        bound = 2 * (theirs - truth).norm() + floor * truth.norm()
        assert (result - truth).norm() <= bound, f"tensor {number}: {(result - truth).norm()} > {bound}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("edge", [3, 5, 7])
@pytest.mark.parametrize(("stride", "transposed"), CONVOLUTIONS)
def test_depthwise_convolutions_are_as_exact_as_stock(helper, stride, transposed, edge, size, dtype):
    assert_as_exact_as_stock(
        lambda ops, *inputs: ops.depthwise(*inputs, stride, transposed)[0], convolution_inputs(dtype, size, edge)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("size", [(9, 12, 15), (48, 40, 33), (17, 33)])
@pytest.mark.parametrize("kind", MLPS)
def test_mlp_is_as_exact_as_stock(helper, kind, size, offset, dtype):
    run, chosen = MLPS[kind]
    assert_as_exact_as_stock(run, chosen(mlp_inputs(dtype, size, offset=offset)))


@pytest.mark.parametrize(("stride", "transposed"), CONVOLUTIONS)
@pytest.mark.parametrize("size", [(3, 2, 5), (4, 5)])
def test_gradients_of_depthwise_convolutions_are_numerical_gradients(helper, size, stride, transposed):
    inputs = [x.requires_grad_() for x in convolution_inputs(torch.float64, size, 3, channels=16)]
    assert torch.autograd.gradcheck(lambda *a: CPU.depthwise(*a, stride, transposed)[0], inputs, fast_mode=True)


@pytest.mark.parametrize("kind", MLPS)
def test_gradients_of_the_mlp_are_numerical_gradients(helper, kind, monkeypatch):
    monkeypatch.setattr(cpu_mlp, "TILE_BYTES", 2**14)  # several tiles, the last one shorter
    run, chosen = MLPS[kind]
    inputs = [x.requires_grad_() for x in chosen(mlp_inputs(torch.float64, (4, 5, 7), channels=16))]
    assert torch.autograd.gradcheck(lambda *a: run(CPU, *a), inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize(("size", "edge", "dim"), [("S", 3, "3d"), ("B", 5, "3d"), ("S", 3, "2d"), ("v2-B", 3, "3d")])
def test_the_network_is_the_same_with_all_kernels(helper, size, edge, dim):
    image = torch.randn(2, 1, *((32, 16, 17) if dim == "3d" else (40, 33)), dtype=torch.float64)
    made = []
    for name in ("reference", "auto"):
        torch.manual_seed(0)
        net = create_mednext(1, 3, size, edge, True, dim=dim, kernels=name).double()
        outputs = net(image)
        sum(y.square().sum() for y in outputs).backward()
        made.append(({**net.state_dict()}, outputs, [p.grad for p in net.parameters()]))
    assert made[0][0].keys() == made[1][0].keys()
    torch.testing.assert_close(made[1][1], made[0][1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made[1][2], made[0][2], rtol=1e-7, atol=1e-7)


def test_frozen_layers_get_no_gradients():
    block = MedNeXtBlock(16, 16, 2, 3)
    block.conv1.requires_grad_(False)
    block(torch.randn(1, 16, 6, 6, 6)).sum().backward()
    assert block.conv1.weight.grad is None
    assert block.conv2.weight.grad is not None


def test_results_do_not_depend_on_the_number_of_threads(helper):
    inputs = convolution_inputs(torch.float32, (9, 12, 15), 3)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(outputs_and_gradients(lambda *a: CPU.depthwise(*a, 2, False)[0], inputs))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


# ---- which kernels


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="kernels is 'gpu', expected one of auto, reference, cpu, triton"):
        create_mednext(1, 2, "S", kernels="gpu")


def test_what_was_asked_for_by_name_and_is_not_there_is_an_error():
    assert kernels.choose_kernels("auto", torch.zeros(1, 16, 4, 4, 4)) is CPU
    assert kernels.choose_kernels("auto", torch.zeros(1, 16, 4, 4, 4).half()) is REFERENCE
    with pytest.raises(RuntimeError, match=r"it needs float32, bfloat16 or float64 on a CPU.*auto"):
        kernels.choose_kernels("cpu", torch.zeros(1, 16, 4, 4, 4).half())
    with pytest.raises(RuntimeError, match="on meta"):
        kernels.choose_kernels("cpu", torch.zeros(1, 16, 4, 4, 4, device="meta"))
    layered = MedNeXtBlock(16, 16, 2, 3, norm_type="layer")
    layered.kernels = "cpu"
    with pytest.raises(RuntimeError, match="there is none for LayerNorm"):
        layered(torch.zeros(1, 16, 4, 4, 4))


COMPILES = """
import sys, torch
from scripts import kernels
from scripts.kernels import CPU, native
x, weight = torch.randn(1, 16, 5, 6, 7), torch.randn(16, 1, 3, 3, 3)
print(native.available(), CPU.depthwise(x, weight, torch.zeros(16), 2, True)[0].shape)
kernels.choose_kernels("cpu", x)
"""


def compiling(tmp_path, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ".", **environment}
    return subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)


def test_without_a_compiler_everything_runs_but_what_was_asked_for_by_name(tmp_path):
    done = compiling(tmp_path, PATH="", CXX="no-such-compiler")
    assert done.stdout == "False torch.Size([1, 16, 9, 11, 13])\n"
    assert 'kernels="cpu" cannot be used: no C++ compiler (CXX, g++, c++, clang++) was found' in done.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho unknown option >&2\nexit 1\n")
    broken.chmod(0o700)
    done = compiling(tmp_path, CXX=str(broken))
    assert done.stdout.startswith("False")
    assert "broken failed: unknown option" in done.stderr


@pytest.mark.skipif(not native.available(), reason="no C++ compiler here")
def test_kernels_are_compiled_once_and_kept(tmp_path):
    written = set()
    for _ in range(2):
        done = compiling(tmp_path)
        assert done.stdout.startswith("True"), done.stderr
        assert done.returncode == 0
        (library,) = (tmp_path / "mednext").iterdir()
        written.add(library.stat().st_mtime_ns)
    assert len(written) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no such permissions here")
def test_a_cache_that_others_can_write_to_is_not_trusted(tmp_path):
    (tmp_path / "mednext").mkdir()
    (tmp_path / "mednext").chmod(0o777)
    done = compiling(tmp_path)
    assert done.stdout.startswith("False")
    assert "can be written by others" in done.stderr


def test_layers_with_hooks_or_replaced_ones_are_called():
    block = MedNeXtBlock(16, 16, 2, 3)
    seen = []
    block.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block(torch.randn(1, 16, 6, 6, 6))
    assert seen == [(1, 32, 6, 6, 6)]

    class Doubled(torch.nn.Conv3d):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    doubled = MedNeXtBlock(16, 16, 2, 3)
    doubled.conv2 = Doubled(16, 32, 1)
    doubled.conv2.load_state_dict(block.conv2.state_dict())
    x = torch.randn(1, 16, 6, 6, 6)
    expected = x + doubled.conv3(F.gelu(2 * F.conv3d(doubled.norm(doubled.conv1(x)), *block.conv2.parameters())))
    torch.testing.assert_close(doubled(x), expected)


def test_autocast_computes_in_bfloat16_and_gives_gradients_of_the_weights_own_precision():
    block = MedNeXtBlock(32, 32, 2, 3)
    x = torch.randn(1, 32, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), block(x), rtol=0.02, atol=0.02)


# ---- what it costs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_no_full_copy_is_made_between_layers_whatever_the_layout_of_the_image(layout):
    net = create_mednext(2, 3, "S").eval()
    image = torch.randn(1, 2, 32, 32, 32).contiguous(memory_format=layout)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        y = net(image)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    copied = [event.input_shapes[0] for event in profiler.events() if event.name == "aten::copy_"]
    full = [shape for shape in copied if torch.Size(shape).numel() >= 32 * 32**3]
    assert len(full) <= 1, full  # the planes of zeros of the last up block


def test_nothing_of_the_expanded_size_is_kept_for_the_backward_pass():
    kept = []
    block = MedNeXtBlock(32, 32, 4, 3)
    x = torch.randn(1, 32, 16, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(x).sum()
    assert sorted(kept)[-2:] == [x.numel()] * 2  # the block's input and the convolution's output
    assert sorted(kept)[-3] < x.numel()
