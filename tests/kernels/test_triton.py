"""The Triton kernels, on the GPU at hand, else in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from scripts.kernels import REFERENCE, TRITON
from scripts.kernels.backend import channels_last
from scripts.kernels.exactness import outputs_and_gradients

from .test_cpu import (
    CONVOLUTIONS,
    MLPS,
    assert_as_exact_as_stock,
    convolution_inputs,
    mlp_inputs,
)

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16

pytestmark = pytest.mark.skipif(TRITON.unsuitable(torch.zeros(1, 1, 1, 1, 1, device=DEVICE)) is not None,
                                reason=str(TRITON.unsuitable(torch.zeros(1, 1, 1, 1, 1, device=DEVICE))))  # fmt: skip


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_device(inputs):
    return [x.to(DEVICE) for x in inputs]


CASES = [(*kind, 3, (3, 9, 3), torch.float32) for kind in CONVOLUTIONS]  # more than a tile
CASES += [(*kind, 5, (2, 3, 2), HALF) for kind in CONVOLUTIONS]
CASES += [(1, False, 7, (1, 2, 1), HALF), (2, False, 7, (1, 2, 1), HALF), (1, True, 3, (1, 2, 3), HALF)]


@pytest.mark.parametrize(("stride", "transposed", "edge", "size", "dtype"), CASES)
def test_depthwise_convolutions_are_as_exact_as_stock(stride, transposed, edge, size, dtype):
    inputs = on_device(convolution_inputs(dtype, size, edge, channels=24, cases=2 if edge == 3 else 1))
    assert_as_exact_as_stock(lambda ops, *a: ops.depthwise(*a, stride, transposed)[0], inputs, TRITON)


@pytest.mark.parametrize(("stride", "transposed"), CONVOLUTIONS)
def test_the_moments_of_a_convolution_are_those_of_what_it_returns(stride, transposed, monkeypatch):
    triton_depthwise = pytest.importorskip("scripts.kernels.triton_depthwise")
    monkeypatch.setattr(triton_depthwise, "PARTS", 2)  # of the four of stride 1: two tiles, two walks along z
    x, weight, bias = on_device(
        convolution_inputs(torch.float32, (9, 3, 9) if stride == 1 else (2, 3, 5), 3, channels=24)
    )
    y, (mean, variance) = TRITON.depthwise(x + 100, weight, bias, stride, transposed)
    expected = torch.var_mean(y.double(), dim=(2, 3, 4), correction=0)
    torch.testing.assert_close((variance.double(), mean.double()), expected, rtol=1e-5, atol=1e-5)
    exact, _ = REFERENCE.depthwise(x.double() + 100, weight.double(), bias.double(), stride, transposed)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-3)


KINDS = [("plain", torch.float32), ("no residual", HALF), ("GRN", torch.float32), ("GRN", HALF)]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("channels", [24, 72])  # in one kernel; as matrix products
def test_mlp_is_as_exact_as_stock(kind, channels, dtype):
    run, chosen = MLPS[kind]
    inputs = on_device(chosen(mlp_inputs(dtype, (4, 6, 7), channels=channels, offset=2.0)))
    assert_as_exact_as_stock(run, inputs, TRITON)


def block(kind, made, compiled=False, kernels="triton"):
    torch.manual_seed(0)
    made = kind(24, made, 2, 3, do_res=True, grn=True).to(DEVICE)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape).to(p)
    made.kernels = kernels
    return (
        torch.compile(made, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        if compiled
        else made
    )


@pytest.mark.parametrize(("kind", "made"), [(MedNeXtBlock, 24), (MedNeXtDownBlock, 48), (MedNeXtUpBlock, 16)])
def test_blocks_are_the_same_compiled_or_not(kind, made):
    (x,) = on_device([torch.randn(1, 24, 4, 3, 2)])
    results = [
        outputs_and_gradients(lambda x, *_, net=net: net(x), [x])
        for net in (block(kind, made, kernels="reference"), block(kind, made), block(kind, made, compiled=True))
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[1], rtol=1e-5, atol=1e-5)


def test_autocast_computes_in_half_precision_and_gives_gradients_of_the_weights_own_precision():
    net = block(MedNeXtUpBlock, 16)
    (x,) = on_device([torch.randn(1, 24, 2, 2, 2)])
    with torch.autocast(DEVICE, HALF):
        y = net(x)
    y.sum().backward()
    assert y.dtype == HALF
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), net(x), rtol=0.02, atol=0.02)


def test_operators_keep_what_they_promise_to_compilers():
    """Schemas, shapes and strides without data; that they compile is seen on blocks."""
    promises = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, weight, bias = on_device(convolution_inputs(torch.float32, (2, 1, 2), 3, channels=16, cases=1))
    x, weight, bias = (t.requires_grad_() for t in (channels_last(x), weight, bias))
    torch.library.opcheck(torch.ops.mednext.depthwise, (x, weight, bias, 2, True, [3, 1, 3], True), test_utils=promises)
    torch.library.opcheck(
        torch.ops.mednext.depthwise_weight_gradient, (x.detach(), x.detach(), weight.detach(), 1), test_utils=promises
    )
    y, residual, *weights = on_device(mlp_inputs(torch.float32, (2, 1, 2), channels=16))
    mean, variance = y.mean((2, 3, 4)), y.var((2, 3, 4))
    inputs = [channels_last(y), *weights, channels_last(residual)]
    y, *rest = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.mednext.mlp, (y, mean, variance, *rest, 1e-5, False), test_utils=promises)


def test_two_runs_are_equal_to_the_bit():
    inputs = on_device(convolution_inputs(HALF, (2, 3, 9), 3, channels=24, cases=1))
    runs = [outputs_and_gradients(lambda *a: TRITON.depthwise(*a, 1, False)[0], inputs) for _ in range(2)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from scripts.blocks import MedNeXtBlock
cuda = torch.cuda.is_available()
dist.init_process_group("gloo")
torch.manual_seed(0)
block, x = MedNeXtBlock(16, 16, 2, 3), torch.randn(2, 16, 2, 3, 2)
block.kernels = "triton"
device = "cuda:0" if cuda else "cpu"
net = DistributedDataParallel(block.to(device))
net(x[[dist.get_rank()]].to(device)).square().sum().backward()
if dist.get_rank() == 0:
    torch.save([p.grad.cpu() for p in block.parameters()], sys.argv[1])
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_train_as_one_does(tmp_path):
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "run.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path / "grads.pt")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.manual_seed(0)
    alone, x = MedNeXtBlock(16, 16, 2, 3), torch.randn(2, 16, 2, 3, 2)
    (alone(x).square().sum() / 2).backward()
    made = torch.load(tmp_path / "grads.pt", weights_only=True)
    torch.testing.assert_close(made, [p.grad for p in alone.parameters()], rtol=1e-4, atol=1e-4)


def test_nothing_of_the_expanded_size_is_kept_for_the_backward_pass():
    kept, net = [], block(MedNeXtBlock, 24)
    (x,) = on_device([torch.randn(1, 24, 4, 4, 4, requires_grad=True)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        net(x).sum()
    assert kept.count(x.numel()) == 2  # the block's input and the convolution's output
    assert max(kept) == x.numel() < 48 * 4**3
