"""Depthwise 3D convolutions in Triton: strides 1 and 2, kernels 3, 5 and 7; the input gradient is one of them.

Tensors are channels-last, (N, D, H, W, C) in memory. A program computes a tile of BLOCK_H x BLOCK_W voxels of a plane
times BLOCK_C channels. With stride 1 it walks along z: each voxel of an input plane is loaded k^2 times, not k^3, since
it is added at once to the k output planes that it touches. Sums are float32, whatever the tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import Moments

TILES = {3: (8, 8), 5: (4, 8), 7: (4, 4)}  # that leave room for k accumulators in the registers of 4 warps
CHANNELS = 32  # of a tile, at most
PROGRAMS = 1024  # that a walk along z is cut for: several for each multiprocessor of a large GPU
PARTS = 32  # partial moments that are merged at a time


@triton.jit
def tile_voxels(index, columns, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Compute h and w of the voxels of a tile; there are `columns` tiles in a row."""
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    return index // columns * BLOCK_H + p // BLOCK_W, index % columns * BLOCK_W + p % BLOCK_W


@triton.jit
def load_voxels(source, h, w, width, channels, c, seen, in_channels):
    """Load the tile (voxels, channels) of a plane that starts at `source`, in float32, with zeros where not `seen`."""
    offset = (h * width + w) * channels
    v = tl.load(source + offset[:, None] + c[None, :], mask=seen[:, None] & in_channels[None, :], other=0.0)
    return v.to(tl.float32)


