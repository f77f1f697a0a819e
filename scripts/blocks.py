"""The blocks MedNeXt is made of; each works alone in other networks.

Names, shapes and arithmetic are those of https://github.com/MIC-DKFZ/MedNeXt (Apache-2.0). N batch, C channels,
*space is D, H, W or H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .kernels import REFERENCE, choose_kernels, every_second
from .kernels.backend import Backend, Weights
from .kernels.reference import grn

Conv = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONV: dict[str, type[nn.Conv2d] | type[nn.Conv3d]] = {"2d": nn.Conv2d, "3d": nn.Conv3d}
CONV_TRANSPOSE: dict[str, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    "2d": nn.ConvTranspose2d,
    "3d": nn.ConvTranspose3d,
}


def exporting() -> bool:
    """Tell whether torch.export or the ONNX exporter is looking; their graphs serve every size and other runtimes."""
    return False if torch.jit.is_scripting() else torch.compiler.is_exporting()


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


def _mean_axis_by_axis(x: torch.Tensor) -> torch.Tensor:
    for axis in range(2, x.dim()):
        x = x.mean(axis, keepdim=True)
    return x  # (N, C, 1, ..)


STOCK = (*CONV.values(), *CONV_TRANSPOSE.values(), ChannelNorm, nn.GELU, nn.Identity)  # layers that kernels know


class _Block(nn.Module):
    """Depthwise conv -> norm -> 1x1x1 expand -> GELU (-> GRN) -> 1x1x1 compress (+ shortcut), (N, C, *space).

    The three blocks below give it what they differ in: the depthwise convolution and, in `res_conv`, the shortcut.

    Raises:
        ValueError: `norm_type` or `grn` is none of its values.
    """

    def __init__(
        self, depthwise: Conv, out_channels: int, exp_r: int, do_res: bool, norm_type: str, dim: str, grn: bool | str
    ) -> None:
        super().__init__()
        if norm_type not in ("group", "layer"):
            raise ValueError(f"norm_type is {norm_type!r}, expected 'group' or 'layer'.")
        if grn not in (False, True, "mean", "sum"):
            raise ValueError(f"grn is {grn!r}, expected False, True, 'mean' or 'sum'.")
        channels, hidden = depthwise.in_channels, exp_r * depthwise.in_channels
        self.do_res, self.dim, self.grn = do_res, dim, bool(grn)
        self.upsamples = depthwise.transposed
        self.checkpoint_style: str | None = None
        self.kernels = "auto"
        self.conv1: Conv = depthwise
        self.norm = ChannelNorm(channels) if norm_type == "group" else LayerNorm(channels)
        self.conv2: Conv = CONV[dim](channels, hidden, kernel_size=1)
        self.act = nn.GELU()
        self.conv3: Conv = CONV[dim](hidden, out_channels, kernel_size=1)
        self.res_conv: Conv | nn.Identity | None = None
        self.grn_over_sum = grn == "sum"
        self.grn_beta: nn.Parameter | None = None
        self.grn_gamma: nn.Parameter | None = None
        if grn:
            shape = (1, hidden) + (1,) * (2 if dim == "2d" else 3)
            self.grn_beta = nn.Parameter(torch.zeros(shape))
            self.grn_gamma = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor, dummy_tensor: torch.Tensor | None = None) -> torch.Tensor:
        # the second argument is the original's and unused: networks built of its blocks pass it
        if not torch.jit.is_scripting():
            backend = choose_kernels(self.kernels, x, self._why_layers(), kernel_size=self.conv1.kernel_size[0])
            compute = self._by_layers if backend is REFERENCE else partial(self._by_kernels, backend)
            return _run(compute, x, recompute=self.checkpoint_style == "block")
        return self._by_layers(x)

    def _by_layers(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda:  # channels last is faster on a CPU; in each block, since 1x1x1 convolutions may undo it
            x = x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
        y = self.norm(self.conv1(x))
        if torch.jit.is_scripting():
            y = self._mlp(y)
        else:
            y = _run(self._mlp, y, recompute=self.checkpoint_style == "expansion")
        if self.do_res:  # in this order of the sum, which decides its layout in memory
            y = x + y if self.res_conv is None else y + self.res_conv(x)
        if self.upsamples:
            y = F.pad(y, [1, 0] * (x.dim() - 2))  # (N, out_channels, 2n - 1, ..) -> (N, out_channels, 2n, ..)
        return y

    def _mlp(self, y: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv2(y))  # (N, exp_r * C, *space)
        gamma, beta = self.grn_gamma, self.grn_beta
        if gamma is not None and beta is not None:
            y = grn(y, gamma, beta, self.grn_over_sum)
        return self.conv3(y)  # (N, out_channels, *space)

    def _by_kernels(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        """Compute what `_by_layers` does with a backend and the parameters of the layers."""
        conv, weights, residual = self.conv1, self.weights(), None
        shortcut = self.res_conv if self.do_res else None
        y, moments = backend.depthwise(x, conv.weight, _bias(conv), conv.stride[0], conv.transposed)
        if isinstance(shortcut, Conv) and self.upsamples:  # adds its bias everywhere, products to every second voxel
            weights = weights._replace(b2=weights.b2 + _bias(shortcut))
        elif isinstance(shortcut, Conv):
            residual = backend.pointwise(every_second.take(x), _matrix(shortcut), shortcut.bias)
        elif self.do_res:
            residual = x
        y = backend.mlp(y, weights, self.norm.eps, self.grn_over_sum, residual, moments)
        if self.upsamples:
            y = F.pad(y, [1, 0] * (x.dim() - 2))
            if isinstance(shortcut, Conv):
                y = every_second.add(y, backend.pointwise(x, _matrix(shortcut)))
        return y

    def weights(self) -> Weights:
        """Return the parameters of all layers but the depthwise convolution, as kernels take them."""
        norm, first, second = self.norm, self.conv2, self.conv3
        grn_gamma, grn_beta = (p if p is None else p.flatten() for p in (self.grn_gamma, self.grn_beta))
        mlp = (_matrix(first), _bias(first), _matrix(second), _bias(second))
        return Weights(norm.weight, norm.bias, *mlp, grn_gamma, grn_beta)

    def _why_layers(self) -> str | None:
        """Say why the layers must be called one by one, if they must."""
        if self.conv1.groups != self.conv1.in_channels:
            return "the first convolution is not depthwise"
        return _why_modules(self.children())


class MedNeXtBlock(_Block):
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
        depthwise = _depthwise(in_channels, kernel_size, dim, groups=n_groups)
        super().__init__(depthwise, out_channels, exp_r, do_res, norm_type, dim, grn)
        if do_res and in_channels != out_channels:
            raise ValueError(
                f"do_res adds {in_channels} to {out_channels} channels; give equal numbers or do_res=False."
            )


class MedNeXtDownBlock(_Block):
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
        depthwise = _depthwise(in_channels, kernel_size, dim, stride=2)
        super().__init__(depthwise, out_channels, exp_r, do_res, norm_type, dim, grn)
        self.res_conv = CONV[dim](in_channels, out_channels, kernel_size=1, stride=2) if do_res else nn.Identity()


class MedNeXtUpBlock(_Block):
    """MedNeXtBlock whose depthwise conv is transposed with stride 2: (N, C, n, ..) -> (N, out_channels, 2n, ..).

    A transposed stride-2 convolution without output padding yields 2n - 1 voxels; one plane of zeros on the low side of
    every axis completes 2n, as in the original. With `do_res` the input comes back through a transposed 1x1x1
    convolution. Arguments as in MedNeXtBlock.
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
        depthwise = _depthwise(in_channels, kernel_size, dim, stride=2, transposed=True)
        super().__init__(depthwise, out_channels, exp_r, do_res, norm_type, dim, grn)
        conv = CONV_TRANSPOSE[dim]
        self.res_conv = conv(in_channels, out_channels, kernel_size=1, stride=2) if do_res else nn.Identity()


