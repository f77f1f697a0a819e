"""Which weights learn, and how fast."""

from __future__ import annotations

import pytest
import torch

from scripts.mednext import create_mednext
from scripts.training.optim import DEPTHS, freeze, parameter_groups, polynomial, take_up
from scripts.utils.errors import UserError


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return create_mednext(1, 3, "S", deep_supervision=True)


def rates(epochs: int, warmup: int = 0, lr: float = 1.0) -> list[float]:
    """List the learning rate of every epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, found = polynomial(optimizer, epochs, warmup), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_schedule_is_the_published_one():
    assert rates(5, lr=1e-3) == pytest.approx([1e-3 * (1 - epoch / 5) ** 0.9 for epoch in range(5)])


def test_warm_up_rises_to_it_linearly_and_then_follows_it():
    plain, warmed = rates(10), rates(10, warmup=3)
    assert [w / p for w, p in zip(warmed, plain, strict=True)] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_without_decay_there_is_one_group_of_everything(network):
    (group,) = parameter_groups(network, 1e-3)
    assert len(group["params"]) == len(list(network.parameters()))


def test_every_depth_learns_slower_than_the_one_behind_it(network):
    groups = parameter_groups(network, 1.0, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    of = {name: rate[id(p)] for name, p in network.named_parameters()}
    assert (of["out_0.conv_out.weight"], of["out_4.conv_out.weight"]) == (1.0, 1.0)
    assert of["dec_block_0.0.conv1.weight"] == of["up_0.conv1.weight"] == 0.5
    assert of["bottleneck.0.conv1.weight"] == of["down_3.conv1.weight"] == 0.5**5
    assert of["stem.weight"] == 0.5 ** (len(DEPTHS) - 1)
    assert groups[0]["lr"] == 1.0  # the rate that is reported


def test_a_frozen_encoder_has_no_gradient_and_is_not_optimised(network):
    freeze(network, "encoder")
    still = {name.split(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
    assert still == {"stem", *(f"enc_block_{i}" for i in range(4)), *(f"down_{i}" for i in range(4))}
    (group,) = parameter_groups(network, 1e-3)
    assert len(group["params"]) == sum(p.requires_grad for p in network.parameters())
    freeze(network, None)
    assert all(p.requires_grad for p in network.parameters())


def test_what_cannot_be_is_refused(network):
    with pytest.raises(UserError, match="freeze is 'decoder'; expected encoder"):
        freeze(network, "decoder")
    with pytest.raises(UserError, match="layer_decay is 0; expected over 0"):
        parameter_groups(network, 1e-3, layer_decay=0)


def test_a_restored_schedule_goes_on_at_its_epoch_with_its_own_length():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = polynomial(optimizer, 20)
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 5})
    take_up(schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx((1 - 5 / 20) ** 0.9)
