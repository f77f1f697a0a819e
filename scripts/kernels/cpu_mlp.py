"""Norm, expansion, GELU, compression and residual on a CPU, forward and backward, on rows of voxels y (N, voxels, C).

They run over tiles of voxels whose hidden layer stays in the cache. See `mlp` for what is folded into the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlp import Layers

TILE_BYTES = 2**21  # of the hidden layer of a tile; from 1 to 4 MiB made no difference on 1 MiB of L2 a core


class CpuRows:
    """Computes rows a tile at a time; see `mlp.Rows`."""

    def energy(self, y: Tensor, layers: Layers) -> Tensor:
        """Sum the squares of hidden over the voxels."""
        total = layers.scale.new_zeros(len(y), len(layers.first), dtype=torch.float64)
        start, tiles = layers.start.to(y.dtype), _tiles(y.shape[1], layers)
        buffer = y.new_empty(tiles[0].stop, y.shape[2])
        for n, rows in enumerate(y):
            for tile in tiles:
                z = _normalised(rows, tile, layers.scale[n], layers.shift[n], buffer)
                hidden = torch.ops.aten.gelu_(linear(z, layers.first, start)).to(layers.scale.dtype)
                total[n] += hidden.square_().sum(0)
        return total.to(layers.scale.dtype)

    def forward(self, y: Tensor, layers: Layers, residual: Tensor | None, out: Tensor) -> None:
        """Fill out."""
        scale, shift, first, start, second, end = layers
        start, end = start.to(y.dtype), end.to(y.dtype)
        tiles = _tiles(y.shape[1], layers)
        buffer = y.new_empty(tiles[0].stop, y.shape[2])
        for n, (rows, made) in enumerate(zip(y, out, strict=True)):
            for tile in tiles:
                z = _normalised(rows, tile, scale[n], shift[n], buffer)
                product = linear(torch.ops.aten.gelu_(linear(z, first, start)), second[n], end)
                if residual is None:
                    made[tile] = product
                else:
                    torch.add(residual[n, tile], product, out=made[tile])

    def backward(
        self, g: Tensor, y: Tensor, layers: Layers, along: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of the layers, and that of z."""
        scale, shift, first, start, second, end = layers
        found = [scale.new_zeros(len(y), *t.shape, dtype=torch.float64) for t in (first, start, second[0], end)]
        start, first_back = start.to(y.dtype), first.t().contiguous()
        tiles = _tiles(y.shape[1], layers)
        buffer = y.new_empty(tiles[0].stop, y.shape[2])
        for n, (rows, grads, dfirst, dstart, dsecond, dend) in enumerate(zip(y, g, *found, strict=True)):
            second_back = second[n].t().contiguous()
            for tile in tiles:
                z = _normalised(rows, tile, scale[n], shift[n], buffer)
                before, dhidden = linear(z, first, start), linear(grads[tile], second_back)
                hidden = torch.ops.aten.gelu(before)
                # matrix products of MKL are slower than `_product` and more exact, which both gammas' gradients need
                dsecond += _product(grads[tile], hidden) if dz is not None else grads[tile].t() @ hidden
                dend += grads[tile].sum(0, dtype=scale.dtype)
                if along is not None:
                    torch.addcmul(dhidden, hidden, along[n], out=dhidden)
                torch.ops.aten.gelu_backward.grad_input(dhidden, before, grad_input=dhidden)
                dfirst += dhidden.t() @ z
                dstart += dhidden.sum(0, dtype=scale.dtype)
                if dz is not None:
                    dz[n, tile] = linear(dhidden, first_back)
        return tuple(total.to(scale.dtype) for total in found)

    def combine(self, dz: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        """Turn dz into dz * a + y * b + c."""
        step = max(TILE_BYTES // (y.shape[2] * 4), 64)
        buffer = a.new_empty(min(step, y.shape[1]), y.shape[2])
        for n, (gradient, rows) in enumerate(zip(dz, y, strict=True)):
            for start in range(0, len(rows), step):
                tile = slice(start, min(start + step, len(rows)))
                total = torch.addcmul(c[n], rows[tile], b[n], out=buffer[: tile.stop - tile.start])
                torch.addcmul(total, gradient[tile], a[n], out=gradient[tile])


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute rows (rows, C) @ weight (K, C).T + bias (K,), contiguous."""
    if not _as_convolution(rows):
        return F.linear(rows, weight, bias)
    return F.conv2d(_image(rows), weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(len(rows), -1)


def _product(g: Tensor, rows: Tensor) -> Tensor:
    """Compute g (rows, K).T @ rows (rows, C), the gradient of the weights of `linear` at rows."""
    if not _as_convolution(rows):
        return g.t() @ rows
    like, none = rows.new_empty(g.shape[1], rows.shape[1], 1, 1), [0, 0]
    args = (None, [1, 1], none, [1, 1], False, none, 1, [False, True, False])
    return torch.ops.aten.convolution_backward(_image(g), _image(rows), like, *args)[1][:, :, 0, 0]


def _as_convolution(rows: Tensor) -> bool:
    """Tell whether products with rows (rows, C) are 1x1 convolutions, by oneDNN.

    It uses AVX512 on every processor that has it, where MKL's matrix products do on Intel's alone.
    """
    return rows.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _image(rows: Tensor) -> Tensor:
    """Return rows (rows, C) as (1, C, rows, 1), channels-last, of the same memory."""
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def _tiles(voxels: int, layers: Layers) -> list[slice]:
    rows = max(TILE_BYTES // (len(layers.first) * layers.first.element_size()), 64)
    return [slice(start, min(start + rows, voxels)) for start in range(0, voxels, rows)]


def _normalised(rows: Tensor, tile: slice, scale: Tensor, shift: Tensor, buffer: Tensor) -> Tensor:
    return torch.addcmul(shift, rows[tile], scale, out=buffer[: tile.stop - tile.start])
