"""Gradients of the weights of depthwise 3D convolutions in Triton, see `triton_depthwise`.

With stride 1 a program walks along z and keeps the last k planes of the incoming gradient, so that each is loaded k^2
times. Programs write partial sums, which are added in a fixed order: two runs are equal to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_depthwise import PROGRAMS, load_voxels, tile_of, tile_voxels, tiles_of, walk

ROW_STEPS = 64  # tiles that a program of stride 2 sums


@triton.jit
def _correlate_stream(
    x, g, parts,
    depth, height, width, channels, tiles, columns, chunks, steps,
    K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum g times the x seen through a tap over a program's voxels into parts[program, kz, kh, kw, c], with stride 1.

    The grid is (parts, blocks of channels, K * K); a program has the K taps along z of one kh and kw.
    """
    P: tl.constexpr = K // 2
    tile, chunk, n = tl.program_id(0) % tiles, tl.program_id(0) // tiles % chunks, tl.program_id(0) // tiles // chunks
    kh, kw = tl.program_id(2) // K, tl.program_id(2) % K
    h, w = tile_voxels(tile, columns, BLOCK_H, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_plane, in_channels = (h < height) & (w < width), c < channels
    hi, wi = h + kh - P, w + kw - P
    seen = in_plane & (hi >= 0) & (hi < height) & (wi >= 0) & (wi < width)
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    a0, a1, a2, a3, a4, a5, a6 = zero, zero, zero, zero, zero, zero, zero
    g1, g2, g3, g4, g5, g6 = zero, zero, zero, zero, zero, zero
    first = chunk * steps
    last = tl.minimum(first + steps, depth)
    for z in range(first - P, last + P):
        v_seen = (z >= 0) & (z < depth)
        plane = x + (n * depth + z).to(tl.int64) * height * width * channels
        v = load_voxels(plane, hi, wi, width, channels, c, seen & (v_seen != 0), in_channels)
        new = z + P  # the plane of g that tap 0 joins to z; tap j joins the one j planes before
        new_seen = new < last
        plane = g + (n * depth + new).to(tl.int64) * height * width * channels
        g0 = load_voxels(plane, h, w, width, channels, c, seen & (new_seen != 0), in_channels)
        a0 += v * g0
        a1 += v * g1
        a2 += v * g2
        if K > 3:
            a3 += v * g3
            a4 += v * g4
        if K > 5:
            a5 += v * g5
            a6 += v * g6
        if K > 5:
            g6, g5 = g5, g4
        if K > 3:
            g4, g3 = g3, g2
        g2, g1 = g1, g0
    _store_taps(parts, c, channels, in_channels, tl.program_id(2), K * K, a0, a1, a2, a3, a4, a5, a6, K)


@triton.jit
def _store_taps(parts, c, channels, in_channels, tap, step, a0, a1, a2, a3, a4, a5, a6, K: tl.constexpr):
    """Store the sums of K accumulators at taps `tap`, `tap + step`, .."""
    to = parts + (tl.program_id(0) * K * K * K + tap) * channels + c
    step = step * channels
    tl.store(to, tl.sum(a0, axis=0), mask=in_channels)
    tl.store(to + step, tl.sum(a1, axis=0), mask=in_channels)
    tl.store(to + 2 * step, tl.sum(a2, axis=0), mask=in_channels)
    if K > 3:
        tl.store(to + 3 * step, tl.sum(a3, axis=0), mask=in_channels)
        tl.store(to + 4 * step, tl.sum(a4, axis=0), mask=in_channels)
    if K > 5:
        tl.store(to + 5 * step, tl.sum(a5, axis=0), mask=in_channels)
        tl.store(to + 6 * step, tl.sum(a6, axis=0), mask=in_channels)


@triton.jit
def _correlate_strided(
    fine, coarse, parts,
    depth, height, width, out_depth, out_height, out_width, channels, tiles, columns, jobs,
    K: tl.constexpr, STEPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum as above with stride 2: STEPS tiles of the coarse grid a program, K taps along w of a kz and kh."""
    P: tl.constexpr = K // 2
    kz, kh = tl.program_id(2) // K, tl.program_id(2) % K
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < channels
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    a0, a1, a2, a3, a4, a5, a6 = zero, zero, zero, zero, zero, zero, zero
    for step in range(STEPS):
        job = tl.program_id(0) * STEPS + step  # (n, z, tile of the plane)
        tile, z, n = job % tiles, job // tiles % out_depth, job // tiles // out_depth
        h, w = tile_voxels(tile, columns, BLOCK_H, BLOCK_W)
        zi, hi = 2 * z + kz - P, 2 * h + kh - P
        valid = (job < jobs) & (zi >= 0) & (zi < depth)
        seen = (h < out_height) & (w < out_width) & (hi >= 0) & (hi < height) & (valid != 0)
        plane = coarse + (n * out_depth + z).to(tl.int64) * out_height * out_width * channels
        g = load_voxels(plane, h, w, out_width, channels, c, seen, in_channels)
        plane = fine + (n * depth + zi).to(tl.int64) * height * width * channels
        for kw in tl.static_range(K):
            wi = 2 * w + (kw - P)
            product = g * load_voxels(plane, hi, wi, width, channels, c, seen & (wi >= 0) & (wi < width), in_channels)
            if kw == 0:
                a0 += product
            elif kw == 1:
                a1 += product
            elif kw == 2:
                a2 += product
            elif kw == 3:
                a3 += product
            elif kw == 4:
                a4 += product
            elif kw == 5:
                a5 += product
            else:
                a6 += product
    _store_taps(parts, c, channels, in_channels, tl.program_id(2) * K, 1, a0, a1, a2, a3, a4, a5, a6, K)


def weight_gradient(fine: torch.Tensor, coarse: torch.Tensor, stride: int, weight: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of the weights, see `cpu.Helper`; programs' sums are added in a fixed order."""
    n, channels, *size = coarse.shape
    k = weight.shape[-1]
    blocks = tile_of(channels, k)
    tiles, columns = tiles_of(size, blocks)
    grid = (triton.cdiv(channels, blocks["BLOCK_C"]), k * k)
    if stride == 1:
        chunks, steps = walk(size[0], n * tiles * grid[0] * grid[1], k)
        parts = torch.empty((n * tiles * chunks, k**3, channels), device=fine.device)
        shape = (*size, channels, tiles, columns, chunks, steps)
        _correlate_stream[(len(parts), *grid)](fine, coarse, parts, *shape, K=k, **blocks)
    else:
        jobs = n * size[0] * tiles
        steps = min(ROW_STEPS, triton.next_power_of_2(triton.cdiv(jobs * grid[0] * grid[1], PROGRAMS)))
        parts = torch.empty((triton.cdiv(jobs, steps), k**3, channels), device=fine.device)
        shape = (*fine.shape[2:], *size, channels, tiles, columns, jobs)
        _correlate_strided[(len(parts), *grid)](fine, coarse, parts, *shape, K=k, STEPS=steps, **blocks)
    return (
        parts.sum(0, dtype=torch.float64).t().to(weight.dtype, memory_format=torch.contiguous_format).view(weight.shape)
    )
