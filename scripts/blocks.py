"""The blocks MedNeXt is made of; each works alone in other networks.

Names, shapes and arithmetic are those of https://github.com/MIC-DKFZ/MedNeXt (Apache-2.0). N batch, C channels,
*space is D, H, W or H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import kernels
from .kernels.reference import Moments, Weights, grn

CONV = {"2d": nn.Conv2d, "3d": nn.Conv3d}
CONV_TRANSPOSE = {"2d": nn.ConvTranspose2d, "3d": nn.ConvTranspose3d}


def exporting() -> bool:
    """Whether torch.export or the ONNX exporter is looking; their graphs serve every input size and other runtimes."""
    return False if torch.jit.is_scripting() else torch.compiler.is_exporting()


def _matrix(conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (K, C) and bias of a 1x1x1 convolution, transposed or not."""
    weight = conv.weight.flatten(1)
    return weight.t() if conv.transposed else weight, conv.bias


def _every_second(x: torch.Tensor, first: int) -> tuple[slice, ...]:
    return (slice(None), slice(None), *[slice(first, None, 2)] * (x.dim() - 2))


def _only_modules(layers: Iterable[nn.Module]) -> str | None:
    """Why these layers must be called as modules, if they must."""
    for layer in layers:
        if type(layer) not in STOCK:
            return f"there is none for {type(layer).__name__}"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "a layer has hooks"
    return None


def pointwise(conv: nn.Module, x: torch.Tensor, which: str) -> torch.Tensor:
    """A 1x1x1 convolution of stride 1, transposed or not, with the kernels of that name; not for scripting."""
    ops = kernels.choose(which, x, _only_modules([conv]), compiled=False)
    return conv(x) if ops is kernels.reference else ops.pointwise(x, *_matrix(conv))


def _mean_axis_by_axis(x: torch.Tensor) -> torch.Tensor:
    for axis in range(2, x.dim()):
        x = x.mean(axis, keepdim=True)
    return x  # (N, C, 1, ..)


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
    mean and variance come from `torch.var_mean`, which is exact to float32 (tests/test_blocks.py). ONNX Runtime 1.23
    adds up naively in every operator, which shows where an image is padded or air; an exported graph sums axis by axis.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if exporting():
            mean = _mean_axis_by_axis(x)
            variance = _mean_axis_by_axis((x - mean).square())
        elif x.is_cuda:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        else:
            variance, mean = torch.var_mean(x, dim=list(range(2, x.dim())), correction=0, keepdim=True)  # (N, C, 1, ..)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = self.weight.view(shape) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(shape) - mean * scale, x, scale)


