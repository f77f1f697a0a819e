"""Large kernels start from small ones: what is copied, what is resized, what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from scripts.blocks import MedNeXtBlock
from scripts.mednext import MedNeXt
from scripts.utils.errors import UserError
from scripts.weights.checkpoints import to_mic_dkfz
from scripts.weights.model_settings import write_model_settings
from scripts.weights.upkern import Report, start_from, transfer, upkern_load_weights


def net(seed: int = 0, **options) -> MedNeXt:
    torch.manual_seed(seed)
    small = {"exp_r": 2, "kernel_size": 3, "block_counts": [1] * 9, "do_res": True, "do_res_up_down": True}
    return MedNeXt(1, 2, 3, **{"deep_supervision": True, **small, **options}).double()


def resized(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value if value.shape == like.shape else F.interpolate(value, size=like.shape[2:], mode="trilinear")


def copy(state: dict) -> dict:
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"kernel_size": 3}, {"kernel_size": 5}),
        ({"kernel_size": 5}, {"kernel_size": 7}),
        ({"kernel_size": 3, "dim": "2d", "grn": True}, {"kernel_size": 7, "dim": "2d", "grn": True}),
        ({"kernel_size": 3}, {"kernel_size": None, "enc_kernel_size": 3, "dec_kernel_size": 5}),
    ],
    ids=["3 to 5", "5 to 7", "3 to 7 in 2D", "the decoder alone"],
)
def test_kernels_are_resized_and_all_else_is_copied(small, large):
    source, target = net(0, **small), net(1, **large)
    report = transfer(target, source.state_dict(), "small.pt")
    mode = "bilinear" if small.get("dim") == "2d" else "trilinear"
    for key, value in source.state_dict().items():
        loaded = target.state_dict()[key]
        if value.shape == loaded.shape:
            assert torch.equal(loaded, value), key
            assert key in report.copied
        else:
            assert key.endswith("conv1.weight")
            assert torch.equal(loaded, F.interpolate(value, size=loaded.shape[2:], mode=mode)), key
            assert report.resized[key] == (value.shape, loaded.shape)
    assert len(report.resized) == (9 if "dec_kernel_size" in large else 17)  # bottleneck, four up, four decoder blocks


def test_resized_kernels_are_those_of_the_original():
    """Sums of squares after upkern_load_weights of MIC-DKFZ/MedNeXt 0b78ed8, 3 to 5 and 5 to 7, on such weights."""
    ratios = (2, 3, 4, 4, 4, 4, 4, 3, 2)
    small, middle, large = (net(exp_r=ratios, kernel_size=k) for k in (3, 5, 7))
    for n, (name, parameter) in enumerate(sorted(small.named_parameters())):
        wave = 0.4 * torch.cos(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + n)
        parameter.data = (wave + name.endswith("norm.weight")).reshape(parameter.shape)
    assert upkern_load_weights(middle, small) is middle
    upkern_load_weights(large, middle)
    expected = {
        "enc_block_0.0.conv1.weight": (13.960658933004, 34.322287428421),
        "down_1.conv1.weight": (26.032853075274, 62.198584874385),
        "bottleneck.0.conv1.weight": (226.939550858477, 561.338869596386),
        "up_2.conv1.weight": (105.250515411837, 252.614229323697),
    }
    for key, squares in expected.items():
        found = [network.state_dict()[key].square().sum().item() for network in (middle, large)]
        assert found == pytest.approx(squares, rel=1e-12)


def test_the_report_says_what_was_done():
    report = transfer(net(kernel_size=5), net().state_dict(), "k3.pt", ["out_4"])
    assert str(report) == (
        f"{len(report.copied)} tensors copied, 17 resized from kernel 3 to 5,"
        " 2 left as they were (out_4.conv_out.weight, out_4.conv_out.bias)"
    )
    assert len(report.copied) + 17 + 2 == len(net().state_dict())
    assert str(Report(["a"], {}, [])) == "1 tensors copied, none resized"


def test_a_new_head_is_left_as_it_is_where_that_is_asked_for(tmp_path):
    torch.save(to_mic_dkfz(net().float().state_dict()), tmp_path / "model_best.model")  # three classes
    torch.manual_seed(3)
    target = MedNeXt(1, 2, 7, 2, 5, deep_supervision=True, do_res=True, do_res_up_down=True, block_counts=[1] * 9)
    before = copy(target.state_dict())
    with pytest.raises(
        UserError, match=r"3 classes.*7 classes.*out_0.conv_out.weight \(\[2, 3, 1, 1, 1\] instead of \[2, 7"
    ):
        start_from(target, tmp_path / "model_best.model")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    start_from(target, tmp_path / "model_best.model", skip_heads=True)
    source = net().float().state_dict()
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("out_") else resized(source[key], value)), key


def test_one_prefix_is_a_prefix_and_an_unknown_one_is_refused():
    report = transfer(net(kernel_size=5), net().state_dict(), "k3.pt", "out_")
    assert {key.split(".")[0] for key in report.skipped} == {f"out_{level}" for level in range(5)}
    for prefix in ("head", ""):
        with pytest.raises(UserError, match=f"no tensor's name starts with '{prefix}'"):
            transfer(net(), net().state_dict(), "k3.pt", [prefix])


def test_networks_wrapped_alike_and_networks_of_the_blocks_work_as_with_the_original():
    class Wrapper(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.model = network

    small, large = Wrapper(net(0)), Wrapper(net(1, kernel_size=5))
    upkern_load_weights(large, small)
    assert torch.equal(large.model.stem.weight, small.model.stem.weight)
    small, large = (torch.nn.Sequential(MedNeXtBlock(2, 2, kernel_size=k)) for k in (3, 5))
    upkern_load_weights(large, small)
    assert torch.equal(large[0].conv2.weight, small[0].conv2.weight)


def test_a_resumed_run_does_not_start_anew_and_heads_need_a_file():
    target = net()
    start_from(target, "gone.pt", resume=True)
    with pytest.raises(UserError, match="skip_heads is True without init_weights"):
        start_from(target, None, skip_heads=True)


def test_weights_of_another_fold_are_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    torch.save(net().state_dict(), tmp_path / "model.pt")
    write_model_settings(tmp_path / "model.pt", {"fold": 1})
    for fold, warnings in ((0, 1), (1, 0), (None, 0)):
        caplog.clear()
        start_from(net(), tmp_path / "model.pt", fold=fold)
        said = [m for m in caplog.messages if f"was trained on fold 1, this is fold {fold}" in m]
        assert len(said) == warnings


def test_no_file_is_nothing_to_do():
    target = net()
    before = copy(target.state_dict())
    start_from(target, None)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exp_r": 3}, "of another shape: enc_block_0.0.conv2.weight"),
        ({"block_counts": [2] * 9}, "that only the file has: bottleneck.1..*enc_block_3.1."),
        (
            {"deep_supervision": False},
            r"that the file lacks: out_1.\* \(2\), out_2.\* \(2\), out_3.\* \(2\), out_4.\* \(2\)",
        ),
        ({"grn": True}, "that only the file has: bottleneck.0.grn_beta"),
        ({"dim": "2d"}, "2D, but .*of another shape: stem.weight"),
        ({"exp_r": (2, 3, 4, 4, 4, 4, 4, 3, 2)}, "of another shape: "),
    ],
    ids=["ratio", "blocks", "no coarse heads", "GRN", "2D into 3D", "down blocks"],
)
def test_what_does_not_fit_is_refused_and_the_network_untouched(options, message):
    target = net(1, kernel_size=5)
    before = copy(target.state_dict())
    with pytest.raises(UserError, match=message):
        upkern_load_weights(target, net(**options))
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
