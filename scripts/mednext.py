"""MedNeXt: the ConvNeXt for 3D medical image segmentation (Roy et al., MICCAI 2023, arXiv 2303.09975).

The network of the paper, weight for weight: parameter names, shapes and arithmetic are those of
https://github.com/MIC-DKFZ/MedNeXt (Apache-2.0), without its unused `dummy_tensor`. Written from the paper's figure 1
and checked against two independent implementations. What differs on purpose:

- any input size works: it is padded to a multiple of 16 and the outputs are cropped (nothing happens where it fits);
- the deep-supervision outputs are returned in training mode only; in eval mode there is one full-resolution tensor;
- checkpointing is non-reentrant, and the whole module can be scripted.

Shape suffixes: N batch, C channels, D H W space (no D in 2D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import CONV, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, OutBlock, exporting, pointwise
from .kernels import TUNER, check_kernels

LEVELS = 4  # moves down, hence the multiple of 2**4 voxels
STAGES = 2 * LEVELS + 1  # four encoder stages, bottleneck, four decoder stages
KERNEL_SIZES = (3, 5, 7)

Block = TypeVar("Block", MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock)


class Layout(NamedTuple):
    """How the four down blocks are made, the one thing in which MedNeXts differ."""

    ratio_from: int  # where a block's ratio comes from: 0 the stage before it, 1 the stage it leads to
    grn: tuple[bool, bool, bool, bool]  # which blocks have GRN where the others have it


LAYOUTS = {
    "paper": Layout(1, (False, True, True, True)),  # MIC-DKFZ/MedNeXt, whose down_0 lacks GRN
    "v2": Layout(1, (True, True, True, True)),
    "monai": Layout(0, (False, False, False, False)),  # monai.networks.nets.MedNeXt
}


class Size(NamedTuple):
    """One row of the paper's table 1: per stage (4 encoder, bottleneck, 4 decoder) expansion ratio and block count."""

    exp_r: tuple[int, ...]
    block_counts: tuple[int, ...]
    checkpoint_style: str | None = None
    n_channels: int = 32
    layout: str = "paper"
    grn: bool | str = False


_B_RATIOS, _M_BLOCKS, _L = (2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3)
SIZES = {  # parameters at kernel 3 | 5, one input channel, three classes, no deep supervision
    "S": Size((2,) * 9, (2,) * 9),  # 5.55 M | 5.98 M
    "B": Size(_B_RATIOS, (2,) * 9),  # 10.5 M | 11.0 M
    "M": Size(_B_RATIOS, _M_BLOCKS, "outside_block"),  # 17.5 M | 18.3 M
    "L": Size(_L, _L, "outside_block"),  # 61.8 M | 63.0 M
    "v2-B": Size(_L, _L, "outside_block", layout="v2", grn="sum"),  # 62.0 M
    "v2-W": Size(_L, _L, "outside_block", 64, layout="v2", grn="sum"),  # 247 M
    "monai-B": Size(_B_RATIOS, (2,) * 9, layout="monai"),  # MONAI's S is the paper's
    "monai-M": Size(_B_RATIOS, _M_BLOCKS, "outside_block", layout="monai"),
    "monai-L": Size(_L, _L, "outside_block", layout="monai"),
}


