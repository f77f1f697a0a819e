"""Matrix products of rows of voxels in Triton, with what follows them in their epilogues, for wide MLPs.

Products are summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PRODUCT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}  # tile of a matrix product


@triton.jit
def normal_at(x, dtype: tl.constexpr):
    """Evaluate the normal distribution at x, cumulative and density, for use in that dtype.

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
def load_matrix(source, rows, in_rows, row_step, columns, in_columns, column_step):
    """Load source[rows, columns], with zeros outside."""
    offset = rows[:, None] * row_step + columns[None, :] * column_step
    return tl.load(source + offset, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def _product(
    a, w, bias, extra, along, out,
    M, N, K, a_step, w_step, w_row, w_column, out_step,
    EPILOGUE: tl.constexpr, ALONG: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = epilogue(a (M, K) w (K, N)) of a case.

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
        rows = load_matrix(a, m, in_m, K, k, k < K, 1)
        acc += tl.dot(rows, load_matrix(w, k, k < K, w_row, n, in_n, w_column), input_precision=PRECISION)
    if EPILOGUE == "bias" or EPILOGUE == "gelu" or EPILOGUE == "residual":
        acc += tl.load(bias + n, mask=in_n, other=0.0)[None, :]
    if EPILOGUE == "gelu":
        acc *= normal_at(acc, a.dtype.element_ty)[0]
    to = case.to(tl.int64) * out_step + m[:, None] * N + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if EPILOGUE == "residual":
        acc += tl.load(extra + to, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == "slope":
        before = tl.load(extra + to, mask=inside, other=0.0).to(tl.float32)
        below, density = normal_at(before, a.dtype.element_ty)
        if ALONG:
            acc += before * below * tl.load(along + case * N + n, mask=in_n, other=0.0)[None, :]
        acc *= below + before * density
        tl.store(extra + to, (before * below).to(extra.dtype.element_ty), mask=inside)
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


def dot_precision(y: Tensor) -> str:
    """Choose how float32 is multiplied: as PyTorch does."""
    return "tf32" if y.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def multiply(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    epilogue: str,
    bias: Tensor | None = None,
    extra: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """Fill out (N, voxels, columns) with a (N, voxels, K) times w ((N,) K, columns) and an epilogue of `_product`."""
    n, voxels, columns = out.shape
    w = w if w.dim() == 3 else w.expand(n, -1, -1)
    grid = (triton.cdiv(voxels, PRODUCT["BLOCK_M"]) * triton.cdiv(columns, PRODUCT["BLOCK_N"]), n)
    _product[grid](
        a, w, a if bias is None else bias, a if extra is None else extra, a if along is None else along, out,
        voxels, columns, a.shape[2], a.stride(0), *w.stride(), out.stride(0),
        EPILOGUE=epilogue, ALONG=along is not None, PRECISION=dot_precision(a), **PRODUCT,
    )  # fmt: skip
    return out
