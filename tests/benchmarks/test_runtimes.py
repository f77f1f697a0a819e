"""Other runtimes compute what the network computes; how fast they are is in docs/benchmarks."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmarks.runtimes import Compiling, installed, onnxruntime, openvino
from scripts.mednext import create_mednext_v1

RUNTIMES = {
    "onnxruntime": (onnxruntime, 1e-4),
    "openvino": (openvino("f32"), 1e-4),
    "openvino bf16": (openvino("bf16"), 3e-2),
}


@pytest.mark.filterwarnings("ignore")  # of exporters, about PyTorch
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_computes_the_logits_of_the_network_for_every_shape(name):
    if not installed(name.split()[0]):
        pytest.skip(f"needs {name.split()[0]}")
    compiler, tolerance = RUNTIMES[name]
    torch.manual_seed(0)
    network = create_mednext_v1(1, 3, "S", n_channels=16, kernels="reference").eval()
    other = Compiling(network, compiler)
    with torch.inference_mode():
        for edge in (32, 48):
            image = torch.randn(1, 1, 16, 16, edge)
            expected = network(image)
            assert (other(image) - expected).abs().max() < tolerance * expected.abs().max()