class OutBlock(nn.Module):
    """1x1x1 head: (N, C, *space) -> (N, n_classes, *space)."""

    def __init__(self, in_channels: int, n_classes: int, dim: str) -> None:
        super().__init__()
        self.kernels = "auto"
        self.conv_out = CONV_TRANSPOSE[dim](in_channels, n_classes, kernel_size=1)

    def forward(self, x: torch.Tensor, dummy_tensor: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv_out(x) if torch.jit.is_scripting() else pointwise(self.conv_out, x, self.kernels)


def pointwise(conv: Conv, x: torch.Tensor, kernels: str) -> torch.Tensor:
    """Apply a 1x1x1 convolution of stride 1, transposed or not, with the kernels of that name; not for scripting."""
    backend = choose_kernels(kernels, x, _why_modules([conv]), compiled=False)
    return conv(x) if backend is REFERENCE else backend.pointwise(x, _matrix(conv), conv.bias)


def _depthwise(
    channels: int, kernel_size: int, dim: str, stride: int = 1, transposed: bool = False, groups: int | None = None
) -> Conv:
    """Make the first convolution of a block.

    Raises:
        ValueError: `dim` is none of its values.
    """
    if dim not in CONV:
        raise ValueError(f"dim is {dim!r}, expected '2d' or '3d'.")
    conv = CONV_TRANSPOSE[dim] if transposed else CONV[dim]
    return conv(channels, channels, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups or channels)


def _run(part: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, recompute: bool) -> torch.Tensor:
    """Compute part(x); with `recompute` only x is kept for the backward pass, which computes it again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
    return part(x)


def _why_modules(layers: Iterable[nn.Module]) -> str | None:
    """Say why these layers must be called as modules, if they must."""
    for layer in layers:
        if type(layer) not in STOCK:
            return f"there is none for {type(layer).__name__}"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "a layer has hooks"
    return None


def _matrix(conv: Conv) -> torch.Tensor:
    """Return the weight (K, C) of a 1x1x1 convolution, transposed or not."""
    weight = conv.weight.flatten(1)
    return weight.t() if conv.transposed else weight


def _bias(conv: Conv) -> torch.Tensor:
    assert conv.bias is not None  # blocks have one everywhere
    return conv.bias
