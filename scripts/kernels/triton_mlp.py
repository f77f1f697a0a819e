"""Norm, expansion, GELU, compression and residual in Triton, forward and backward, on rows of voxels y (N, voxels, C).

Up to WIDEST channels one kernel does it all and the hidden layer stays on the chip; wider ones are matrix products with
the rest in their epilogues. See `expansion` for what is folded into the weights. Products are summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .mlp import Layers

WIDEST = 64  # channels in or out that a program holds for a tile of rows; levels 0 and 1, where the voxels are
ROW_STEPS = 32  # tiles of rows that a program of the weight gradients sums
PRODUCT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}  # tile of a matrix product


@triton.jit
def _normal(x, dtype: tl.constexpr):
    """The normal distribution at x, cumulative and density, for use in that dtype.

    In half precision erf is Abramowitz and Stegun's 7.1.26, |error| < 1.5e-7, which shares its exponential.
    """
    u = tl.abs(x) * 0.7071067811865476
    bell = tl.exp(-u * u)
    if dtype == tl.float32:
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        t = 1.0 / (1.0 + 0.3275911 * u)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * series * bell
        below = tl.where(x < 0, tail, 1.0 - tail)
    return below, 0.3989422804014327 * bell


@triton.jit
def _matrix(source, rows, in_rows, row_step, columns, in_columns, column_step):
    """source[rows, columns], zero outside."""
    offset = rows[:, None] * row_step + columns[None, :] * column_step
    return tl.load(source + offset, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def _normalised(y, scale, shift, case, rows, seen, C, c, in_c):
    """z = y * scale + shift of a tile of a case that starts at y, zero outside, in the precision of y."""
    value = _matrix(y, rows, seen, C, c, in_c, 1).to(tl.float32)
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
    """out = second gelu(first z + start) + end (+ residual)."""
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
        hidden = tl.dot(z, _matrix(first, c, in_c, 1, r, in_r, C), input_precision=PRECISION)
        hidden += tl.load(start + r, mask=in_r, other=0.0)[None, :]
        hidden *= _normal(hidden, z.dtype)[0]
        into = _matrix(second + case * second_step, r, in_r, 1, o, in_o, R)
        acc += tl.dot(hidden.to(z.dtype), into, input_precision=PRECISION)
    acc += tl.load(end + o, mask=in_o, other=0.0)[None, :]
    if RESIDUAL:
        acc += _matrix(residual + before * O, rows, seen, O, o, in_o, 1).to(tl.float32)
    to = out + before * O + rows[:, None] * O + o[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=seen[:, None] & in_o[None, :])


@triton.jit
def _energy(
    y, scale, shift, first, start, parts,
    voxels, chunks, C, R,
    STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[program, r] = sum of hidden squared over STEPS tiles of a case."""
    case, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    y += case.to(tl.int64) * voxels * C
    c, r = tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_c, in_r = c < C, r < R
    into = _matrix(first, c, in_c, 1, r, in_r, C)
    bias = tl.load(start + r, mask=in_r, other=0.0)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        seen = rows < voxels
        hidden = tl.dot(_normalised(y, scale, shift, case, rows, seen, C, c, in_c), into, input_precision=PRECISION)
        hidden += bias[None, :]
        hidden = tl.where(seen[:, None], hidden * _normal(hidden, y.dtype.element_ty)[0], 0.0)
        total += tl.sum(hidden * hidden, axis=0)
    tl.store(parts + tl.program_id(0) * R + r, total, mask=in_r)