STOCK = (*CONV.values(), *CONV_TRANSPOSE.values(), ChannelNorm, nn.GELU, nn.Identity)  # layers that kernels know


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
        grn: Global Response Normalisation after the GELU (ConvNeXt V2): True or "mean" divides a channel's energy by
            the mean over the channels (as ConvNeXt V2, MIC-DKFZ/MedNeXt and MONAI do), "sum" by their sum.

    `checkpoint_style` of a block says what the backward pass computes again instead of keeping it: None nothing,
    "block" everything, "expansion" `conv2 -> GELU -> conv3`, which is most of the memory for little of the time.
    `kernels` says which of `kernels.KERNELS` compute it: "auto" the fastest that can. They use the parameters of the
    layers inside, and leave a layer that has hooks or was replaced to the reference.

    Raises:
        ValueError: `norm_type`, `dim` or `grn` is none of its values, or `do_res` does not fit the channels.
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
        grn: bool | str = False,
    ) -> None:
        super().__init__()
        if dim not in CONV:
            raise ValueError(f"dim is {dim!r}, expected '2d' or '3d'.")
        if norm_type not in ("group", "layer"):
            raise ValueError(f"norm_type is {norm_type!r}, expected 'group' or 'layer'.")
        if grn not in (False, True, "mean", "sum"):
            raise ValueError(f"grn is {grn!r}, expected False, True, 'mean' or 'sum'.")
        if do_res and type(self) is MedNeXtBlock and in_channels != out_channels:
            raise ValueError(
                f"do_res adds {in_channels} to {out_channels} channels; give equal numbers or do_res=False."
            )
        hidden = exp_r * in_channels
        self.do_res, self.dim, self.grn = do_res, dim, bool(grn)
        self.checkpoint_style: str | None = None
        self.kernels = "auto"
        self.conv1 = self._first_conv(in_channels, kernel_size, n_groups or in_channels, dim)
        self.norm = ChannelNorm(in_channels) if norm_type == "group" else LayerNorm(in_channels)
        self.conv2 = CONV[dim](in_channels, hidden, kernel_size=1)
        self.act = nn.GELU()
        self.conv3 = CONV[dim](hidden, out_channels, kernel_size=1)
        self.grn_over_sum = grn == "sum"
        self.grn_beta: nn.Parameter | None = None
        self.grn_gamma: nn.Parameter | None = None
        if grn:
            shape = (1, hidden) + (1,) * (2 if dim == "2d" else 3)
            self.grn_beta = nn.Parameter(torch.zeros(shape))
            self.grn_gamma = nn.Parameter(torch.zeros(shape))

    @staticmethod
    def _first_conv(channels: int, kernel_size: int, groups: int, dim: str) -> nn.Module:
        return CONV[dim](channels, channels, kernel_size, padding=kernel_size // 2, groups=groups)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if self.do_res else y

    def _run(self, style: str, part: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.checkpoint_style == style and torch.is_grad_enabled():
            return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
        return part(x)

    def _expansion(self, y: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv2(y))  # (N, exp_r * C, *space)
        gamma, beta = self.grn_gamma, self.grn_beta
        if gamma is not None and beta is not None:
            y = grn(y, gamma, beta, self.grn_over_sum)
        return self.conv3(y)

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            ops = kernels.choose(self.kernels, x, self._only_modules(), kernel_size=self.conv1.kernel_size[0])
            if ops is not kernels.reference:
                return self._with(ops, x)
        if not x.is_cuda:  # channels last is faster on a CPU; in each block, since 1x1x1 convolutions may undo it
            x = x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
        y = self.norm(self.conv1(x))
        y = self._expansion(y) if torch.jit.is_scripting() else self._run("expansion", self._expansion, y)
        return self._residual(x, y)

    def _only_modules(self) -> str | None:
        if self.conv1.groups != self.conv1.in_channels:
            return "the first convolution is not depthwise"
        return _only_modules(self.children())

    def _with(self, ops: ModuleType, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv1
        return self._expanded(ops, x, *ops.depthwise(x, conv.weight, conv.bias, conv.stride[0], conv.transposed))

    def _expanded(self, ops: ModuleType, x: torch.Tensor, y: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """What `norm`, `_expansion` and `_residual` make of the depthwise convolution's y."""
        return self._with_norm(ops, y, moments, x if self.do_res else None)

    def _with_norm(self, ops: ModuleType, y, moments: Moments | None, residual, more_bias=None) -> torch.Tensor:
        """`norm` and `_expansion` with a residual; `more_bias` is added to the last one."""
        norm, first, second = self.norm, self.conv2, self.conv3
        end = second.bias if more_bias is None else second.bias + more_bias
        matrices = first.weight.flatten(1), first.bias, second.weight.flatten(1), end
        grn_weights = [p if p is None else p.flatten() for p in (self.grn_gamma, self.grn_beta)]
        weights = Weights(norm.weight, norm.bias, *matrices, *grn_weights)
        return ops.expansion(y, weights, norm.eps, self.grn_over_sum, residual, moments)

    def forward(self, x: torch.Tensor, dummy_tensor: torch.Tensor | None = None) -> torch.Tensor:
        # the second argument is the original's and unused: networks built of its blocks pass it
        return self._block(x) if torch.jit.is_scripting() else self._run("block", self._block, x)


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
        grn: bool | str = False,
    ) -> None:
        super().__init__(in_channels, out_channels, exp_r, kernel_size, do_res, norm_type, None, dim, grn)
        self.res_conv = self._shortcut(in_channels, out_channels, dim) if do_res else nn.Identity()

    @staticmethod
    def _first_conv(channels: int, kernel_size: int, groups: int, dim: str) -> nn.Module:
        return CONV[dim](channels, channels, kernel_size, stride=2, padding=kernel_size // 2, groups=groups)

    @staticmethod
    def _shortcut(in_channels: int, out_channels: int, dim: str) -> nn.Module:
        return CONV[dim](in_channels, out_channels, kernel_size=1, stride=2)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.res_conv(x) if self.do_res else y

    def _expanded(self, ops: ModuleType, x: torch.Tensor, y: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        residual = ops.pointwise(x[_every_second(x, 0)], *_matrix(self.res_conv)) if self.do_res else None
        return self._with_norm(ops, y, moments, residual)


class MedNeXtUpBlock(MedNeXtDownBlock):
    """MedNeXtBlock whose depthwise conv is transposed with stride 2: (N, C, n, ..) -> (N, out_channels, 2n, ..).

    A transposed stride-2 convolution without output padding yields 2n - 1 voxels; one plane of zeros on the low side of
    every axis completes 2n, as in the original. Arguments as in MedNeXtBlock.
    """

    @staticmethod
    def _first_conv(channels: int, kernel_size: int, groups: int, dim: str) -> nn.Module:
        return CONV_TRANSPOSE[dim](channels, channels, kernel_size, stride=2, padding=kernel_size // 2, groups=groups)

    @staticmethod
    def _shortcut(in_channels: int, out_channels: int, dim: str) -> nn.Module:
        return CONV_TRANSPOSE[dim](in_channels, out_channels, kernel_size=1, stride=2)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y + self.res_conv(x) if self.do_res else y  # (N, C, 2n - 1, ..)
        return F.pad(y, [1, 0] * (x.dim() - 2))

    def _expanded(self, ops: ModuleType, x: torch.Tensor, y: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        weight, bias = _matrix(self.res_conv) if self.do_res else (None, None)
        y = F.pad(self._with_norm(ops, y, moments, None, bias), [1, 0] * (x.dim() - 2))
        if self.do_res:  # a transposed convolution adds its bias everywhere, its products to every second voxel
            y[_every_second(y, 1)] += ops.pointwise(x, weight)
        return y


class OutBlock(nn.Module):
    """1x1x1 head: (N, C, *space) -> (N, n_classes, *space)."""

    def __init__(self, in_channels: int, n_classes: int, dim: str) -> None:
        super().__init__()
        self.kernels = "auto"
        self.conv_out = CONV_TRANSPOSE[dim](in_channels, n_classes, kernel_size=1)

    def forward(self, x: torch.Tensor, dummy_tensor: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv_out(x) if torch.jit.is_scripting() else pointwise(self.conv_out, x, self.kernels)
