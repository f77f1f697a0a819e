"""The choice of weights that learn, and how fast: frozen encoders, rates by depth, warm-up and polynomial decay."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..mednext import LEVELS
from ..utils.errors import UserError

ENCODER = ("stem.", "enc_block_", "down_")
DEPTHS = (  # in the order of the forward pass: what shares a learning rate under layer-wise decay
    ("stem.",),
    ("enc_block_0.",),
    *((f"down_{level}.", f"enc_block_{level + 1}.") for level in range(LEVELS - 1)),
    (f"down_{LEVELS - 1}.", "bottleneck."),
    *((f"up_{level}.", f"dec_block_{level}.") for level in reversed(range(LEVELS))),
    ("out_",),
)


def freeze(network: nn.Module, part: str | None) -> None:
    """Keep the weights of a part of the network as they are.

    Args:
        network: the network.
        part: "encoder" (all before the bottleneck), or None for nothing.

    Raises:
        UserError: another part.
    """
    if part not in (None, "encoder"):
        raise UserError(f"freeze is {part!r}; expected encoder, or None for nothing.")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(part is None or not name.startswith(ENCODER))


def parameter_groups(network: nn.Module, learning_rate: float, layer_decay: float = 1.0) -> list[dict]:
    """Group the weights for the optimizer: the heads learn at `learning_rate`, each depth before them slower.

    Args:
        network: the network, not wrapped for distribution.
        learning_rate: rate of the heads, and of everything if `layer_decay` is 1, which gives a single group.
        layer_decay: factor from a depth's rate to that of the depth before it, over 0 up to 1.

    Raises:
        UserError: `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}; expected over 0 and up to 1, for example --layer_decay 0.8.")
    learning = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if layer_decay == 1:
        return [{"params": [p for _, p in learning], "lr": learning_rate}]
    groups = [
        {"params": [p for name, p in learning if name.startswith(prefixes)], "lr": learning_rate * layer_decay**steps}
        for steps, prefixes in enumerate(reversed(DEPTHS))
    ]
    return [group for group in groups if group["params"]]


def polynomial(optimizer: Optimizer, epochs: int, warmup: int = 0, power: float = 0.9) -> LambdaLR:
    """Schedule rates that fall by `(1 - epoch / epochs) ** power` as published.

    Over the first `warmup` epochs they rise to it linearly. A trainer that is run again when it is through, as in
    rounds of federated learning, begins the schedule again. Source of the power: nnU-Net v1, `poly_lr`.
    """

    def factor(epoch: int) -> float:
        done = epoch % epochs
        return min(1.0, (done + 1) / (warmup + 1)) * (1 - done / epochs) ** power

    return LambdaLR(optimizer, factor)


def take_up(schedule: LambdaLR) -> None:
    """Set the rates of the epoch that a restored schedule has come to, also where it was made longer or shorter."""
    rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(schedule.last_epoch)
