"""Code that was written for the original's package finds its names here, and what it relies on."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import scripts.nnunet_mednext as alias
from scripts import blocks
from scripts.weights.checkpoints import to_mic_dkfz

TINY = {"exp_r": 2, "kernel_size": 3, "block_counts": [1] * 9, "do_res": True, "do_res_up_down": True}
ARCHITECTURE = "nnunet_mednext.network_architecture.mednextv1"
IMPORTS = [
    ("nnunet_mednext", "MedNeXt"),
    ("nnunet_mednext", "create_mednext_v1"),
    ("nnunet_mednext", "MedNeXtBlock"),
    ("nnunet_mednext", "MedNeXtDownBlock"),
    ("nnunet_mednext", "MedNeXtUpBlock"),
    ("nnunet_mednext", "upkern_load_weights"),
    ("nnunet_mednext.mednextv1", "MedNeXt"),
    (f"{ARCHITECTURE}.MedNextV1", "MedNeXt"),
    (f"{ARCHITECTURE}.MedNextV1", "OutBlock"),
    (f"{ARCHITECTURE}.blocks", "MedNeXtBlock"),
    (f"{ARCHITECTURE}.blocks", "LayerNorm"),
    (f"{ARCHITECTURE}.create_mednext_v1", "create_mednext_v1"),
    (f"{ARCHITECTURE}.create_mednext_v1", "create_mednextv1_base"),
    ("nnunet_mednext.run.load_weights", "upkern_load_weights"),
]


def tiny(**options):
    torch.manual_seed(0)
    return sys.modules["nnunet_mednext"].MedNeXt(1, 4, 3, **{**TINY, **options})


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_names_are_found_by_every_way_of_importing(module, name):
    scope: dict = {}
    exec(f"from {module} import {name} as one; import {module} as m; import {module}; two = {module}.{name}", scope)
    assert scope["one"] is scope["two"] is getattr(scope["m"], name) is getattr(importlib.import_module(module), name)


def test_what_is_not_here_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="nnunet_mednext.training"):
        importlib.import_module("nnunet_mednext.training.loss_functions.dice_loss")


def test_the_original_is_not_replaced_behind_the_back_of_what_imported_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunet_mednext", ModuleType("nnunet_mednext"))
    with pytest.raises(ImportError, match="the original nnunet_mednext is imported already; import .* before it"):
        alias._register()


@pytest.mark.parametrize(("name", "size"), [("small", "S"), ("base", "B"), ("medium", "M"), ("large", "L")])
def test_factories_make_the_sizes_of_the_paper(name, size):
    made = sys.modules[f"{ARCHITECTURE}.create_mednext_v1"]
    with torch.device("meta"):
        one = getattr(made, f"create_mednextv1_{name}")(num_input_channels=1, num_classes=3, kernel_size=5, ds=True)
        other = made.create_mednext_v1(1, 3, size, 5, True)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert (one.do_ds, one.outside_block_checkpointing) == (True, size in "ML")


def test_weights_of_the_original_are_loaded_strictly():
    network = tiny()
    nn.ModuleDict({"net": tiny()}).load_state_dict(
        {f"net.{name}": value for name, value in to_mic_dkfz(network.state_dict())["state_dict"].items()}
    )
    theirs = to_mic_dkfz(network.state_dict())["state_dict"]
    network.load_state_dict(theirs)
    assert "dummy_tensor" in theirs  # which belongs to the caller


# What PyTorch Connectomics' integration of MedNeXt does with it.


def test_a_factory_is_fed_by_a_configuration():
    config = SimpleNamespace(in_channels=2, out_channels=3, size="S", kernel_size=3, deep_supervision=True)
    with torch.device("meta"):
        network = sys.modules["nnunet_mednext"].create_mednext_v1(
            num_input_channels=config.in_channels, num_classes=config.out_channels, model_id=config.size,
            kernel_size=config.kernel_size, deep_supervision=config.deep_supervision,
        )  # fmt: skip
    assert (network.stem.in_channels, network.stem.out_channels) == (2, 32)
    with pytest.raises(KeyError):
        sys.modules["nnunet_mednext"].create_mednext_v1(1, 3, "XL")


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_type": "layer"}, {"grn": True}, {"dim": "2d"}, {"do_res": False}, {"exp_r": [2] * 8 + [3]}],
    ids=str,
)
def test_a_head_of_blocks_of_one_s_own_is_built_like_the_last_block(options):
    network = tiny(**options)
    last = network.dec_block_0[0]
    kind = sys.modules["nnunet_mednext"].MedNeXtBlock
    assert isinstance(last, kind)
    read = {
        "exp_r": last.conv2.out_channels // last.conv2.in_channels, "kernel_size": last.conv1.kernel_size[0],
        "do_res": last.do_res, "norm_type": "group" if isinstance(last.norm, nn.GroupNorm) else "layer",
        "dim": last.dim, "grn": last.grn,
    }  # fmt: skip
    x = image(1, 1, *[32] * (2 if options.get("dim") == "2d" else 3))
    features = network.eval().forward_features(x)
    assert features.shape == (1, 4, *x.shape[2:])
    assert torch.equal(network.forward_output(features), network(x))
    block = kind(in_channels=4, out_channels=4, **read)
    assert {k: v.shape for k, v in block.state_dict().items()} == {k: v.shape for k, v in last.state_dict().items()}
    assert block(features).shape == features.shape


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_deep_supervision_is_a_list_of_five_in_training_and_eval(training):
    outputs = tiny(deep_supervision=True).train(training)(image(2, 1, 32, 48, 32))
    assert isinstance(outputs, list)
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 32 // n, 48 // n, 32 // n) for n in (1, 2, 4, 8, 16)]
    assert isinstance(tiny().train(training)(image(1, 1, 32, 32, 32)), torch.Tensor)


def test_checkpointing_may_be_switched_on_afterwards_and_changes_no_gradient(monkeypatch):
    calls = []
    checkpoint = blocks.checkpoint
    monkeypatch.setattr(blocks, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))

    def gradients(network) -> list[torch.Tensor]:
        return torch.autograd.grad(
            sum(y.square().mean() for y in network(image(1, 1, 32, 16, 16))), network.parameters()
        )

    plain, network = (tiny(deep_supervision=True, kernels="reference") for _ in range(2))
    assert not network.outside_block_checkpointing
    network.outside_block_checkpointing = True
    assert network.outside_block_checkpointing
    torch.testing.assert_close(gradients(network), gradients(plain))
    assert len(calls) == 17  # nine stages of one block, four down, four up


def test_upkern_starts_a_large_kernel_from_a_small_one():
    from nnunet_mednext.run.load_weights import upkern_load_weights

    small, large = tiny(deep_supervision=True), tiny(kernel_size=5, deep_supervision=True)
    assert upkern_load_weights(large, small) is large
    expected = nn.functional.interpolate(small.enc_block_0[0].conv1.weight, size=(5, 5, 5), mode="trilinear")
    assert torch.equal(large.enc_block_0[0].conv1.weight, expected)
    assert torch.equal(large.out_4.conv_out.weight, small.out_4.conv_out.weight)
