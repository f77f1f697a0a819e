"""The convert command: foreign weights become ours, run in the bundle, and go out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import bundle, overlays, python_m
from monai.networks.nets.mednext import create_mednext as monai_mednext

from scripts.mednext import create_mednext, create_mednext_v2
from scripts.utils.errors import UserError
from scripts.utils.files import sha256
from scripts.weights.checkpoints import load_checkpoint
from scripts.weights.convert import convert_weights

from .test_checkpoints import assert_same, nnunet_v1


def command(*args: object, fails: bool = False) -> str:
    """`python -m scripts convert_weights ARGS`: what it prints, or its error."""
    done = python_m("scripts", "convert_weights", *args, fails=fails)
    return done.stderr if fails else done.stdout


@pytest.fixture
def original(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(nnunet_v1(create_mednext(1, 4, "S", 5, deep_supervision=True).state_dict()), tmp_path / "final.model")
    return tmp_path / "final.model"


def test_an_original_checkpoint_segments_a_scan_after_one_command(original, phantom_dir, tmp_path):
    said = command("--source", original, "--target", tmp_path / "models/model.pt", "--size", "S", "--kernel_size", 5)
    assert "MedNeXt S, kernel 5, 1 channel(s), 4 classes; names of MIC-DKFZ/MedNeXt" in said
    settings = json.loads((tmp_path / "models/model.json").read_text())
    assert settings == {
        "size": "S", "kernel_size": 5, "in_channels": 1, "out_channels": 4, "deep_supervision": True,
        "converted_from": "final.model", "sha256": sha256(tmp_path / "models/model.pt"),
    }  # fmt: skip
    scan = next((phantom_dir / "imagesTs").glob("*.nii.gz"))
    bundle(
        *overlays("inference"), "--dataset_dir", scan, "--ckpt_dir", tmp_path / "models",
        "--output_dir", tmp_path / "masks", "--patch_size", "[32,32,32]", "--overlap", "0.1",
    )  # fmt: skip
    assert len(list((tmp_path / "masks").glob("*_seg.nii.gz"))) == 1


@pytest.mark.parametrize("heads", [True, False], ids=["deep supervision", "no coarse heads"])
def test_weights_come_back_from_the_original_bit_for_bit(heads, original, tmp_path):
    convert_weights(original, tmp_path / "model.pt", deep_supervision=heads)
    assert json.loads((tmp_path / "model.json").read_text())["deep_supervision"] is heads
    convert_weights(tmp_path / "model.pt", tmp_path / "back.model", to="mic-dkfz")
    given = load_checkpoint(original)["state_dict"]
    expected = {k: v for k, v in given.items() if heads or not k.startswith(("out_1", "out_2", "out_3", "out_4"))}
    assert_same(load_checkpoint(tmp_path / "back.model")["state_dict"], expected)


def test_monai_s_goes_both_ways_and_monai_b_keeps_its_layout(tmp_path):
    for size in ("S", "B"):
        state = monai_mednext(size, 3, 1, 2, kernel_size=3, deep_supervision=True).state_dict()
        torch.save({"model": state}, tmp_path / f"monai_{size}.pt")
        convert_weights(tmp_path / f"monai_{size}.pt", tmp_path / f"{size}.pt")
        convert_weights(tmp_path / f"{size}.pt", tmp_path / f"back_{size}.pt", to="monai")
        assert_same(load_checkpoint(tmp_path / f"back_{size}.pt"), state)
    assert json.loads((tmp_path / "B.json").read_text())["size"] == "monai-B"
    assert json.loads((tmp_path / "S.json").read_text())["size"] == "S"


def test_a_network_without_a_row_in_the_table_is_converted_with_its_arguments_said(tmp_path, capsys):
    torch.save(create_mednext(1, 2, "S", n_channels=4, grn=True).state_dict(), tmp_path / "own.pt")
    convert_weights(tmp_path / "own.pt", tmp_path / "model.pt")
    assert "MedNeXt(**{'in_channels': 1, 'n_channels': 4" in capsys.readouterr().out
    assert (tmp_path / "model.pt").exists()
    assert not (tmp_path / "model.json").exists()


def test_a_sha256_of_weights_that_are_gone_does_not_stay(tmp_path):
    torch.save(create_mednext(1, 2, "S", n_channels=4).state_dict(), tmp_path / "own.pt")
    (tmp_path / "model.json").write_text(json.dumps({"spacing": [2, 2, 2], "sha256": "0" * 64}))
    convert_weights(tmp_path / "own.pt", tmp_path / "model.pt")
    kept = json.loads((tmp_path / "model.json").read_text())
    assert kept == {"spacing": [2, 2, 2], "sha256": sha256(tmp_path / "model.pt")}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": "B"}, "S, kernel 5.*size S instead of B"),
        ({"kernel_size": 3}, "kernel_size 5 instead of 3"),
        ({"in_channels": 4}, "in_channels 1 instead of 4"),
        ({"out_channels": 14}, "out_channels 4 instead of 14"),
        ({"to": "nnunet"}, "to is 'nnunet'; expected one of mednext, mic-dkfz, monai"),
    ],
    ids=["size", "kernel", "channels", "classes", "format"],
)
def test_what_was_not_asked_for_is_refused_and_nothing_written(asked, message, original, tmp_path):
    with pytest.raises(UserError, match=message):
        convert_weights(original, tmp_path / "model.pt", **asked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.model"]


def test_the_settings_beside_the_target_are_asked_for_and_kept(original, tmp_path):
    (tmp_path / "model.json").write_text(
        json.dumps({"kernel_size": 5, "spacing": [1.5, 1.5, 1.5], "labels": ["a"] * 4})
    )
    convert_weights(original, tmp_path / "model.pt")
    kept = json.loads((tmp_path / "model.json").read_text())
    assert (kept["spacing"], kept["size"], kept["labels"]) == ([1.5, 1.5, 1.5], "S", ["a"] * 4)
    (tmp_path / "model.json").write_text(json.dumps({"out_channels": 3}))
    (tmp_path / "model.pt").unlink()
    with pytest.raises(UserError, match="out_channels 4 instead of 3"):
        convert_weights(original, tmp_path / "model.pt")


def test_only_settings_that_outlive_the_weights_are_kept_and_labels_must_match(original, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"spacing": [2, 2, 2], "epoch": 7, "dice": 0.9, "fold": 3}))
    convert_weights(original, tmp_path / "model.pt")
    kept = json.loads((tmp_path / "model.json").read_text())
    assert kept["spacing"] == [2, 2, 2]
    assert not {"epoch", "dice", "fold"} & kept.keys()
    (tmp_path / "other.json").write_text(json.dumps({"labels": ["background", "liver"]}))
    with pytest.raises(UserError, match="4 classes for 2 labels"):
        convert_weights(original, tmp_path / "other.pt")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match="other.json holds a list; expected settings"):
        convert_weights(original, tmp_path / "other.pt")


def test_what_cannot_be_a_target_is_refused(original, tmp_path):
    with pytest.raises(UserError, match="model.json is the name of a settings file"):
        convert_weights(original, tmp_path / "model.json")
    with pytest.raises(UserError, match=r"could not be written \((File exists|Not a directory)"):
        convert_weights(original, original / "model.pt")


def test_an_even_kernel_is_no_mednext(tmp_path):
    state = create_mednext(1, 2, "S").state_dict()
    even = {k: v[..., :2, :2, :2] if k.endswith("conv1.weight") else v for k, v in state.items()}
    torch.save(even, tmp_path / "even.pt")
    with pytest.raises(UserError, match="no MedNeXt that can be built: the encoder kernel size is 2"):
        convert_weights(tmp_path / "even.pt", tmp_path / "model.pt")


def test_a_mistyped_option_stops_before_anything_is_written(original, tmp_path):
    said = command("--source", original, "--target", tmp_path / "model.pt", "--kernal_size", 5, fails=True)
    assert "kernal_size" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.model"]


def test_coarse_heads_that_are_not_there_cannot_be_asked_for(tmp_path):
    torch.save(create_mednext(1, 2, "S").state_dict(), tmp_path / "plain.pt")
    with pytest.raises(UserError, match="deep_supervision False instead of True"):
        convert_weights(tmp_path / "plain.pt", tmp_path / "model.pt", deep_supervision=True)


@pytest.mark.parametrize(
    ("made", "to", "message"),
    [
        (lambda: create_mednext(1, 2, "monai-B"), "mic-dkfz", "monai-B.*which MIC-DKFZ/MedNeXt cannot build"),
        (lambda: create_mednext_v2("B", 1, 2, n_channels=4), "mic-dkfz", "GRN.*cannot build: its down blocks"),
        (lambda: create_mednext(1, 2, "B"), "monai", "MedNeXt B.*MONAI's MedNeXt cannot build"),
        (
            lambda: create_mednext(1, 2, "S", None, enc_kernel_size=3, dec_kernel_size=5),
            "monai",
            "one kernel for all blocks",
        ),
    ],
    ids=["MONAI's layout", "v2", "the paper's B", "two kernels"],
)
def test_what_the_other_side_cannot_build_is_not_written(made, to, message, tmp_path):
    torch.save(made().state_dict(), tmp_path / "source.pt")
    with pytest.raises(UserError, match=message):
        convert_weights(tmp_path / "source.pt", tmp_path / "target.pt", to=to)
    assert not (tmp_path / "target.pt").exists()


def test_faults_are_one_sentence_on_the_command_line(original, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"mine")
    said = command("--source", original, "--target", tmp_path / "model.pt", fails=True)
    assert said == f"error: {tmp_path}/model.pt exists and is not overwritten; move it, or give another --target.\n"
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    said = command("--source", tmp_path / "model.pt", "--target", tmp_path / "new.pt", fails=True)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
