"""Weights are recognised by whoever wrote them, and refused whole, with the reason, where they do not fit."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import torch
from monai.networks.nets.mednext import create_mednext as monai_mednext

from scripts.mednext import MedNeXt, create_mednext, create_mednext_v1
from scripts.utils.errors import UserError
from scripts.weights.checkpoints import (
    check_fits,
    check_weights,
    load_checkpoint,
    read_weights,
    to_mic_dkfz,
    to_monai,
    translate,
)


def small(**options) -> MedNeXt:
    torch.manual_seed(0)
    return MedNeXt(1, 2, 3, exp_r=2, kernel_size=3, do_res=True, do_res_up_down=True, deep_supervision=True, **options)


def nnunet_v1(state: dict, prefix: str = "") -> dict:
    """What nnU-Net v1's trainer saves after an epoch, with the types it has there."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    losses = [np.float64(0.5), np.float32(0.25)]
    return {
        "epoch": 1000,
        "state_dict": {f"{prefix}{k}": v for k, v in {**state, "dummy_tensor": torch.ones(1)}.items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": None,
        "plot_stuff": (losses, losses, [], [np.float64(0.8)]),
        "best_stuff": (np.int64(3), np.float64(-0.5), np.float64(0.8)),
        "amp_grad_scaler": torch.amp.GradScaler("cpu").state_dict(),
    }


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


WAYS = {
    "bare": (lambda state: state, "mednext"),
    "nnU-Net v1": (nnunet_v1, "mic-dkfz"),
    "nnU-Net v1, distributed": (lambda state: nnunet_v1(state, "module."), "mic-dkfz"),
    "bare original": (lambda state: {**state, "dummy_tensor": torch.ones(1)}, "mic-dkfz"),
    "compiled": (lambda state: {f"_orig_mod.{k}": v for k, v in state.items()}, "mednext"),
    "distributed and compiled": (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "mednext"),
    "stages compiled": (
        lambda state: {k.replace("enc_block_1.", "enc_block_1._orig_mod."): v for k, v in state.items()},
        "mednext",
    ),
    "Lightning": (lambda s: {"state_dict": {f"net.model.{k}": v for k, v in s.items()}, "epoch": 3}, "mednext"),
    "any other dictionary": (lambda state: {"model_state_dict": state, "optimizer": {"state": {}}}, "mednext"),
    "nnU-Net v2": (lambda state: {"network_weights": state, "current_epoch": 3}, "mednext"),
    "a training checkpoint of this bundle": (lambda state: {"model": state, "best_metric": 0.5}, "mednext"),
    "MONAI": (to_monai, "monai"),
    "MONAI's CheckpointSaver": (lambda state: {"model": to_monai(state)}, "monai"),
}


@pytest.mark.parametrize(("wrap", "expected"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", [{}, {"grn": True, "dim": "2d"}], ids=["3D", "2D with GRN"])
def test_weights_are_found_however_they_are_wrapped(wrap, expected, options, tmp_path):
    state = small(**options).state_dict()
    torch.save(wrap(state), tmp_path / "weights.model")
    weights = read_weights(tmp_path / "weights.model")
    assert_same(weights.state, state)
    assert weights.format == expected


def test_files_written_with_numpy_1_are_read(tmp_path):
    torch.save(nnunet_v1(small().state_dict()), tmp_path / "new.model")
    with zipfile.ZipFile(tmp_path / "new.model") as new, zipfile.ZipFile(tmp_path / "old.model", "w") as old:
        for entry in new.infolist():
            content = new.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(entry, content)
    assert load_checkpoint(tmp_path / "old.model")["best_stuff"] == (3, -0.5, 0.8)


def test_the_original_gets_its_dummy_tensor_and_its_dictionary():
    state = small().state_dict()
    made = to_mic_dkfz(state)
    assert list(made) == [
        "epoch", "state_dict", "optimizer_state_dict", "lr_scheduler_state_dict", "plot_stuff", "best_stuff"
    ]  # fmt: skip
    assert torch.equal(made["state_dict"].pop("dummy_tensor"), torch.tensor([1.0]))
    assert_same(made["state_dict"], state)


@pytest.mark.parametrize(("size", "ours"), [("S", "S"), ("B", "monai-B")])
def test_monai_s_and_b_give_the_same_outputs_and_go_back(size, ours):
    torch.manual_seed(0)
    twin = monai_mednext(size, 3, 1, 3, kernel_size=3, deep_supervision=True).double()
    network = create_mednext(1, 3, ours, deep_supervision=True).double()
    state, form = translate(twin.state_dict(), "weights")
    assert form == "monai"
    network.load_state_dict(state, strict=True)
    x = torch.randn(1, 1, 32, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network(x), list(twin(x)), rtol=1e-9, atol=1e-9)
    assert_same(to_monai(network.state_dict()), twin.state_dict())


@pytest.mark.parametrize("size", ["B", "M", "L"])
def test_monai_b_m_and_l_are_refused_by_the_papers_network_with_the_reason(size):
    with torch.device("meta"):
        state = translate(monai_mednext(size, 3, 1, 3, deep_supervision=True).state_dict(), "monai.pt")[0]
        paper = create_mednext_v1(1, 3, size, deep_supervision=True)
    reason = (
        f"ratio of the stage before them.*Build it with --size monai-{size}.*down_0.conv2.weight .*down_1.conv3.weight"
    )
    with pytest.raises(UserError, match=f"holds MedNeXt monai-{size}.*network is MedNeXt {size}.*{reason}"):
        check_fits(state, paper, "monai.pt")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((1, 3, "B"), "MedNeXt B, kernel 3"),
        ((1, 4, "S"), "4 classes"),
        ((2, 3, "S"), "2 channel"),
        ((1, 3, "S", 5), "kernel 5"),
    ],
    ids=["size", "classes", "channels", "kernel"],
)
def test_weights_of_another_network_are_refused_with_both_sides(arguments, found, tmp_path):
    torch.save(create_mednext_v1(*arguments, deep_supervision=True).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"{found}.*but the network is MedNeXt S, kernel 3, 1 channel.*3 classes"):
        check_weights(tmp_path / "model.pt", create_mednext_v1(1, 3, "S", deep_supervision=True))


def test_a_part_of_the_right_network_is_said_to_be_a_part():
    state = small().state_dict()
    del state["up_2.conv1.bias"]
    with pytest.raises(UserError, match=r"is not a whole MedNeXt .*that the file lacks: up_2.conv1.bias. Copy or save"):
        check_fits(state, small(), "model.pt")


def test_where_grn_alone_differs_that_is_the_reason():
    theirs, ours = small(grn=True, layout="monai"), small(grn=True)
    with pytest.raises(UserError, match="They have GRN in different down blocks"):
        check_fits(theirs.state_dict(), ours, "model.pt")


def test_every_name_without_a_partner_is_listed_whole_modules_as_one():
    network, state = small(), small().state_dict()
    for key in [key for key in state if key.startswith("out_1.")]:
        del state[key]  # a whole module
    del state["down_0.conv1.bias"]  # a part of one
    state |= {"loss.weight": torch.ones(1), "ema.decay": torch.ones(1), "ema.steps": torch.ones(1)}
    with pytest.raises(UserError) as error:
        check_fits(state, network, "model.pt")
    assert "that only the file has: ema.* (2), loss.weight; that the file lacks: down_0.conv1.bias, out_1.* (2)" in str(
        error.value
    )


@pytest.mark.parametrize("wrap", ["nnU-Net v1", "MONAI", "a training checkpoint of this bundle"])
def test_running_on_weights_of_another_form_says_how_to_convert_them(wrap, tmp_path):
    torch.save(WAYS[wrap][0](small().state_dict()), tmp_path / "other.model")
    with pytest.raises(UserError, match=r"python -m scripts convert_weights --source .*other.model --target"):
        check_weights(tmp_path / "other.model", small())


def test_a_network_of_the_users_own_is_checked_too(tmp_path):
    torch.save(torch.nn.Conv3d(1, 2, 1).state_dict(), tmp_path / "own.pt")
    check_weights(tmp_path / "own.pt", torch.nn.Conv3d(1, 2, 1))
    with pytest.raises(UserError, match="own.pt holds no MedNeXt"):
        check_weights(tmp_path / "own.pt", torch.nn.Conv3d(1, 3, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.ones(1)}, r"no MedNeXt: its first names are conv.weight"),
        ({}, "no MedNeXt: its first names are none"),
        ({f"{n}.stem.weight": torch.ones(1) for n in ("net", "ema")}, "2 networks .net.stem.weight, ema.stem.weight"),
        ({n: {"stem.weight": torch.ones(1)} for n in ("model", "ema")}, "several networks, model, ema"),
        ({"stem.weight": torch.ones(1), "epoch": 3}, "holds epoch among its weights"),
        ({"net.stem.weight": torch.ones(1), "net.a": torch.ones(1), "a": torch.ones(1)}, "3 tensors under 2 names"),
        ({0: torch.ones(1)}, "no MedNeXt: its first names are 0"),
        ([torch.ones(1)], "holds a list; expected a state dict"),
        (torch.ones(1), "holds a Tensor; expected a state dict"),
    ],
    ids=[
        "another network",
        "nothing",
        "two networks",
        "two dictionaries",
        "a number among them",
        "one name twice",
        "no names",
        "a list",
        "a tensor",
    ],
)
def test_files_without_one_mednext_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=f"weights.pt.*{message}"):
        read_weights(tmp_path / "weights.pt")


def test_missing_damaged_and_other_files_are_named(tmp_path):
    with pytest.raises(UserError, match="model.pt not found; train first"):
        load_checkpoint(tmp_path / "model.pt")
    torch.save(small().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "image.nii").write_bytes(bytes(400))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "plans.pkl").write_bytes(pickle.dumps({"plans": {1, 2}}))
    for name in ("truncated.pt", "image.nii", "empty.pt", "plans.pkl"):
        with pytest.raises(UserError, match=f"{name} is not a readable weights file"):
            load_checkpoint(tmp_path / name)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "scripted.pt")
    with pytest.raises(UserError, match="scripted.pt is a TorchScript program"):
        load_checkpoint(tmp_path / "scripted.pt")
    with pytest.raises(UserError, match="is a folder; give the file"):
        load_checkpoint(tmp_path)


def test_a_file_that_would_run_code_is_refused_with_the_class_it_wants(tmp_path):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("the file ran code",))

    torch.save({"weights": Payload()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds a _pytest.outcomes.* object, and reading that could run code"):
        load_checkpoint(tmp_path / "model.pt")
    torch.save(small(), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"holds a scripts.mednext.MedNeXt object.*save the weights alone"):
        load_checkpoint(tmp_path / "module.pt")
