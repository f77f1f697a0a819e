"""Training on a CPU in the precision that was asked for."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser

from scripts.mednext import create_mednext_v1
from scripts.training.precision import AutocastInferer
from scripts.utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gradients(precision: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Compute the logits of a small network with deep supervision, and the gradients of its weights as one vector."""
    torch.manual_seed(0)
    network = create_mednext_v1(1, 3, "S", deep_supervision=True, n_channels=16)
    logits = AutocastInferer(precision)(torch.randn(2, 1, 32, 32, 32), network)
    sum(one.square().mean() for one in logits).backward()
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    return logits, torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])


def test_bfloat16_computes_nearly_the_gradients_of_float32_in_float32():
    (exact, true), (rounded, found) = gradients("float32"), gradients("bfloat16")
    assert {one.dtype for one in [*exact, *rounded, true, found]} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(found, true, 0) > 0.999
    assert not torch.equal(found, true)
    for one, other in zip(rounded, exact, strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_network_is_called_in_the_precision_that_was_asked_for_on_a_cpu_alone(device, precision, dtype):
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append((x @ x).dtype)
        return x @ x

    found = AutocastInferer(precision)(torch.ones(2, 2, device=device), network)
    assert seen == [dtype if device == "cpu" else torch.float32]
    assert found.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_further_arguments_reach_the_network():
    found = AutocastInferer("float32")(torch.ones(1), lambda x, a, b: x + a + b, 1, b=2)
    assert found == 4


def test_another_precision_is_refused():
    with pytest.raises(UserError, match="cpu_precision is 'half'; expected one of auto, float32, bfloat16"):
        AutocastInferer("half")


@pytest.mark.parametrize("precision", DTYPES)
def test_one_setting_is_that_of_training_and_of_validation(precision):
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs/train.json"))
    parser["cpu_precision"] = precision
    for inferer in ("train#inferer", "validate#inferer"):
        assert parser.get_parsed_content(inferer).cpu_precision.name() == precision
