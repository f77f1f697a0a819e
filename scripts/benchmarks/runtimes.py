"""The network in other runtimes for a CPU, ONNX Runtime and OpenVINO, as modules that compute a forward pass."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}

Compiled = Callable[[torch.Tensor], torch.Tensor]


def installed(runtime: str) -> bool:
    """Tell whether all packages are here that a runtime needs."""
    return all(importlib.util.find_spec(package) for package in PACKAGES[runtime])


class Compiling(nn.Module):
    """Computes images (N, C, *space) by what a runtime makes of a network for each shape, when it first comes.

    Args:
        network: a network of stock operators.
        compiler: makes a function of images of a network and an example of them.
    """

    def __init__(self, network: nn.Module, compiler: Callable[[nn.Module, torch.Tensor], Compiled]) -> None:
        super().__init__()
        self.network, self.compiler = network.eval().requires_grad_(False), compiler
        self.compiled: dict[torch.Size, Compiled] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits of images."""
        if x.shape not in self.compiled:
            with torch.autocast("cpu", enabled=False):  # which they cannot convert
                self.compiled[x.shape] = self.compiler(self.network, x)
        return self.compiled[x.shape](x)


def onnxruntime(network: nn.Module, example: torch.Tensor) -> Compiled:
    """Export a network by torch's exporter, and compile it in ONNX Runtime."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        torch.onnx.export(network, (example,), file, dynamo=True, input_names=["image"], verbose=False)
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def openvino(precision: str) -> Callable[[nn.Module, torch.Tensor], Compiled]:
    """Return what converts and compiles a network in OpenVINO, which then computes in a precision, "f32" or "bf16"."""

    def compiler(network: nn.Module, example: torch.Tensor) -> Compiled:
        import openvino as runtime

        model = runtime.convert_model(network, example_input=example, input=[example.shape])
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = runtime.compile_model(model, "CPU", settings)
        return lambda x: torch.from_numpy(compiled(x.numpy())[0])

    return compiler