class MedNeXt(nn.Module):
    """U-shape of MedNeXt blocks; five resolutions, `n_channels * 2**level` channels, skips are additions.

    Args:
        in_channels: channels of the image.
        n_channels: width at full resolution (32 in the paper).
        n_classes: channels of the output, background included.
        exp_r: expansion ratio, one for all or nine (4 encoder stages, bottleneck, 4 decoder stages).
        kernel_size: depthwise kernel of encoder and decoder; where it is given, the next two are ignored.
        enc_kernel_size: kernel of encoder and down blocks (with `kernel_size=None`).
        dec_kernel_size: kernel of bottleneck, up and decoder blocks (with `kernel_size=None`).
        deep_supervision: add heads at the four coarser resolutions.
        do_res: residual connection in the blocks.
        do_res_up_down: residual connection in down and up blocks.
        checkpoint_style: what the backward pass computes again instead of keeping it (less memory, slower): None
            nothing, "expansion" the wide layers of every block, "block" (or the original's name, "outside_block") whole
            blocks. Five values choose for each resolution, full one first; a down or up block counts by its output.
        block_counts: blocks in each of the nine stages.
        norm_type: "group" or "layer".
        dim: "2d" or "3d".
        grn: Global Response Normalisation, False, True (or "mean") or "sum", see MedNeXtBlock.
        layout: "paper", "monai" or "v2", the rows of `LAYOUTS`. With grn, "paper" has it everywhere but in `down_0`.
        kernels: what computes it, one of `kernels.KERNELS`: "auto" the fastest that can, "reference" stock PyTorch; any
            other by name, and an error where it cannot. All have the same parameters and, to rounding, the same result.

    Input (N, in_channels, [D,] H, W), any size with at least one side over 16 voxels (any at all with "layer" norm).
    Output: in eval mode (N, n_classes, [D,] H, W); in training mode with deep supervision the list of five logits at 1,
    1/2, .. 1/16 of the resolution (sides rounded up), finest first.

    Raises:
        ValueError: an option is out of its range, or the input is too small.
    """

    def __init__(
        self,
        in_channels: int,
        n_channels: int,
        n_classes: int,
        exp_r: int | Sequence[int] = 4,
        kernel_size: int | None = 7,
        enc_kernel_size: int | None = None,
        dec_kernel_size: int | None = None,
        deep_supervision: bool = False,
        do_res: bool = False,
        do_res_up_down: bool = False,
        checkpoint_style: str | Sequence[str | None] | None = None,
        block_counts: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        norm_type: str = "group",
        dim: str = "3d",
        grn: bool | str = False,
        layout: str = "paper",
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        make = _Parts(
            n_channels=n_channels,
            n_classes=n_classes,
            ratios=[exp_r] * STAGES if isinstance(exp_r, int) else list(exp_r),
            block_counts=block_counts,
            enc_kernel=_odd("encoder", enc_kernel_size if kernel_size is None else kernel_size),
            dec_kernel=_odd("decoder", dec_kernel_size if kernel_size is None else kernel_size),
            checkpoint_styles=_checkpoint_styles(checkpoint_style),
            do_res=do_res,
            do_res_up_down=do_res_up_down,
            norm_type=norm_type,
            dim=dim,
            grn=grn,
            layout=layout,
            kernels=check_kernels(kernels),
        )
        self.axes = 2 if dim == "2d" else 3
        self.do_ds = deep_supervision
        self.coarse_in_eval = False
        self.kernels = kernels
        self.norms_over_space = norm_type == "group"
        self.step = 2**LEVELS  # sides are padded to a multiple of it

        self.stem = CONV[dim](in_channels, n_channels, kernel_size=1)
        self.enc_block_0, self.down_0 = make.encoder(0), make.down(0)
        self.enc_block_1, self.down_1 = make.encoder(1), make.down(1)
        self.enc_block_2, self.down_2 = make.encoder(2), make.down(2)
        self.enc_block_3, self.down_3 = make.encoder(3), make.down(3)
        self.bottleneck = make.decoder(4)
        self.up_3, self.dec_block_3 = make.up(3), make.decoder(3)
        self.up_2, self.dec_block_2 = make.up(2), make.decoder(2)
        self.up_1, self.dec_block_1 = make.up(1), make.decoder(1)
        self.up_0, self.dec_block_0 = make.up(0), make.decoder(0)
        self.out_0 = make.head(0)
        self.out_1 = make.head(1) if deep_supervision else nn.Identity()
        self.out_2 = make.head(2) if deep_supervision else nn.Identity()
        self.out_3 = make.head(3) if deep_supervision else nn.Identity()
        self.out_4 = make.head(4) if deep_supervision else nn.Identity()

    def forward(self, x: torch.Tensor):  # a tensor, or the list of five in training with deep supervision
        size = list(x.shape[2:])
        step = self.step
        if len(size) != self.axes:
            raise ValueError(
                f"the input has {len(size)} spatial axes, the network {self.axes}; expected (N, C, *space)."
            )
        if self.norms_over_space and max(size) <= step:
            raise ValueError(
                f"the input has {size} voxels; at least one side must be over {step},"
                " or the coarsest level is one voxel, which its norm would set to zero. Pad it or use larger patches."
            )
        missing = [(n + step - 1) // step * step - n for n in size]
        if exporting() or max(missing) > 0:  # an exported graph has no branches: it always pads
            pad: list[int] = []
            for m in missing:  # F.pad counts axes from the last one
                pad = [0, m] + pad  # noqa: RUF005 (scripted)
            x = F.pad(x, pad)

        # without gradients memory is free as soon as nothing has its name: levels of the encoder give theirs away
        x0 = self.stem(x) if torch.jit.is_scripting() else pointwise(self.stem, x, self.kernels)  # (N, C, D, H, W)
        x0 = self.enc_block_0(x0)
        x1 = self.enc_block_1(self.down_0(x0))  # (N, 2C, D/2, H/2, W/2)
        x2 = self.enc_block_2(self.down_1(x1))
        x3 = self.enc_block_3(self.down_2(x2))
        y4 = self.bottleneck(self.down_3(x3))  # (N, 16C, D/16, H/16, W/16)
        x3 = self.up_3(y4) + x3
        y3 = self.dec_block_3(x3)
        x2 = self.up_2(y3) + x2
        y2 = self.dec_block_2(x2)
        x1 = self.up_1(y2) + x1
        y1 = self.dec_block_1(x1)
        x0 = self.up_0(y1) + x0
        x0 = self.dec_block_0(x0)  # (N, C, D, H, W)

        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            TUNER.say()
        logits = crop(self.out_0(x0), size)  # (N, n_classes, D, H, W)
        if not torch.jit.is_scripting() and self.do_ds and (self.training or self.coarse_in_eval):
            coarse = (self.out_1(y1), self.out_2(y2), self.out_3(y3), self.out_4(y4))
            sizes = ([-(-n // 2**level) for n in size] for level in range(1, LEVELS + 1))
            return [logits] + [crop(y, s) for y, s in zip(coarse, sizes, strict=True)]
        return logits


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Makes the parts of a network; the level of a part is that of its output, 0 at full resolution.

    Raises:
        ValueError: an option is out of its range.
    """

    n_channels: int
    n_classes: int
    ratios: Sequence[int]  # of the nine stages, as the next
    block_counts: Sequence[int]
    enc_kernel: int
    dec_kernel: int
    checkpoint_styles: Sequence[str | None]  # of the five levels
    do_res: bool
    do_res_up_down: bool
    norm_type: str
    dim: str
    grn: bool | str
    layout: str
    kernels: str

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}.")
        if len(self.ratios) != STAGES or len(self.block_counts) != STAGES:
            raise ValueError(
                f"exp_r and block_counts need {STAGES} entries, got {len(self.ratios)} and {len(self.block_counts)}."
            )
        if self.dim not in CONV:
            raise ValueError(f"dim is {self.dim!r}, expected '2d' or '3d'.")

    def encoder(self, level: int) -> nn.Sequential:
        """Make the stage on the way down."""
        return self._stage(level, level, self.enc_kernel)

    def decoder(self, level: int) -> nn.Sequential:
        """Make the stage on the way up, the lowest of which is the bottleneck."""
        return self._stage(STAGES - 1 - level, level, self.dec_kernel)

    def down(self, level: int) -> MedNeXtDownBlock:
        """Make the block that leads down from this level."""
        ratio_from, has_grn = LAYOUTS[self.layout]
        channels, ratio = self.n_channels * 2**level, self.ratios[level + ratio_from]
        block = MedNeXtDownBlock(
            channels, 2 * channels, ratio, self.enc_kernel, self.do_res_up_down, self.norm_type, self.dim,
            grn=has_grn[level] and self.grn,
        )  # fmt: skip
        return self._set(block, level + 1)

    def up(self, level: int) -> MedNeXtUpBlock:
        """Make the block that leads up to this level."""
        channels, ratio = self.n_channels * 2**level, self.ratios[STAGES - 1 - level]
        block = MedNeXtUpBlock(
            2 * channels, channels, ratio, self.dec_kernel, self.do_res_up_down, self.norm_type, self.dim, self.grn
        )
        return self._set(block, level)

    def head(self, level: int) -> OutBlock:
        """Make the head."""
        block = OutBlock(self.n_channels * 2**level, self.n_classes, self.dim)
        block.kernels = self.kernels
        return block

    def _stage(self, index: int, level: int, kernel_size: int) -> nn.Sequential:
        channels = self.n_channels * 2**level
        blocks = (
            MedNeXtBlock(
                channels,
                channels,
                self.ratios[index],
                kernel_size,
                self.do_res,
                self.norm_type,
                None,
                self.dim,
                self.grn,
            )
            for _ in range(self.block_counts[index])
        )
        return nn.Sequential(*(self._set(block, level) for block in blocks))

    def _set(self, block: Block, level: int) -> Block:
        block.checkpoint_style, block.kernels = self.checkpoint_styles[level], self.kernels
        return block


def crop(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Keep the first so many voxels of each spatial axis."""
    for axis, n in enumerate(size):
        x = x.narrow(axis + 2, 0, n)
    return x


def _odd(half: str, kernel_size: int | None) -> int:
    """Return the kernel size of encoder or decoder.

    Raises:
        ValueError: it is even or missing.
    """
    if kernel_size is None or kernel_size % 2 == 0:
        raise ValueError(f"the {half} kernel size is {kernel_size}, expected an odd number.")
    return kernel_size


def _checkpoint_styles(style: str | Sequence[str | None] | None) -> list[str | None]:
    """Return one of None, "expansion", "block" for each resolution.

    Raises:
        ValueError: `style` is none of its values.
    """
    styles = [style] * (LEVELS + 1) if style is None or isinstance(style, str) else list(style)
    if len(styles) != LEVELS + 1 or not {*styles} <= {None, "expansion", "block", "outside_block"}:
        raise ValueError(
            f"checkpoint_style is {style!r}, expected None, 'expansion', 'block' or 'outside_block', or {LEVELS + 1} of"
            " these, one a resolution."
        )
    return ["block" if s == "outside_block" else s for s in styles]


def create_mednext(
    num_input_channels: int,
    num_classes: int,
    model_id: str,
    kernel_size: int | None = 3,
    deep_supervision: bool = False,
    **options,
) -> MedNeXt:
    """Build any row of `SIZES` by its name.

    Args:
        num_input_channels: channels of the image.
        num_classes: channels of the output, background included.
        model_id: a row of `SIZES`, for example "S" or "v2-B".
        kernel_size: 3, 5 or 7 (the paper trains 3 and 5), or None with `enc_kernel_size` and `dec_kernel_size`.
        deep_supervision: add the four coarser heads.
        options: any other argument of MedNeXt, overriding the row of the table.

    Raises:
        ValueError: unknown `model_id` or `kernel_size`, or an option that `kernel_size` would silently override.
    """
    if model_id not in SIZES:
        raise ValueError(f"model_id is {model_id!r}, expected one of {', '.join(SIZES)}.")
    if kernel_size is not None and {"enc_kernel_size", "dec_kernel_size"} & set(options):
        raise ValueError(
            f"kernel_size {kernel_size} would override enc_kernel_size and dec_kernel_size; give it as None."
        )
    if kernel_size not in (*KERNEL_SIZES, None):
        raise ValueError(f"kernel_size is {kernel_size!r}, expected one of {', '.join(map(str, KERNEL_SIZES))}.")
    arguments = {
        "kernel_size": kernel_size,
        "deep_supervision": deep_supervision,
        "do_res": True,
        "do_res_up_down": True,
        **SIZES[model_id]._asdict(),
        **options,
    }
    return MedNeXt(in_channels=num_input_channels, n_classes=num_classes, **arguments)


def create_mednext_v1(
    num_input_channels: int,
    num_classes: int,
    model_id: str,
    kernel_size: int | None = 3,
    deep_supervision: bool = False,
    **options,
) -> MedNeXt:
    """Build the paper's network "S", "B", "M" or "L", with the signature of the original; see `create_mednext`.

    With `grn=True` it has GRN where the original has it, and with `layout="monai"` MONAI's down blocks.
    """
    if model_id not in ("S", "B", "M", "L"):
        raise ValueError(f"model_id is {model_id!r}, expected one of S, B, M, L.")
    return create_mednext(num_input_channels, num_classes, model_id, kernel_size, deep_supervision, **options)


def create_mednext_v2(
    model_id: str,
    num_input_channels: int,
    num_classes: int,
    kernel_size: int | None = 3,
    deep_supervision: bool = False,
    **options,
) -> MedNeXt:
    """Build MedNeXt-v2 (Roy et al. 2025, arXiv 2512.17774), "B" of width 32 or "W" of width 64; see `create_mednext`.

    No code and no weights of the authors were public when this was written. Established, from the abstract: 3D GRN, and
    depth, width and context scaling. Reported publicly by a re-implementation (nanaHa1003/mednext-accel), and met here:
    depths and ratios of L, GRN in every block, widths 32 and 64, kernel 3; 61,969,507 and 246,536,387 parameters at one
    channel and three classes, the coarser heads not counted. Not established: whether GRN divides by the sum over the
    channels, as the paper's formula is reported to do (`grn="sum"`, the default), or by the mean, as ConvNeXt V2 and
    the v1 code do (`grn="mean"`). The two share their weights' shapes but not their function.
    """
    if model_id not in ("B", "W"):
        raise ValueError(f"model_id is {model_id!r}, expected B or W.")
    return create_mednext(num_input_channels, num_classes, f"v2-{model_id}", kernel_size, deep_supervision, **options)
