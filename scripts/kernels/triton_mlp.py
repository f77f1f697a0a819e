"""Norm, expansion, GELU, compression and residual in Triton, forward and backward, on rows of voxels y (N, voxels, C).

Up to WIDEST channels one kernel does it all and the hidden layer stays on the chip; wider ones are matrix products with
the rest in their epilogues. See `mlp` for what is folded into the weights. Products are summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mlp import Layers
from .triton_product import dot_precision, load_matrix, multiply, normal_at

WIDEST = 64  # channels in or out that a program holds for a tile of rows; levels 0 and 1, where the voxels are
ROW_STEPS = 32  # tiles of rows that a program of the weight gradients sums


@triton.jit
def _normalised(y, scale, shift, case, rows, seen, C, c, in_c):
    """Compute z = y * scale + shift of a tile of a case that starts at y, zero outside, in the precision of y."""
    value = load_matrix(y, rows, seen, C, c, in_c, 1).to(tl.float32)
    a = tl.load(scale + case * C + c, mask=in_c, other=0.0)
    b = tl.load(shift + case * C + c, mask=in_c, other=0.0)
    z = tl.where(seen[:, None] & in_c[None, :], value * a[None, :] + b[None, :], 0.0)
    return z.to(y.dtype.element_ty)


@triton.jit
def _forward(
    y, scale, shift, first, start, second, end, residual, out,
    voxels, tiles, C, R, O, second_step,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Compute out = second gelu(first z + start) + end (+ residual)."""
    case = tl.program_id(0) // tiles
    before = case.to(tl.int64) * voxels
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = rows < voxels
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    in_c, in_o = c < C, o < O
    z = _normalised(y + before * C, scale, shift, case, rows, seen, C, c, in_c)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        in_r = r < R
        hidden = tl.dot(z, load_matrix(first, c, in_c, 1, r, in_r, C), input_precision=PRECISION)
        hidden += tl.load(start + r, mask=in_r, other=0.0)[None, :]
        hidden *= normal_at(hidden, z.dtype)[0]
        into = load_matrix(second + case * second_step, r, in_r, 1, o, in_o, R)
        acc += tl.dot(hidden.to(z.dtype), into, input_precision=PRECISION)
    acc += tl.load(end + o, mask=in_o, other=0.0)[None, :]
    if RESIDUAL:
        acc += load_matrix(residual + before * O, rows, seen, O, o, in_o, 1).to(tl.float32)
    to = out + before * O + rows[:, None] * O + o[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=seen[:, None] & in_o[None, :])


