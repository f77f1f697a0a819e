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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["SIZES", "MedNeXt", "MedNeXtBlock", "MedNeXtDownBlock", "MedNeXtUpBlock", "create_mednext_v1"]


class Size(NamedTuple):
    """One row of the paper's table 1: per stage (4 encoder, bottleneck, 4 decoder) expansion ratio and block count."""

    exp_r: tuple[int, ...]
    block_counts: tuple[int, ...]
    checkpoint_style: str | None


SIZES = {  # parameters at kernel 3 | 5, one input channel, three classes, no deep supervision
    "S": Size((2,) * 9, (2,) * 9, None),  # 5.55 M | 5.98 M
    "B": Size((2, 3, 4, 4, 4, 4, 4, 3, 2), (2,) * 9, None),  # 10.5 M | 11.0 M
    "M": Size((2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3), "outside_block"),  # 17.5 M | 18.3 M
    "L": Size((3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3), "outside_block"),  # 61.8 M | 63.0 M
}
LEVELS = 4  # moves down, hence the multiple of 2**4 voxels
KERNEL_SIZES = (3, 5, 7)

_CONV = {"2d": nn.Conv2d, "3d": nn.Conv3d}
_CONV_TRANSPOSE = {"2d": nn.ConvTranspose2d, "3d": nn.ConvTranspose3d}


class LayerNorm(nn.Module):
    """Normalises over the channels of each voxel, (N, C, *space): `norm_type="layer"` of the original."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class ChannelNorm(nn.GroupNorm):
    """GroupNorm with one group a channel, (N, C, *space): `norm_type="group"` of the original.

    On a CPU, torch 2.13 adds up channels-last tensors naively here: the error reaches 1e-3 at 96^3 voxels. There
    mean and variance come from `torch.var_mean`, which is exact to float32 (tests/test_mednext.py).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        variance, mean = torch.var_mean(x, dim=list(range(2, x.dim())), correction=0, keepdim=True)  # (N, C, 1, ..)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = self.weight.view(shape) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(shape) - mean * scale, x, scale)


