"""The network that a set of weights belongs to, read off the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..mednext import KERNEL_SIZES, LAYOUTS, LEVELS, SIZES, MedNeXt

STAGES = (*(f"enc_block_{i}" for i in range(LEVELS)), "bottleneck", *(f"dec_block_{i}" for i in (3, 2, 1, 0)))

Shapes = Mapping[str, torch.Size]


class Architecture(NamedTuple):
    """The arguments of MedNeXt that shapes tell; residuals inside blocks and the kind of norm leave no trace in them.

    `layouts` names all rows of LAYOUTS that the down blocks follow: several where ratios do not change between stages.
    """

    in_channels: int
    n_channels: int
    n_classes: int
    exp_r: tuple[int, ...]
    enc_kernel_size: int
    dec_kernel_size: int
    deep_supervision: bool
    do_res_up_down: bool
    block_counts: tuple[int, ...]
    dim: str
    grn: bool
    layouts: tuple[str, ...]

    @classmethod
    def of(cls, shapes: Shapes) -> Architecture | None:
        """Recognise the names and shapes of a state dict, or return None where they are not those of a MedNeXt."""

        def ratio(block: str) -> int:
            hidden, width = shapes[f"{block}.conv2.weight"][:2]
            return hidden // width

        try:
            exp_r = tuple(ratio(f"{stage}.0") for stage in STAGES)
            grn = "enc_block_0.0.grn_gamma" in shapes
            down = tuple((ratio(f"down_{i}"), f"down_{i}.grn_gamma" in shapes) for i in range(LEVELS))
            return cls(
                in_channels=shapes["stem.weight"][1],
                n_channels=shapes["stem.weight"][0],
                n_classes=shapes["out_0.conv_out.weight"][1],
                exp_r=exp_r,
                enc_kernel_size=shapes["enc_block_0.0.conv1.weight"][-1],
                dec_kernel_size=shapes["bottleneck.0.conv1.weight"][-1],
                deep_supervision="out_1.conv_out.weight" in shapes,
                do_res_up_down="down_0.res_conv.weight" in shapes,
                block_counts=tuple(len({k.split(".")[1] for k in shapes if k.startswith(f"{s}.")}) for s in STAGES),
                dim=f"{len(shapes['stem.weight']) - 2}d",
                grn=grn,
                layouts=tuple(
                    name
                    for name, layout in LAYOUTS.items()
                    if down == tuple((exp_r[i + layout.ratio_from], grn and layout.grn[i]) for i in range(LEVELS))
                ),
            )
        except (KeyError, IndexError, ValueError, ZeroDivisionError):
            return None

    @property
    def kernel_size(self) -> int | None:
        """The kernel size of all blocks, or None where encoder and decoder have different ones."""
        return self.enc_kernel_size if self.enc_kernel_size == self.dec_kernel_size else None

    @property
    def size(self) -> str | None:
        """The row of SIZES that builds this network with no further option than its kernel size, or None."""
        return next((name for name in self._sizes() if bool(SIZES[name].grn) == self.grn and self._plain()), None)

    def _plain(self) -> bool:
        return self.kernel_size in KERNEL_SIZES and self.dim == "3d" and self.do_res_up_down

    def _sizes(self) -> list[str]:
        return [
            name
            for name, row in SIZES.items()
            if (row.exp_r, row.block_counts, row.n_channels) == (self.exp_r, self.block_counts, self.n_channels)
            and row.layout in self.layouts
        ]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments with which MedNeXt builds this network.

        Shapes do not tell the kind of norm, which is taken as published, nor whether the blocks of a stage have
        residuals, which is taken to be so where down and up blocks have them.

        Raises:
            ValueError: the down blocks follow no row of LAYOUTS.
        """
        if not self.layouts:
            raise ValueError(f"its down blocks follow none of the layouts {', '.join(LAYOUTS)}")
        layout = self.layouts[0]
        return {
            **{name: value for name, value in self._asdict().items() if name != "layouts"},
            "layout": layout,
            "grn": self.grn and ("sum" if layout == "v2" else True),
            "kernel_size": None,
            "do_res": self.do_res_up_down,
        }

    def __str__(self) -> str:
        sizes = self._sizes()
        kernels = (
            f"kernel {self.kernel_size}"
            if self.kernel_size
            else f"encoder kernel {self.enc_kernel_size}, decoder kernel {self.dec_kernel_size}"
        )
        parts = [
            f"MedNeXt {sizes[0] if sizes else 'of a size of its own'}",
            kernels,
            f"{self.in_channels} channel(s)",
            f"{self.n_classes} classes",
            "2D" if self.dim == "2d" else "",
            "GRN" if self.grn and not (sizes and SIZES[sizes[0]].grn) else "",
            "" if self.deep_supervision else "no coarse heads",
            "" if self.do_res_up_down else "no residuals in down and up blocks",
        ]
        return ", ".join(part for part in parts if part)


def shapes(state: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the shape of every tensor of a state dict, by its name."""
    return {key: value.shape for key, value in state.items()}


def describe(found: Shapes) -> str:
    """Say what network tensors of these shapes belong to, e.g. "MedNeXt S, kernel 3, 1 channel(s), 3 classes"."""
    return str(Architecture.of(found) or "another network than MedNeXt")


def explain(found: Shapes, wanted: Shapes) -> str:
    """Explain in a sentence how two networks differ in their layout alone; return an empty text for all others.

    Their other arguments are equal, so that no user could guess the reason from what `describe` says.
    """
    a, b = Architecture.of(found), Architecture.of(wanted)
    if not (a and b and a.layouts and b.layouts) or {*a.layouts} & {*b.layouts}:
        return ""
    if (a.exp_r, a.block_counts) != (b.exp_r, b.block_counts):
        return ""
    sources = [LAYOUTS[network.layouts[0]].ratio_from for network in (a, b)]
    if all(a.exp_r[level + sources[0]] == a.exp_r[level + sources[1]] for level in range(LEVELS)):
        return "They have GRN in different down blocks, so they compute different things. "
    fix = f" Build it with --size {a.size}." if a.size else ""
    return (
        "MONAI's own B, M and L are not the paper's: their down blocks take the expansion ratio of the stage before"
        f" them, the paper's that of the stage they lead to, so no weights fit both.{fix} "
    )


def build(architecture: Architecture) -> MedNeXt:
    """Build the network on the meta device, where it has names and shapes but takes no memory.

    Raises:
        ValueError: there is no such MedNeXt.
    """
    with torch.device("meta"):
        return MedNeXt(**architecture.arguments())
