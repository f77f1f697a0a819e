"""A network with its weights as one file: it computes the same on any size, where this bundle is not to be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, python_m

from scripts.mednext import MedNeXt
from scripts.utils.errors import UserError
from scripts.weights.checkpoints import save_weights
from scripts.weights.programs import WRITERS, export_network

SETTINGS = {"labels": ["background", "Größe", "b", "c"], "spacing": [1.0, 1.0, 2.0]}
MULTIPLES = ((1, 2, 32, 48, 64), (3, 2, 48, 32, 32))  # of 16
SIZES = (*MULTIPLES, (1, 2, 33, 17, 50), (2, 2, 16, 16, 17), (1, 2, 5, 40, 1))


EXPORT = """
import sys
from scripts.weights.programs import export_network
for target in sys.argv[2:]:
    export_network(sys.argv[1], target)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a small network as every kind of program; return the folder, and what it computes in double precision."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    options = {"exp_r": 2, "kernel_size": 3, "block_counts": [1] * 9, "do_res": True, "do_res_up_down": True}
    network = MedNeXt(2, 4, 4, deep_supervision=True, **options).eval()
    for name, parameter in network.named_parameters():
        if "norm" in name:  # zeros and ones would hide errors
            parameter.data += 0.2 * torch.randn_like(parameter)
    save_weights(network.state_dict(), folder / "model.pt", SETTINGS)
    for kind in WRITERS:
        (folder / f"model{kind}").write_text("an earlier one")
    # in a process of its own: here pytest would keep the thousands of lines that torch's exporter logs
    command = [sys.executable, "-W", "ignore", "-c", EXPORT, str(folder / "model.pt")]
    subprocess.run([*command, *[str(folder / f"model{kind}") for kind in WRITERS]], cwd=ROOT, check=True)
    cases = []
    for number, size in enumerate(SIZES):
        image = torch.randn(size, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            cases.append((image, network.double()(image.double()), network.float()(image)))
    torch.save([case[:2] for case in cases], folder / "cases.pt")
    return folder, cases


def test_onnx_runtime_computes_the_same_on_any_batch_and_size_with_stock_operators(exported):
    folder, cases = exported
    model = onnx.load(folder / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}  # ONNX's own operators
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 2, "x", "y", "z"]
    for image, exact, ours in cases:
        theirs = torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])
        assert theirs.shape == exact.shape
        assert (theirs - exact).abs().max() <= 6 * (ours - exact).abs().max()  # both are float32 roundings of one thing
    assert json.loads(session.get_modelmeta().custom_metadata_map["model.json"]) == SETTINGS


ELSEWHERE = """
import json, sys, torch
try:
    import scripts
    sys.exit(f"found {scripts.__file__}")
except ModuleNotFoundError:
    pass
folder, multiples = sys.argv[1], int(sys.argv[2])
texts = [{"model.json": ""}, {"model.json": ""}]
scripted = torch.jit.load(f"{folder}/model.ts", _extra_files=texts[0])
exported = torch.export.load(f"{folder}/model.pt2", extra_files=texts[1])
for number, (image, exact) in enumerate(torch.load(f"{folder}/cases.pt")):
    for program in (scripted, exported.module())[: 1 + (number < multiples)]:
        with torch.no_grad():
            torch.testing.assert_close(program(image).double(), exact, rtol=1e-4, atol=1e-4)
print(json.dumps([json.loads(text["model.json"]) for text in texts]))
"""


def test_programs_of_torch_run_where_the_bundle_is_not_on_the_path(exported, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(exported[0]), str(len(MULTIPLES))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [SETTINGS, SETTINGS]


def test_the_command_writes_a_program(exported, tmp_path):
    target = tmp_path / "new/model.ts"
    done = python_m("scripts", "export_network", "--source", exported[0] / "model.pt", "--target", target)
    assert f"wrote {target}" in done.stdout
    assert torch.jit.load(target)(torch.zeros(1, 2, 17, 1, 1)).shape == (1, 4, 17, 1, 1)


def test_a_program_says_which_images_are_too_small(exported):
    scripted = torch.jit.load(exported[0] / "model.ts")
    with pytest.raises(Exception, match="at least one side must be over 16"):
        scripted(torch.zeros(1, 2, 16, 16, 16))


@pytest.mark.parametrize("target", ["model", "model.pth", "model.ONNX", "model.pt"])
def test_another_ending_is_refused(target, exported, tmp_path):
    with pytest.raises(UserError, match=r"expected a name that ends with one of .ts, .pt2, .onnx"):
        export_network(str(exported[0] / "model.pt"), str(tmp_path / target))
    assert not [*tmp_path.iterdir()]


def test_weights_of_no_mednext_are_refused(tmp_path):
    torch.save({"stem.weight": torch.zeros(3, 1, 1, 1, 1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt holds another network than MedNeXt"):
        export_network(str(tmp_path / "other.pt"), str(tmp_path / "model.ts"))


def test_a_missing_package_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs the package onnxscript: pip install .*onnx onnxscript|mednext-bundle"):
        export_network(str(exported[0] / "model.pt"), str(tmp_path / "model.onnx"))
    assert not [*tmp_path.iterdir()]
