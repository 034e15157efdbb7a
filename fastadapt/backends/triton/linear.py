"""Linear layers with frozen weights, an activation and dropout.

    y = drop(σ(z)),  z = x [W_0; W_1; ...]ᵀ + [b_0; b_1; ...]
    dz = σ'(z) drop(dy),  dx = dz [W_0; W_1; ...],  dbias = Σ_rows dz

A product with nothing to fuse is the vendor library's, and so is dx; Triton serves the epilogue and its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastadapt.backends.triton import launch
from fastadapt.backends.triton.activation import activate, derivative
from fastadapt.backends.triton.dropout import Dropout, drop, padded_columns
from fastadapt.backends.triton.numeric import dot, rounded
from fastadapt.backends.triton.partial import ordered_sum
from fastadapt.ops.linear import linear_forward as plain_forward


@triton.jit
def forward_kernel(
    x, weight, bias, y, z, seed, rows, first_column, out_columns, least, factor, blocks_a_row,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Programs go down GROUP row tiles before the next column tile, so that neighbours share weights in L2.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    aligned = first_column // 64 * 64  # a tile of the mask starts on a block of its stream
    column_tiles = tl.cdiv(first_column - aligned + N, COLS)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    row = (group * GROUP + within % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = aligned + within // height * COLS
    col = column + tl.arange(0, COLS)  # of y
    n = (col - first_column).to(tl.int64)  # of this weight
    row_inside = (row < rows)[:, None]
    n_inside = (n >= 0) & (n < N)

    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        if K % DEPTH == 0:
            a = tl.load(x + row[:, None] * K + k[None, :], mask=row_inside, other=0.0)
            w = tl.load(weight + n[None, :] * K + k[:, None], mask=n_inside[None, :], other=0.0)
        else:
            a = tl.load(x + row[:, None] * K + k[None, :], mask=row_inside & (k < K)[None, :], other=0.0)
            w = tl.load(weight + n[None, :] * K + k[:, None], mask=n_inside[None, :] & (k < K)[:, None], other=0.0)
        total = dot(a, rounded(w, a.dtype), total, PRECISION)

    dtype = y.dtype.element_ty
    if BIAS:
        # Rounded to the compute dtype as every matrix's bias is.
        total += rounded(tl.load(bias + n, mask=n_inside, other=0.0), dtype).to(tl.float32)[None, :]
    inside = row_inside & n_inside[None, :]
    at = row[:, None] * out_columns + col[None, :]
    pre = rounded(total, dtype)
    if SAVE:
        tl.store(z + at, pre, mask=inside)
    out = activate(pre.to(tl.float32), ACTIVATION)
    if DROPOUT:
        out = drop(out, tl.load(seed), row, column, blocks_a_row, least, factor, ROWS, COLS)
    tl.store(y + at, rounded(out, dtype), mask=inside)


def forward(x, weights, biases, activation, dropout_p, seed, save):
    """``fastadapt::linear_forward``: one launch a weight, each into its columns of y."""
    dropout = Dropout.of(dropout_p, seed)
    arch = launch.architecture(x)
    if arch is not launch.INTERPRETER and activation == "none" and not dropout.on:
        return plain_forward(x, weights, biases, activation, 0.0, None, save)
    (rows, features), columns = x.shape, sum(w.shape[0] for w in weights)
    y = x.new_empty((rows, columns))
    z = torch.empty_like(y) if save and activation != "none" else x.new_empty(0)
    if rows == 0:
        return y, z
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        n = weight.shape[0]
        tile = launch.linear_product(arch, rows, n, x.element_size(), weight.element_size())
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(first % 64 + n, tile.cols)
        forward_kernel[(programs,)](
            x, weight.contiguous(), None if bias is None else bias.contiguous(), y, z, dropout.seed, rows, first,
            columns, dropout.least, dropout.factor, padded_columns(columns) // 64, N=n, K=features, ROWS=tile.rows,
            COLS=tile.cols, DEPTH=tile.depth, GROUP=tile.group, ACTIVATION=activation, BIAS=bias is not None,
            DROPOUT=dropout.on, SAVE=save and activation != "none", PRECISION=launch.precision(x.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        first += n
    return y, z


@triton.jit
def gradient_kernel(
    dy, z, dz, partial, seed, length, rows_a_split, splits_a_row, columns, least, factor, blocks_a_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DZ: tl.constexpr, NEED_DBIAS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLS
    split = tl.program_id(1).to(tl.int64)
    col = column + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    batch_row = split // splits_a_row
    begin = split % splits_a_row * rows_a_split
    for step in range(0, rows_a_split, ROWS):
        within = begin + step + tl.arange(0, ROWS)
        row = batch_row * length + within
        inside = (within < length)[:, None] & (col < columns)[None, :]
        at = row[:, None] * columns + col[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            g = drop(g, tl.load(seed), row, column, blocks_a_row, least, factor, ROWS, COLS)
        if ACTIVATION != "none":
            g *= derivative(tl.load(z + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        g = rounded(g, dy.dtype.element_ty)
        if NEED_DZ:
            tl.store(dz + at, g, mask=inside)
        if NEED_DBIAS:
            total += tl.sum(g.to(tl.float32), 0)
    if NEED_DBIAS:
        tl.store(partial + split * columns + col, total, mask=col < columns)


def epilogue_gradient(dy, z, activation, dropout, need_dz, need_dbias, batch_rows=1):
    """(dz, partial sums of dbias [splits, columns]); a split lies within one of the ``batch_rows`` equal parts of dy.

    dz is dy itself where the linear has neither activation nor dropout.
    """
    rows, columns = dy.shape
    plain = activation == "none" and not dropout.on
    need_dz = need_dz and not plain
    dz = torch.empty_like(dy) if need_dz else dy
    if not need_dz and not need_dbias:
        return dz, dy.new_empty(0, dtype=torch.float32)
    length = rows // batch_rows
    tile = launch.gradient_columns(launch.architecture(dy), length, columns, batch_rows)
    splits = batch_rows * tile.splits
    partial = dy.new_empty((splits, columns) if need_dbias else (0,), dtype=torch.float32)
    gradient_kernel[(triton.cdiv(columns, tile.cols), splits)](
        dy, z, dz, partial, dropout.seed, length, tile.rows_a_split, tile.splits, columns, dropout.least,
        dropout.factor, padded_columns(columns) // 64, ROWS=tile.rows, COLS=tile.cols, ACTIVATION=activation,
        DROPOUT=dropout.on, NEED_DZ=need_dz, NEED_DBIAS=need_dbias, num_warps=tile.warps,
    )  # fmt: skip
    return dz, partial


def backward(dy, z, weights, activation, dropout_p, seed, need_dx, need_dbias):
    """``fastadapt::linear_backward``."""
    rows, columns = dy.shape
    dbias = dy.new_zeros((columns if need_dbias else 0,), dtype=torch.float32)
    dz = dy
    if rows:
        dz, partial = epilogue_gradient(dy, z, activation, Dropout.of(dropout_p, seed), need_dx, need_dbias)
        if need_dbias:
            (dbias,) = ordered_sum(partial, [(columns,)])
    return dz @ stacked(weights, dy.dtype) if need_dx else dy.new_empty(0), dbias


def stacked(weights, dtype):
    """[ΣN_i, K] in ``dtype``; no copy of a single weight that is of it."""
    return weights[0].to(dtype) if len(weights) == 1 else torch.cat([w.to(dtype) for w in weights])
