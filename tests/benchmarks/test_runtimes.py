"""Other runtimes compute what the network computes; how fast they are is in docs/benchmarks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.benchmarks.runtimes import installed

RUNTIMES = {
    "onnxruntime": ("onnxruntime", 1e-4),
    "openvino": ("openvino('f32')", 1e-4),
    "bf16": ("openvino('bf16')", 3e-2),
}
CODE = """
import torch
from scripts.benchmarks.runtimes import Compiling, onnxruntime, openvino
from scripts.mednext import create_mednext_v1
torch.manual_seed(0)
network = create_mednext_v1(1, 3, "S", deep_supervision=True, n_channels=16, kernels="reference").eval()
other = Compiling(network, COMPILER)
with torch.no_grad():
    for edge in (32, 48):
        image = torch.randn(1, 1, 16, 16, edge)
        print('error', float((other(image) - network(image)).abs().max() / network(image).abs().max()))
"""


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_computes_the_logits_of_the_network_for_every_shape(name):
    compiler, tolerance = RUNTIMES[name]
    if not installed(compiler.split("(")[0]):
        pytest.skip(f"needs {compiler.split('(')[0]}")
    code = CODE.replace("COMPILER", compiler)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("error ")]
    assert len(errors) == 2
    assert max(errors) < tolerance
