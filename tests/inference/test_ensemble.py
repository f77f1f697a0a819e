"""Several networks are one whose probabilities are the mean of theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from scripts.inference.ensemble import Ensemble, expand, first, join
from scripts.inference.sliding_window import SlidingWindowInferer
from scripts.mednext import create_mednext
from scripts.utils.errors import UserError
from scripts.weights import model_settings as settings

PANEL = {"labels": ["background", "organ", "tumour"], "label_values": [0, 1, 2], "patch_size": [32, 32, 32], "fold": 0}


def save(path: Path, seed: int, kernel_size: int = 3, classes: int = 3, size: str = "S", **changes) -> str:
    """Write a weights file with its settings and return its path."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(create_mednext(1, classes, size, kernel_size, True).state_dict(), path)
    settings.write(path, {**PANEL, "size": size, "kernel_size": kernel_size, **changes})
    return str(path)


def network(file: str, kernel_size: int = 3) -> torch.nn.Module:
    loaded = create_mednext(1, 3, "S", kernel_size, True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded.eval()


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three members, the last with another kernel."""
    return [save(tmp_path / f"fold_{n}/model.pt", seed=n, kernel_size=5 if n == 2 else 3) for n in range(3)]


class TestEnsemble:
    """Logits of the mean of probabilities."""

    @pytest.mark.parametrize(
        ("activation", "activate"), [("softmax", lambda x: torch.softmax(x, 1)), ("sigmoid", torch.sigmoid)]
    )
    def test_its_probabilities_are_the_mean_of_the_members(self, activation, activate):
        members = [torch.nn.Conv3d(1, 3, 1) for _ in range(4)]
        x = torch.randn(2, 1, 4, 5, 6) * 20  # saturated in places
        found = activate(Ensemble(members, activation)(x))
        expected = torch.stack([activate(member(x)) for member in members]).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
    def test_its_logits_are_finite_where_all_members_are_certain(self, activation):
        members = [torch.nn.Conv3d(1, 2, 1) for _ in range(2)]
        assert Ensemble(members, activation)(torch.full((1, 1, 2, 2, 2), 1e6)).isfinite().all()

    def test_half_precision_members_are_averaged_in_the_precision_of_the_image(self):
        half = torch.nn.Module()
        half.forward = lambda x: torch.cat([x, x + 1e-2], 1).half()
        assert Ensemble([half, half], "softmax")(torch.zeros(1, 1, 2, 2, 2)).dtype == torch.float32


class TestJoin:
    """Members are built from their files."""

    def test_without_further_weights_it_is_the_network_itself(self, files):
        one = network(files[0])
        assert join(one, files[0], [], "softmax") is one
        assert join(one, files[0], files[0], "softmax") is one

    def test_folds_and_kernels_are_averaged_window_by_window(self, files, tmp_path):
        scan = torch.randn(1, 1, 40, 16, 16)
        inferer = SlidingWindowInferer((32, 16, 16), activation="softmax", mirror_axes=[0])
        with torch.inference_mode():
            joined = join(network(files[0]), files[0], str(tmp_path / "fold_*/model.pt"), "softmax").eval()
            each = [inferer(scan, network(file, kernel)) for file, kernel in zip(files, (3, 3, 5), strict=True)]
            torch.testing.assert_close(inferer(scan, joined), torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
        assert len(joined.members) == 3

    def test_weights_that_are_loaded_later_are_those_of_the_first_member(self, files):
        one = create_mednext(1, 3, "S", 3, True)
        joined = join(one, files[0], files[1:], "softmax")
        one.load_state_dict(torch.load(files[0], weights_only=True))
        assert torch.equal(joined.members[0].stem.weight, network(files[0]).stem.weight)
        assert torch.equal(joined.members[1].stem.weight, network(files[1]).stem.weight)

    def test_networks_other_than_mednext_are_averaged_too(self, tmp_path):
        members = [torch.nn.Conv3d(1, 3, 1) for _ in range(2)]
        for number, member in enumerate(members):
            torch.save(member.state_dict(), tmp_path / f"{number}.pt")
        joined = join(members[0], str(tmp_path / "0.pt"), [str(tmp_path / "1.pt")], "softmax")
        assert torch.equal(joined.members[1].weight, members[1].weight)


class TestWhatCannotBeAveraged:
    """One sentence with both files and both values."""

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("labels", ["background", "organ"], r"\['background', 'organ'\] .* \['background', 'organ', 'tumour'\]"),
            ("label_values", [0, 1, 4], r"\[0, 1, 4\] .* \[0, 1, 2\]"),
            ("patch_size", [48, 48, 48], r"\[48, 48, 48\] .* \[32, 32, 32\]"),
        ],
    )
    def test_settings_that_differ_are_named(self, name, value, said, files, tmp_path):
        other = save(tmp_path / "other.pt", seed=9, **{name: value})
        with pytest.raises(UserError, match=f"{re.escape(other)} and {re.escape(files[0])} .* {name} is {said}"):
            join(network(files[0]), files[0], [files[1], other], "softmax")

    def test_settings_that_only_one_of_them_names_are_no_difference(self, files, tmp_path):
        settings.write(files[0], {"crop_to_nonzero": False, **PANEL})
        settings.settings_file(files[1]).unlink()
        assert len(join(network(files[0]), files[0], files[1], "softmax").members) == 2

    def test_other_classes_in_the_weights_alone_are_named(self, files, tmp_path):
        other = save(tmp_path / "other.pt", seed=9, classes=5)
        with pytest.raises(UserError, match=r"other.pt holds MedNeXt S.* 5 classes, but the network is .* 3 classes"):
            join(network(files[0]), files[0], [other], "softmax")

    def test_a_training_checkpoint_is_not_taken_for_weights(self, files, tmp_path):
        torch.save({"model": network(files[1]).state_dict()}, tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match="checkpoint.pt is not a plain state dict of this bundle; convert it first"):
            join(network(files[0]), files[0], [str(tmp_path / "checkpoint.pt")], "softmax")

    def test_a_member_that_has_seen_the_cases_that_are_scored_is_refused(self, files, tmp_path):
        other = save(tmp_path / "other.pt", seed=9, fold=1)
        with pytest.raises(UserError, match=r"other.pt was trained on fold 1, .* cases of fold 0, which is scored"):
            join(network(files[0]), files[0], [files[1], other], "softmax", fold=0)
        with pytest.raises(UserError, match=r"fold_0/model.pt was trained on fold 0, .* cases of fold 1"):
            join(network(files[0]), files[0], [], "softmax", fold=1)
        assert len(join(network(files[0]), files[0], [files[1], other], "softmax", fold="all").members) == 3
        assert len(join(network(files[0]), files[0], [files[1]], "softmax", fold=0).members) == 2


class TestFiles:
    """What the control panel's `ensemble` may be."""

    def test_patterns_and_lists_are_files_in_order_and_each_once(self, files, tmp_path):
        pattern = str(tmp_path / "fold_*/model.pt")
        assert expand(pattern) == files
        assert expand([files[2], pattern]) == [files[2], *files[:2]]
        assert expand(files[1]) == [files[1]]
        assert (first(pattern), first([])) == (files[0], None)

    def test_a_name_with_a_pattern_in_it_may_be_a_file(self, tmp_path):
        file = save(tmp_path / "run [1]/model.pt", seed=0)
        assert expand(file) == [file]

    def test_a_pattern_without_a_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"no file is called .*fold_\*/model.pt, which ensemble names"):
            expand([str(tmp_path / "fold_*/model.pt")])