@triton.jit
def _slope(grad, before, out_of, along, r, in_r, ALONG: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of `before`, and hidden; `along` points to a case's row of what times hidden adds."""
    below, density = _normal(before, grad.dtype)
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
    """dz, the gradient of z; the hidden layer is computed again."""
    case = tl.program_id(0) // tiles
    above = case.to(tl.int64) * voxels
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = rows < voxels
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    in_c, in_o = c < C, o < O
    z = _normalised(y + above * C, scale, shift, case, rows, seen, C, c, in_c)
    grad = _matrix(g + above * O, rows, seen, O, o, in_o, 1)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        in_r = r < R
        into = _matrix(first, r, in_r, C, c, in_c, 1)
        before = tl.dot(z, tl.trans(into), input_precision=PRECISION)
        before += tl.load(start + r, mask=in_r, other=0.0)[None, :]
        out_of = _matrix(second + case * second_step, o, in_o, R, r, in_r, 1)
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
    """Of STEPS tiles of a case and BLOCK_R hidden channels, each program its part of the four gradients."""
    case, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    y += case.to(tl.int64) * voxels * C
    g += case.to(tl.int64) * voxels * O
    c, o = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_c, in_o, in_r = c < C, o < O, r < R
    into = _matrix(first, c, in_c, 1, r, in_r, C)
    out_of = _matrix(second + case * second_step, o, in_o, R, r, in_r, 1)
    bias = tl.load(start + r, mask=in_r, other=0.0)
    to_first = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    to_second = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    to_start = tl.zeros((BLOCK_R,), tl.float32)
    to_end = tl.zeros((BLOCK_O,), tl.float32)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        seen = rows < voxels
        z = _normalised(y, scale, shift, case, rows, seen, C, c, in_c)
        grad = _matrix(g, rows, seen, O, o, in_o, 1)
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
def _product(
    a, w, bias, extra, along, out,
    M, N, K, a_step, w_step, w_row, w_column, out_step,
    EPILOGUE: tl.constexpr, ALONG: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = epilogue(a (M, K) w (K, N)) of a case.

    "bias" and "gelu" add the bias, "residual" adds the bias and `extra`. "slope" multiplies by GELU's slope at `extra`,
    which becomes hidden.
    """
    columns = tl.cdiv(N, BLOCK_N)  # neighbours share their rows of a
    case = tl.program_id(1)
    m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    a += case.to(tl.int64) * a_step
    w += case * w_step
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rows = _matrix(a, m, in_m, K, k, k < K, 1)
        acc += tl.dot(rows, _matrix(w, k, k < K, w_row, n, in_n, w_column), input_precision=PRECISION)
    if EPILOGUE == "bias" or EPILOGUE == "gelu" or EPILOGUE == "residual":
        acc += tl.load(bias + n, mask=in_n, other=0.0)[None, :]
    if EPILOGUE == "gelu":
        acc *= _normal(acc, a.dtype.element_ty)[0]
    to = case.to(tl.int64) * out_step + m[:, None] * N + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if EPILOGUE == "residual":
        acc += tl.load(extra + to, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == "slope":
        before = tl.load(extra + to, mask=inside, other=0.0).to(tl.float32)
        below, density = _normal(before, a.dtype.element_ty)
        if ALONG:
            acc += before * below * tl.load(along + case * N + n, mask=in_n, other=0.0)[None, :]
        acc *= below + before * density
        tl.store(extra + to, (before * below).to(extra.dtype.element_ty), mask=inside)
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine(dz, y, a, b, c, voxels, tiles, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dz = dz * a + y * b + c."""
    case = tl.program_id(0) // tiles
    above = case.to(tl.int64) * voxels * C
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    seen, in_c = rows < voxels, columns < C
    value = _matrix(dz + above, rows, seen, C, columns, in_c, 1).to(tl.float32)
    value *= tl.load(a + case * C + columns, mask=in_c, other=0.0)[None, :]
    from_y = _matrix(y + above, rows, seen, C, columns, in_c, 1).to(tl.float32)
    value += from_y * tl.load(b + case * C + columns, mask=in_c, other=0.0)[None, :]
    value += tl.load(c + case * C + columns, mask=in_c, other=0.0)[None, :]
    to = dz + above + rows[:, None] * C + columns[None, :]
    tl.store(to, value.to(dz.dtype.element_ty), mask=seen[:, None] & in_c[None, :])


# ---- calling them; arguments and results are those of `expansion.Rows`


def _precision(y: torch.Tensor) -> str:
    return "tf32" if y.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _sizes(layers: Layers, itemsize: int) -> dict[str, int]:
    """Rows and paddings of a tile: 16 at least for tensor cores; fewer rows where they are wide."""
    block_c = max(16, triton.next_power_of_2(layers.first.shape[1]))
    block_o = max(16, triton.next_power_of_2(layers.second.shape[1]))
    return {"BLOCK_M": 64 if itemsize == 2 else 32, "BLOCK_C": block_c, "BLOCK_R": 32, "BLOCK_O": block_o}


def _fused(layers: Layers) -> bool:
    return max(layers.first.shape[1], layers.second.shape[1]) <= WIDEST


def _dimensions(y: torch.Tensor, layers: Layers) -> tuple[int, int, int, int]:
    return y.shape[2], len(layers.first), layers.second.shape[1], layers.second.stride(0)


def _multiply(a, w, out, epilogue: str, bias=None, extra=None, along=None) -> torch.Tensor:
    """out (N, voxels, columns) = a (N, voxels, K) w (K, columns) or (N, K, columns), with an epilogue of `_product`."""
    n, voxels, columns = out.shape
    w = w if w.dim() == 3 else w.expand(n, -1, -1)
    grid = (triton.cdiv(voxels, PRODUCT["BLOCK_M"]) * triton.cdiv(columns, PRODUCT["BLOCK_N"]), n)
    _product[grid](
        a, w, a if bias is None else bias, a if extra is None else extra, a if along is None else along, out,
        voxels, columns, a.shape[2], a.stride(0), *w.stride(), out.stride(0),
        EPILOGUE=epilogue, ALONG=along is not None, PRECISION=_precision(a), **PRODUCT,
    )  # fmt: skip
    return out


def _z(y: torch.Tensor, layers: Layers) -> torch.Tensor:
    return torch.addcmul(layers.shift[:, None], y, layers.scale[:, None], out=torch.empty_like(y))


def _wide(y: torch.Tensor, layers: Layers) -> torch.Tensor:
    return y.new_empty((*y.shape[:2], len(layers.first)))


def energy(y: torch.Tensor, layers: Layers) -> torch.Tensor:
    if not _fused(layers):
        hidden = _multiply(_z(y, layers), layers.first.t(), _wide(y, layers), "gelu", layers.start)
        return torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).square()
    sizes = _sizes(layers, y.element_size())
    del sizes["BLOCK_O"]
    n, voxels, channels = y.shape
    hidden = len(layers.first)
    chunks = triton.cdiv(triton.cdiv(voxels, sizes["BLOCK_M"]), ROW_STEPS)
    parts = y.new_empty((n, chunks, hidden), dtype=torch.float32)
    _energy[(n * chunks, triton.cdiv(hidden, sizes["BLOCK_R"]))](
        y, *layers[:4], parts, voxels, chunks, channels, hidden, STEPS=ROW_STEPS, PRECISION=_precision(y), **sizes
    )
    return parts.sum(1)


def forward_rows(y: torch.Tensor, layers: Layers, residual: torch.Tensor | None, out: torch.Tensor) -> None:
    has_residual = residual is not None
    if not _fused(layers):
        hidden = _multiply(_z(y, layers), layers.first.t(), _wide(y, layers), "gelu", layers.start)
        kind = "residual" if has_residual else "bias"
        _multiply(hidden, layers.second.transpose(1, 2), out, kind, layers.end, residual)
        return
    sizes = _sizes(layers, y.element_size())
    n, voxels, _ = y.shape
    tiles = triton.cdiv(voxels, sizes["BLOCK_M"])
    _forward[(n * tiles,)](
        y, *layers, residual if has_residual else y, out, voxels, tiles, *_dimensions(y, layers),
        RESIDUAL=has_residual, PRECISION=_precision(y), **sizes,
    )  # fmt: skip


def backward_rows(
    g: torch.Tensor, y: torch.Tensor, layers: Layers, along: torch.Tensor | None, dz: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    if not _fused(layers):
        return _backward_wide(g, y, layers, along, dz)
    sizes = _sizes(layers, y.element_size())
    (n, voxels, channels), hidden, made = y.shape, len(layers.first), layers.second.shape[1]
    tiles = triton.cdiv(voxels, sizes["BLOCK_M"])
    inputs = (g, y, *layers[:-1], y if along is None else along)
    options = {"ALONG": along is not None, "PRECISION": _precision(y), **sizes}
    if dz is not None:
        _backward_input[(n * tiles,)](*inputs, dz, voxels, tiles, *_dimensions(y, layers), **options)
    chunks = triton.cdiv(tiles, ROW_STEPS)
    shapes = (hidden, channels), (hidden,), (made, hidden), (made,)
    parts = [y.new_empty((n, chunks, *shape), dtype=torch.float32) for shape in shapes]
    grid = (n * chunks, triton.cdiv(hidden, sizes["BLOCK_R"]))
    _backward_weights[grid](*inputs, *parts, voxels, chunks, *_dimensions(y, layers), STEPS=ROW_STEPS, **options)
    return tuple(part.sum(1) for part in parts)


def _backward_wide(g, y, layers: Layers, along, dz) -> tuple[torch.Tensor, ...]:
    z = _z(y, layers)
    hidden = _multiply(
        z, layers.first.t(), _wide(y, layers), "bias", layers.start
    )  # before GELU, until its slope is known
    slope = _multiply(g, layers.second, torch.empty_like(hidden), "slope", extra=hidden, along=along)
    if dz is not None:
        torch.matmul(slope, layers.first, out=dz)
    return (
        (slope.transpose(1, 2) @ z).float(),
        slope.sum(1, dtype=torch.float32),
        (g.transpose(1, 2) @ hidden).float(),
        g.sum(1, dtype=torch.float32),
    )


def combine_rows(dz: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    n, voxels, channels = y.shape
    block_c = min(64, triton.next_power_of_2(channels))
    tiles = triton.cdiv(voxels, 64)
    grid = (n * tiles, triton.cdiv(channels, block_c))
    _combine[grid](dz, y, a, b, c, voxels, tiles, channels, BLOCK_M=64, BLOCK_C=block_c)