@triton.jit
def _energy(
    y, scale, shift, first, start, parts,
    voxels, chunks, C, R,
    STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum hidden squared over STEPS tiles of a case into parts[program, r]."""
    case, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    y += case.to(tl.int64) * voxels * C
    c, r = tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_c, in_r = c < C, r < R
    into = load_matrix(first, c, in_c, 1, r, in_r, C)
    bias = tl.load(start + r, mask=in_r, other=0.0)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        seen = rows < voxels
        hidden = tl.dot(_normalised(y, scale, shift, case, rows, seen, C, c, in_c), into, input_precision=PRECISION)
        hidden += bias[None, :]
        hidden = tl.where(seen[:, None], hidden * normal_at(hidden, y.dtype.element_ty)[0], 0.0)
        total += tl.sum(hidden * hidden, axis=0)
    tl.store(parts + tl.program_id(0) * R + r, total, mask=in_r)


@triton.jit
def _slope(grad, before, out_of, along, r, in_r, ALONG: tl.constexpr, PRECISION: tl.constexpr):
    """Compute the gradient of `before`, and hidden; `along` points to a case's row of what times hidden adds."""
    below, density = normal_at(before, grad.dtype)
    slope = tl.dot(grad, out_of, input_precision=PRECISION)
    hidden = before * below
    if ALONG:
        slope += hidden * tl.load(along + r, mask=in_r, other=0.0)[None, :]
    return slope * (below + before * density), hidden


@triton.jit
def _backward_input(
    g, y, scale, shift, first, start, second, along, dz,
    voxels, tiles, C, R, O, second_step,
    ALONG: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Compute dz, the gradient of z; the hidden layer is computed again."""
    case = tl.program_id(0) // tiles
    above = case.to(tl.int64) * voxels
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = rows < voxels
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    in_c, in_o = c < C, o < O
    z = _normalised(y + above * C, scale, shift, case, rows, seen, C, c, in_c)
    grad = load_matrix(g + above * O, rows, seen, O, o, in_o, 1)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        in_r = r < R
        into = load_matrix(first, r, in_r, C, c, in_c, 1)
        before = tl.dot(z, tl.trans(into), input_precision=PRECISION)
        before += tl.load(start + r, mask=in_r, other=0.0)[None, :]
        out_of = load_matrix(second + case * second_step, o, in_o, R, r, in_r, 1)
        slope, _ = _slope(grad, before, out_of, along + case * R, r, in_r, ALONG, PRECISION)
        acc += tl.dot(slope.to(z.dtype), into, input_precision=PRECISION)
    to = dz + above * C + rows[:, None] * C + c[None, :]
    tl.store(to, acc.to(dz.dtype.element_ty), mask=seen[:, None] & in_c[None, :])


@triton.jit
def _backward_weights(
    g, y, scale, shift, first, start, second, along, dfirst, dstart, dsecond, dend,
    voxels, chunks, C, R, O, second_step,
    ALONG: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Sum each program's part of the four gradients over STEPS tiles of a case, for BLOCK_R hidden channels."""
    case, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    y += case.to(tl.int64) * voxels * C
    g += case.to(tl.int64) * voxels * O
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_c, in_o, in_r = c < C, o < O, r < R
    into = load_matrix(first, c, in_c, 1, r, in_r, C)
    out_of = load_matrix(second + case * second_step, o, in_o, R, r, in_r, 1)
    bias = tl.load(start + r, mask=in_r, other=0.0)
    to_first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    to_second = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    to_start = tl.zeros((BLOCK_R,), tl.float32)
    to_end = tl.zeros((BLOCK_O,), tl.float32)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        seen = rows < voxels
        z = _normalised(y, scale, shift, case, rows, seen, C, c, in_c)
        grad = load_matrix(g, rows, seen, O, o, in_o, 1)
        before = tl.dot(z, into, input_precision=PRECISION) + bias[None, :]
        slope, hidden = _slope(grad, before, out_of, along + case * R, r, in_r, ALONG, PRECISION)
        if ALONG:
            slope = tl.where(seen[:, None], slope, 0.0)  # without it, zero outside as grad is
        to_first += tl.dot(tl.trans(slope.to(z.dtype)), z, input_precision=PRECISION)
        to_second += tl.dot(tl.trans(grad), hidden.to(z.dtype), input_precision=PRECISION)
        to_start += tl.sum(slope, axis=0)
        to_end += tl.sum(grad.to(tl.float32), axis=0)
    part = tl.program_id(0)
    tl.store(dfirst + (part * R + r)[:, None] * C + c[None, :], to_first, mask=in_r[:, None] & in_c[None, :])
    tl.store(dsecond + (part * O + o)[:, None] * R + r[None, :], to_second, mask=in_o[:, None] & in_r[None, :])
    tl.store(dstart + part * R + r, to_start, mask=in_r)
    if tl.program_id(1) == 0:
        tl.store(dend + part * O + o, to_end, mask=in_o)


@triton.jit
def _combine(dz, y, a, b, c, voxels, tiles, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Turn dz into dz * a + y * b + c."""
    case = tl.program_id(0) // tiles
    above = case.to(tl.int64) * voxels * C
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    seen, in_c = rows < voxels, columns < C
    value = load_matrix(dz + above, rows, seen, C, columns, in_c, 1).to(tl.float32)
    value *= tl.load(a + case * C + columns, mask=in_c, other=0.0)[None, :]
    from_y = load_matrix(y + above, rows, seen, C, columns, in_c, 1).to(tl.float32)
    value += from_y * tl.load(b + case * C + columns, mask=in_c, other=0.0)[None, :]
    value += tl.load(c + case * C + columns, mask=in_c, other=0.0)[None, :]
    to = dz + above + rows[:, None] * C + columns[None, :]
    tl.store(to, value.to(dz.dtype.element_ty), mask=seen[:, None] & in_c[None, :])


def _sizes(layers: Layers, itemsize: int) -> dict[str, int]:
    """Choose rows and paddings of a tile: 16 at least for tensor cores; fewer rows where they are wide."""
    block_c = max(16, triton.next_power_of_2(layers.first.shape[1]))
    block_o = max(16, triton.next_power_of_2(layers.second.shape[1]))
    return {"BLOCK_M": 64 if itemsize == 2 else 32, "BLOCK_C": block_c, "BLOCK_R": 32, "BLOCK_O": block_o}


def _fused(layers: Layers) -> bool:
    return max(layers.first.shape[1], layers.second.shape[1]) <= WIDEST


def _dimensions(y: Tensor, layers: Layers) -> tuple[int, int, int, int]:
    return y.shape[2], len(layers.first), layers.second.shape[1], layers.second.stride(0)


def _z(y: Tensor, layers: Layers) -> Tensor:
    return torch.addcmul(layers.shift[:, None], y, layers.scale[:, None], out=torch.empty_like(y))


def _wide(y: Tensor, layers: Layers) -> Tensor:
    return y.new_empty((*y.shape[:2], len(layers.first)))


def _backward_wide(g: Tensor, y: Tensor, layers: Layers, along: Tensor | None, dz: Tensor | None) -> tuple[Tensor, ...]:
    z = _z(y, layers)
    hidden = multiply(
        z, layers.first.t(), _wide(y, layers), "bias", layers.start
    )  # before GELU, until `slope` is known
    slope = multiply(g, layers.second, torch.empty_like(hidden), "slope", extra=hidden, along=along)
    if dz is not None:
        torch.matmul(slope, layers.first, out=dz)
    return (
        (slope.transpose(1, 2) @ z).float(),
        slope.sum(1, dtype=torch.float32),
        (g.transpose(1, 2) @ hidden).float(),
        g.sum(1, dtype=torch.float32),
    )


class TritonRows:
    """Computes rows in one kernel or, where they are wide, by matrix products; see `mlp.Rows`."""

    def energy(self, y: Tensor, layers: Layers) -> Tensor:
        """Sum the squares of hidden over the voxels."""
        if not _fused(layers):
            hidden = multiply(_z(y, layers), layers.first.t(), _wide(y, layers), "gelu", layers.start)
            return torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).square()
        sizes = _sizes(layers, y.element_size())
        del sizes["BLOCK_O"]
        n, voxels, channels = y.shape
        hidden_channels = len(layers.first)
        chunks = triton.cdiv(triton.cdiv(voxels, sizes["BLOCK_M"]), ROW_STEPS)
        parts = y.new_empty((n, chunks, hidden_channels), dtype=torch.float32)
        options = {"STEPS": ROW_STEPS, "PRECISION": dot_precision(y), **sizes}
        grid = (n * chunks, triton.cdiv(hidden_channels, sizes["BLOCK_R"]))
        _energy[grid](y, *layers[:4], parts, voxels, chunks, channels, hidden_channels, **options)
        return parts.sum(1)

    def forward(self, y: Tensor, layers: Layers, residual: Tensor | None, out: Tensor) -> None:
        """Fill out."""
        has_residual = residual is not None
        if not _fused(layers):
            hidden = multiply(_z(y, layers), layers.first.t(), _wide(y, layers), "gelu", layers.start)
            kind = "residual" if has_residual else "bias"
            multiply(hidden, layers.second.transpose(1, 2), out, kind, layers.end, residual)
            return
        sizes = _sizes(layers, y.element_size())
        n, voxels, _ = y.shape
        tiles = triton.cdiv(voxels, sizes["BLOCK_M"])
        _forward[(n * tiles,)](
            y, *layers, residual if has_residual else y, out, voxels, tiles, *_dimensions(y, layers),
            RESIDUAL=has_residual, PRECISION=dot_precision(y), **sizes,
        )  # fmt: skip

    def backward(
        self, g: Tensor, y: Tensor, layers: Layers, along: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of the layers, and that of z."""
        if not _fused(layers):
            return _backward_wide(g, y, layers, along, dz)
        sizes = _sizes(layers, y.element_size())
        (n, voxels, channels), hidden, made = y.shape, len(layers.first), layers.second.shape[1]
        tiles = triton.cdiv(voxels, sizes["BLOCK_M"])
        inputs = (g, y, *layers[:-1], y if along is None else along)
        options = {"ALONG": along is not None, "PRECISION": dot_precision(y), **sizes}
        if dz is not None:
            _backward_input[(n * tiles,)](*inputs, dz, voxels, tiles, *_dimensions(y, layers), **options)
        chunks = triton.cdiv(tiles, ROW_STEPS)
        shapes = (hidden, channels), (hidden,), (made, hidden), (made,)
        parts = [y.new_empty((n, chunks, *shape), dtype=torch.float32) for shape in shapes]
        grid = (n * chunks, triton.cdiv(hidden, sizes["BLOCK_R"]))
        _backward_weights[grid](*inputs, *parts, voxels, chunks, *_dimensions(y, layers), STEPS=ROW_STEPS, **options)
        return tuple(part.sum(1) for part in parts)

    def combine(self, dz: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        """Turn dz into dz * a + y * b + c."""
        n, voxels, channels = y.shape
        block_c = min(64, triton.next_power_of_2(channels))
        tiles = triton.cdiv(voxels, 64)
        grid = (n * tiles, triton.cdiv(channels, block_c))
        _combine[grid](dz, y, a, b, c, voxels, tiles, channels, BLOCK_M=64, BLOCK_C=block_c)


ROWS = TritonRows()