@triton.jit
def _row(source, c, in_channels):
    return tl.load(source + c, mask=in_channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile_moments(value, inside, rows):
    """Count the voxels of a tile where `rows`; their mean and their sum of squared deviations too."""
    size = tl.sum(rows.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(inside, value, 0.0), axis=0) / tl.maximum(size, 1.0)
    deviation = tl.where(inside, value - mean[None, :], 0.0)
    return size, mean, tl.sum(deviation * deviation, axis=0)


@triton.jit
def _store_moments(moments, count, mean, squares, c, channels, in_channels):
    row = moments + tl.program_id(0) * 3 * channels + c
    tl.store(row, count, mask=in_channels)
    tl.store(row + channels, mean, mask=in_channels)
    tl.store(row + 2 * channels, squares, mask=in_channels)


@triton.jit
def _last(a2, a4, a6, K: tl.constexpr):
    """Pick the last of K accumulators."""
    if K == 3:
        return a2
    elif K == 5:
        return a4
    else:
        return a6


@triton.jit
def _stream(
    x, weight, bias, y, moments,
    depth, height, width, channels, tiles, columns, chunks, steps, taps,
    K: tl.constexpr, MOMENTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolve x with stride 1 to y; store count, mean and sum of squared deviations of every program's part of y."""
    P: tl.constexpr = K // 2
    tile, chunk, n = tl.program_id(0) % tiles, tl.program_id(0) // tiles % chunks, tl.program_id(0) // tiles // chunks
    h, w = tile_voxels(tile, columns, BLOCK_H, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_plane, in_channels = (h < height) & (w < width), c < channels
    inside = in_plane[:, None] & in_channels[None, :]
    start = _row(bias, c, in_channels)
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    a0, a1, a2, a3, a4, a5, a6 = zero, zero, zero, zero, zero, zero, zero
    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    first = chunk * steps
    last = tl.minimum(first + steps, depth)
    along = taps * channels  # from a tap to that of the next plane
    for z in range(first - P, last + P):
        plane = x + (n * depth + z).to(tl.int64) * height * width * channels
        z_seen = (z >= 0) & (z < depth)
        for t in range(taps):  # of a plane; were it unrolled, the weights of all would be in registers at once
            kh, kw = t // K, t % K
            hi, wi = h + (kh - P), w + (kw - P)
            seen = (hi >= 0) & (hi < height) & (wi >= 0) & (wi < width) & in_plane & (z_seen != 0)
            v = load_voxels(plane, hi, wi, width, channels, c, seen, in_channels)
            tap = weight + t * channels
            a0 += v * _row(tap, c, in_channels)
            a1 += v * _row(tap + along, c, in_channels)
            a2 += v * _row(tap + 2 * along, c, in_channels)
            if K > 3:
                a3 += v * _row(tap + 3 * along, c, in_channels)
                a4 += v * _row(tap + 4 * along, c, in_channels)
            if K > 5:
                a5 += v * _row(tap + 5 * along, c, in_channels)
                a6 += v * _row(tap + 6 * along, c, in_channels)
        done = _last(a2, a4, a6, K)  # accumulator j belongs to plane z + P - j: the last one has met all of its taps
        made = z - P
        if made >= first:
            rounded = (done + start).to(y.dtype.element_ty)
            offset = (h * width + w) * channels
            to = y + (n * depth + made).to(tl.int64) * height * width * channels
            tl.store(to + offset[:, None] + c[None, :], rounded, mask=inside)
            if MOMENTS:  # Chan et al.: two parts' means and squared deviations become one's
                size, part, deviations = _tile_moments(rounded.to(tl.float32), inside, in_plane)
                total = tl.maximum(count + size, 1.0)
                apart = part - mean
                squares += deviations + apart * apart * count * size / total
                mean += apart * size / total
                count += size
        if K > 5:
            a6, a5 = a5, a4
        if K > 3:
            a4, a3 = a3, a2
        a2, a1, a0 = a1, a0, zero
    if MOMENTS:
        _store_moments(moments, count, mean, squares, c, channels, in_channels)


@triton.jit
def _strided(
    x, weight, bias, y, moments,
    depth, height, width, out_depth, out_height, out_width, channels, tiles, columns, taps,
    K: tl.constexpr, MOMENTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolve x with stride 2 to y."""
    P: tl.constexpr = K // 2
    tile, z, n = tl.program_id(0) % tiles, tl.program_id(0) // tiles % out_depth, tl.program_id(0) // tiles // out_depth
    h, w = tile_voxels(tile, columns, BLOCK_H, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    made, in_channels = (h < out_height) & (w < out_width), c < channels
    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    for t in range(taps):
        kz, kh = t // K, t % K
        zi, hi = 2 * z + kz - P, 2 * h + (kh - P)
        plane = x + (n * depth + zi).to(tl.int64) * height * width * channels
        z_seen = (zi >= 0) & (zi < depth)
        for kw in tl.static_range(K):
            wi = 2 * w + (kw - P)
            seen = (hi >= 0) & (hi < height) & (wi >= 0) & (wi < width) & made & (z_seen != 0)
            v = load_voxels(plane, hi, wi, width, channels, c, seen, in_channels)
            acc += v * _row(weight + (t * K + kw) * channels, c, in_channels)
    plane = y + (n * out_depth + z).to(tl.int64) * out_height * out_width * channels
    _finish(acc, bias, plane, moments, h, w, out_width, channels, c, made, in_channels, MOMENTS)


@triton.jit
def _transposed(
    x, weight, bias, y, moments,
    depth, height, width, out_depth, out_height, out_width, channels, tiles, columns,
    K: tl.constexpr, MOMENTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolve x, transposed, with stride 2 to y; a program makes one plane's voxels with one parity of h and w.

    Along an axis, output i is made of the inputs (i + P - t) / 2 for taps t of the parity of i + P.
    """
    P: tl.constexpr = K // 2
    parity, rest = tl.program_id(0) % 4, tl.program_id(0) // 4
    tile, z, n = rest % tiles, rest // tiles % out_depth, rest // tiles // out_depth
    odd_h, odd_w = parity // 2, parity % 2
    h, w = tile_voxels(tile, columns, BLOCK_H, BLOCK_W)  # on the grid of one parity, where the last row may be outside
    h, w = 2 * h + odd_h, 2 * w + odd_w
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    made, in_channels = (h < out_height) & (w < out_width), c < channels
    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    for kz in range((z + P) % 2, K, 2):
        zi = (z + P - kz) // 2
        z_seen = (z + P >= kz) & (zi < depth)
        plane = x + (n * depth + zi).to(tl.int64) * height * width * channels
        for kh in range((odd_h + P) % 2, K, 2):
            for kw in range((odd_w + P) % 2, K, 2):
                hi, wi = (h + P - kh) // 2, (w + P - kw) // 2
                seen = (h + P >= kh) & (hi < height) & (w + P >= kw) & (wi < width) & made & (z_seen != 0)
                v = load_voxels(plane, hi, wi, width, channels, c, seen, in_channels)
                acc += v * _row(weight + ((kz * K + kh) * K + kw) * channels, c, in_channels)
    plane = y + (n * out_depth + z).to(tl.int64) * out_height * out_width * channels
    _finish(acc, bias, plane, moments, h, w, out_width, channels, c, made, in_channels, MOMENTS)


@triton.jit
def _finish(acc, bias, plane, moments, h, w, width, channels, c, made, in_channels, MOMENTS: tl.constexpr):
    """Store a tile of a plane with its bias, and its moments as they are after rounding."""
    inside = made[:, None] & in_channels[None, :]
    acc = (acc + _row(bias, c, in_channels)).to(plane.dtype.element_ty)
    offset = (h * width + w) * channels
    tl.store(plane + offset[:, None] + c[None, :], acc, mask=inside)
    if MOMENTS:
        size, mean, squares = _tile_moments(acc.to(tl.float32), inside, made)
        _store_moments(moments, size + tl.zeros_like(mean), mean, squares, c, channels, in_channels)


@triton.jit
def _merge(moments, mean, variance, programs, channels, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merge the programs' counts, means and squared deviations of a case, in a fixed order."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    count = tl.zeros((BLOCK_C,), tl.float32)
    whole = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, programs, PARTS):
        rows = start + tl.arange(0, PARTS)
        offset = (n * programs + rows) * 3 * channels
        inside = (rows < programs)[:, None] & in_channels[None, :]
        counts = tl.load(moments + offset[:, None] + c[None, :], mask=inside, other=0.0)
        means = tl.load(moments + offset[:, None] + channels + c[None, :], mask=inside, other=0.0)
        deviations = tl.load(moments + offset[:, None] + 2 * channels + c[None, :], mask=inside, other=0.0)
        size = tl.sum(counts, axis=0)
        part = tl.sum(counts * means, axis=0) / tl.maximum(size, 1.0)
        spread = means - part[None, :]
        within = tl.sum(deviations + counts * spread * spread, axis=0)
        total = tl.maximum(count + size, 1.0)
        apart = part - whole
        squares += within + apart * apart * count * size / total
        whole += apart * size / total
        count += size
    tl.store(mean + n * channels + c, whole, mask=in_channels)
    tl.store(variance + n * channels + c, squares / tl.maximum(count, 1.0), mask=in_channels)


def tile_of(channels: int, k: int) -> dict[str, int]:
    """Choose the tile of a program."""
    height, width = TILES[k]
    return {"BLOCK_H": height, "BLOCK_W": width, "BLOCK_C": min(CHANNELS, triton.next_power_of_2(channels))}


def tiles_of(size: Sequence[int], blocks: dict[str, int]) -> tuple[int, int]:
    """Count the tiles of a plane (H, W), and those in a row of it."""
    columns = triton.cdiv(size[-1], blocks["BLOCK_W"])
    return columns * triton.cdiv(size[-2], blocks["BLOCK_H"]), columns


def walk(depth: int, programs: int, k: int) -> tuple[int, int]:
    """Choose into how many walks of how many planes to cut z, where `programs` walk side by side.

    A walk loads k - 1 planes more than it makes, so it is cut only for want of programs, and not below 2 k planes.
    """
    steps = max(triton.cdiv(depth, triton.cdiv(PROGRAMS, programs)), min(2 * k, depth))
    return triton.cdiv(depth, steps), steps


def _vectors(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weights (k^3, C) and bias (C,), contiguous, float32."""
    weights = weight.detach().flatten(1).t().float().contiguous()
    bias = torch.zeros(len(weight), device=x.device) if bias is None else bias.detach().float().contiguous()
    return weights, bias


def _run(
    kernel: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    shape: Sequence[int],
    programs: int,
    moments: bool,
    blocks: dict[str, int],
) -> tuple[Tensor, Moments | None]:
    """Launch a kernel: y (N, C, *size), channels-last, and its mean and variance in float32 if `moments`, else None."""
    n, channels = x.shape[:2]
    y = x.new_empty((n, *size, channels)).movedim(-1, 1)
    parts = torch.empty((n, programs, 3, channels) if moments else 1, device=x.device)
    grid = (n * programs, triton.cdiv(channels, blocks["BLOCK_C"]))
    kernel[grid](x, *_vectors(x, weight, bias), y, parts, *shape, K=weight.shape[-1], MOMENTS=moments, **blocks)
    if not moments:
        return y, None
    mean, variance = torch.empty((n, channels), device=x.device), torch.empty((n, channels), device=x.device)
    _merge[(n, grid[1])](parts, mean, variance, programs, channels, PARTS=PARTS, BLOCK_C=blocks["BLOCK_C"])
    return y, (mean, variance)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, moments: bool = False
) -> tuple[Tensor, Moments | None]:
    """Convolve x, channels-last (N, C, D, H, W), depthwise: y and, if asked for, its mean and variance."""
    channels, k = x.shape[1], weight.shape[-1]
    blocks = tile_of(channels, k)
    size = [-(-s // stride) for s in x.shape[2:]]
    tiles, columns = tiles_of(size, blocks)
    if stride == 1:
        chunks, steps = walk(size[0], len(x) * tiles * triton.cdiv(channels, blocks["BLOCK_C"]), k)
        shape = (*size, channels, tiles, columns, chunks, steps, k * k)
        return _run(_stream, x, weight, bias, size, shape, tiles * chunks, moments, blocks)
    shape = (*x.shape[2:], *size, channels, tiles, columns, k * k)
    return _run(_strided, x, weight, bias, size, shape, tiles * size[0], moments, blocks)


def transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], moments: bool = False
) -> tuple[Tensor, Moments | None]:
    """Convolve x, transposed, depthwise, with stride 2, to (N, C, *size): y and, if asked for, its moments."""
    blocks = tile_of(x.shape[1], weight.shape[-1])
    tiles, columns = tiles_of([-(-s // 2) for s in size], blocks)
    shape = (*x.shape[2:], *size, x.shape[1], tiles, columns)
    return _run(_transposed, x, weight, bias, size, shape, 4 * tiles * size[0], moments, blocks)