class MedNeXtBlock(nn.Module):
    """Depthwise conv -> norm -> 1x1x1 expand -> GELU (-> GRN) -> 1x1x1 compress (+ input), (N, C, *space).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; equal to `in_channels` where `do_res`.
        exp_r: expansion ratio; the hidden layer has `exp_r * in_channels` channels.
        kernel_size: edge of the depthwise kernel, odd.
        do_res: add the input to the output.
        norm_type: "group" (one group a channel, i.e. affine instance norm) or "layer" (over channels).
        n_groups: groups of the first convolution; None means depthwise.
        dim: "2d" or "3d".
        grn: Global Response Normalisation after the GELU (ConvNeXt V2).

    Raises:
        ValueError: `norm_type` or `dim` is neither of its two values, or `do_res` does not fit the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        exp_r: int = 4,
        kernel_size: int = 7,
        do_res: bool = True,
        norm_type: str = "group",
        n_groups: int | None = None,
        dim: str = "3d",
        grn: bool = False,
    ) -> None:
        super().__init__()
        if dim not in _CONV:
            raise ValueError(f"dim is {dim!r}, expected '2d' or '3d'.")
        if norm_type not in ("group", "layer"):
            raise ValueError(f"norm_type is {norm_type!r}, expected 'group' or 'layer'.")
        if do_res and type(self) is MedNeXtBlock and in_channels != out_channels:
            raise ValueError(
                f"do_res adds {in_channels} to {out_channels} channels; give equal numbers or do_res=False."
            )
        hidden = exp_r * in_channels
        self.do_res = do_res
        self.checkpointed = False
        self.conv1 = self._first_conv(in_channels, kernel_size, n_groups or in_channels, dim)
        self.norm = ChannelNorm(in_channels) if norm_type == "group" else LayerNorm(in_channels)
        self.conv2 = _CONV[dim](in_channels, hidden, kernel_size=1)
        self.act = nn.GELU()
        self.conv3 = _CONV[dim](hidden, out_channels, kernel_size=1)
        self.grn_beta: nn.Parameter | None = None
        self.grn_gamma: nn.Parameter | None = None
        if grn:
            shape = (1, hidden) + (1,) * (2 if dim == "2d" else 3)
            self.grn_beta = nn.Parameter(torch.zeros(shape))
            self.grn_gamma = nn.Parameter(torch.zeros(shape))

    @staticmethod
    def _first_conv(channels: int, kernel_size: int, groups: int, dim: str) -> nn.Module:
        return _CONV[dim](channels, channels, kernel_size, padding=kernel_size // 2, groups=groups)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if self.do_res else y

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            not x.is_cuda
        ):  # channels last is faster on a CPU; in each block, since torch's 1x1x1 convolutions may undo it
            x = x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
        y = self.act(self.conv2(self.norm(self.conv1(x))))  # (N, exp_r * C, *space)
        gamma, beta = self.grn_gamma, self.grn_beta
        if gamma is not None and beta is not None:
            wide = torch.float32 if y.is_cuda else torch.float64  # float32 sums on a CPU err by 4e-3 at 128^3
            energy = torch.linalg.vector_norm(y, dim=list(range(2, y.dim())), keepdim=True, dtype=wide).to(y.dtype)
            y = gamma * (y * (energy / (energy.mean(dim=1, keepdim=True) + 1e-6))) + beta + y
        return self._residual(x, self.conv3(y))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class MedNeXtDownBlock(MedNeXtBlock):
    """MedNeXtBlock whose depthwise conv has stride 2: (N, C, 2n, ..) -> (N, out_channels, n, ..).

    With `do_res` the input comes back through a strided 1x1x1 convolution. Arguments as in MedNeXtBlock.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        exp_r: int = 4,
        kernel_size: int = 7,
        do_res: bool = False,
        norm_type: str = "group",
        dim: str = "3d",
        grn: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, exp_r, kernel_size, do_res, norm_type, None, dim, grn)
        self.res_conv = self._shortcut(in_channels, out_channels, dim) if do_res else nn.Identity()

    @staticmethod
    def _first_conv(channels: int, kernel_size: int, groups: int, dim: str) -> nn.Module:
        return _CONV[dim](channels, channels, kernel_size, stride=2, padding=kernel_size // 2, groups=groups)

    @staticmethod
    def _shortcut(in_channels: int, out_channels: int, dim: str) -> nn.Module:
        return _CONV[dim](in_channels, out_channels, kernel_size=1, stride=2)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.res_conv(x) if self.do_res else y


class MedNeXtUpBlock(MedNeXtDownBlock):
    """MedNeXtBlock whose depthwise conv is transposed with stride 2: (N, C, n, ..) -> (N, out_channels, 2n, ..).

    A transposed stride-2 convolution without output padding yields 2n - 1 voxels; one plane of zeros on the low side of
    every axis completes 2n, as in the original. Arguments as in MedNeXtBlock.
    """

    @staticmethod
    def _first_conv(channels: int, kernel_size: int, groups: int, dim: str) -> nn.Module:
        return _CONV_TRANSPOSE[dim](channels, channels, kernel_size, stride=2, padding=kernel_size // 2, groups=groups)

    @staticmethod
    def _shortcut(in_channels: int, out_channels: int, dim: str) -> nn.Module:
        return _CONV_TRANSPOSE[dim](in_channels, out_channels, kernel_size=1, stride=2)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y + self.res_conv(x) if self.do_res else y  # (N, C, 2n - 1, ..)
        return F.pad(y, [1, 0] * (x.dim() - 2))


class OutBlock(nn.Module):
    """1x1x1 head: (N, C, *space) -> (N, n_classes, *space)."""

    def __init__(self, in_channels: int, n_classes: int, dim: str) -> None:
        super().__init__()
        self.conv_out = _CONV_TRANSPOSE[dim](in_channels, n_classes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(x)


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
        checkpoint_style: None, or "outside_block" to recompute every block in the backward pass (less memory, slower).
        block_counts: blocks in each of the nine stages.
        norm_type: "group" or "layer".
        dim: "2d" or "3d".
        grn: Global Response Normalisation; as in the original everywhere but in the first down block.

    Input (N, in_channels, [D,] H, W), any size with at least one side over 16 voxels. Output: in eval mode
    (N, n_classes, [D,] H, W); in training mode with deep supervision the list of five logits at 1, 1/2, .. 1/16 of the
    resolution (sides rounded up), finest first.

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
        checkpoint_style: str | None = None,
        block_counts: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        norm_type: str = "group",
        dim: str = "3d",
        grn: bool = False,
    ) -> None:
        super().__init__()
        stages = 2 * LEVELS + 1
        ratios = [exp_r] * stages if isinstance(exp_r, int) else list(exp_r)
        enc_kernel, dec_kernel = (enc_kernel_size, dec_kernel_size) if kernel_size is None else (kernel_size,) * 2
        if checkpoint_style not in (None, "outside_block"):
            raise ValueError(f"checkpoint_style is {checkpoint_style!r}, expected None or 'outside_block'.")
        if len(ratios) != stages or len(block_counts) != stages:
            raise ValueError(
                f"exp_r and block_counts need {stages} entries, got {len(ratios)} and {len(block_counts)}."
            )
        for name, k in (("encoder", enc_kernel), ("decoder", dec_kernel)):
            if k is None or k % 2 == 0:
                raise ValueError(f"the {name} kernel size is {k}, expected an odd number.")
        if dim not in _CONV:
            raise ValueError(f"dim is {dim!r}, expected '2d' or '3d'.")

        self.axes = 2 if dim == "2d" else 3
        self.do_ds = deep_supervision
        self.step = 2**LEVELS  # sides are padded to a multiple of it
        width = [n_channels * 2**level for level in range(LEVELS + 1)]
        shared = {"norm_type": norm_type, "dim": dim}

        def stage(index: int, channels: int, kernel: int) -> nn.Sequential:
            ratio = ratios[index]
            blocks = (
                MedNeXtBlock(channels, channels, ratio, kernel, do_res, grn=grn, **shared)
                for _ in range(block_counts[index])
            )
            return nn.Sequential(*blocks)

        # stage i has ratio exp_r[i]; the move into stage i has the ratio of the stage it leads to
        self.stem = _CONV[dim](in_channels, n_channels, kernel_size=1)
        for level in range(LEVELS):
            self.add_module(f"enc_block_{level}", stage(level, width[level], enc_kernel))
            down = MedNeXtDownBlock(
                width[level],
                width[level + 1],
                ratios[level + 1],
                enc_kernel,
                do_res_up_down,
                grn=grn and level > 0,
                **shared,
            )
            self.add_module(f"down_{level}", down)
        self.bottleneck = stage(LEVELS, width[LEVELS], dec_kernel)
        for level in reversed(range(LEVELS)):
            index = stages - 1 - level
            up = MedNeXtUpBlock(
                width[level + 1], width[level], ratios[index], dec_kernel, do_res_up_down, grn=grn, **shared
            )
            self.add_module(f"up_{level}", up)
            self.add_module(f"dec_block_{level}", stage(index, width[level], dec_kernel))
        for level in range(LEVELS + 1):
            used = deep_supervision or level == 0
            self.add_module(f"out_{level}", OutBlock(width[level], n_classes, dim) if used else nn.Identity())

        for module in self.modules():
            if isinstance(module, MedNeXtBlock):
                module.checkpointed = checkpoint_style == "outside_block"

    def forward(self, x: torch.Tensor):  # a tensor, or the list of five in training with deep supervision
        size = x.shape[2:]
        step = self.step
        if len(size) != self.axes:
            raise ValueError(
                f"the input has {len(size)} spatial axes, the network {self.axes}; expected (N, C, *space)."
            )
        if max(size) <= step:
            raise ValueError(
                f"the input has {list(size)} voxels; at least one side must be over {step},"
                " or the coarsest level is one voxel, which its norm would set to zero. Pad it or use larger patches."
            )
        missing = [-n % step for n in size]
        if max(missing) > 0:
            pad: list[int] = []
            for m in missing:  # F.pad counts axes from the last one
                pad = [0, m] + pad  # noqa: RUF005 (scripted)
            x = F.pad(x, pad)

        x = self.stem(x)  # (N, C, D, H, W)
        x0 = self.enc_block_0(x)
        x1 = self.enc_block_1(self.down_0(x0))  # (N, 2C, D/2, H/2, W/2)
        x2 = self.enc_block_2(self.down_1(x1))
        x3 = self.enc_block_3(self.down_2(x2))
        y4 = self.bottleneck(self.down_3(x3))  # (N, 16C, D/16, H/16, W/16)
        y3 = self.dec_block_3(self.up_3(y4) + x3)
        y2 = self.dec_block_2(self.up_2(y3) + x2)
        y1 = self.dec_block_1(self.up_1(y2) + x1)
        y0 = self.dec_block_0(self.up_0(y1) + x0)  # (N, C, D, H, W)

        logits = _crop(self.out_0(y0), size)  # (N, n_classes, D, H, W)
        if not torch.jit.is_scripting() and self.do_ds and self.training:
            coarse = (self.out_1(y1), self.out_2(y2), self.out_3(y3), self.out_4(y4))
            sizes = ([-(-n // 2**level) for n in size] for level in range(1, LEVELS + 1))
            return [logits] + [_crop(y, s) for y, s in zip(coarse, sizes, strict=True)]
        return logits


def _crop(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    for axis, n in enumerate(size):
        x = x.narrow(axis + 2, 0, n)
    return x


def create_mednext_v1(
    num_input_channels: int,
    num_classes: int,
    model_id: str,
    kernel_size: int | None = 3,
    deep_supervision: bool = False,
    **options,
) -> MedNeXt:
    """The paper's network by its name.

    Args:
        num_input_channels: channels of the image.
        num_classes: channels of the output, background included.
        model_id: "S", "B", "M" or "L", the rows of `SIZES`.
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
        "n_channels": 32,
        "kernel_size": kernel_size,
        "deep_supervision": deep_supervision,
        "do_res": True,
        "do_res_up_down": True,
        **SIZES[model_id]._asdict(),
        **options,
    }
    return MedNeXt(in_channels=num_input_channels, n_classes=num_classes, **arguments)
