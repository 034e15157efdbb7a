"""Residual add, dropout and LayerNorm.

    s = drop(x) + [residual]
    x̂ = (s - mean s) · rstd,  rstd = (mean (s - mean s)² + eps)^-½,  y = γ x̂ + β

    d = γ dy,  ds' = rstd (d - mean d - x̂ mean(d x̂)) + [ds],  dresidual = ds',  dx = drop(ds')
    dγ = Σ_rows dy x̂,  dβ = Σ_rows dy

A program holds whole rows, so that the variance's second pass runs over registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastadapt.backends.triton import launch
from fastadapt.backends.triton.dropout import Dropout, drop, padded_columns
from fastadapt.backends.triton.numeric import rounded
from fastadapt.backends.triton.partial import ordered_sum


@triton.jit
def _centred(s, inside, H: tl.constexpr):
    """s - mean s over the columns inside; the second mean is what the rounding of the first, if large, left."""
    centred = tl.where(inside, s - (tl.sum(s, 1) / H)[:, None], 0.0)  # s is 0 outside
    return tl.where(inside, centred - (tl.sum(centred, 1) / H)[:, None], 0.0)


@triton.jit
def forward_kernel(
    x, residual, norm_weight, norm_bias, y, s_out, seed, rows, eps, least, factor, blocks_a_row,
    H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < H)[None, :]
    at = row[:, None] * H + col[None, :]

    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        s = drop(s, tl.load(seed), row, 0, blocks_a_row, least, factor, ROWS, COLS)
    if RESIDUAL:
        s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    s = rounded(s, y.dtype.element_ty)
    if SAVE:
        tl.store(s_out + at, s, mask=inside)

    s = s.to(tl.float32)
    centred = _centred(s, inside, H)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / H + eps)
    gamma = tl.load(norm_weight + col, mask=col < H, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + col, mask=col < H, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
    tl.store(y + at, rounded(out, y.dtype.element_ty), mask=inside)


def forward(x, residual, norm_weight, norm_bias, eps, dropout_p, seed, save):
    """``fastadapt::add_norm_forward``."""
    rows, hidden = x.shape
    y = torch.empty_like(x)
    s = torch.empty_like(x) if save else x.new_empty(0)
    if rows == 0:
        return y, s
    tile = launch.norm_rows(launch.architecture(x), rows, hidden, backward=False)
    dropout = Dropout.of(dropout_p, seed)
    forward_kernel[(tile.splits,)](
        x, residual, norm_weight.contiguous(), norm_bias.contiguous(), y, s, dropout.seed, rows, eps, dropout.least,
        dropout.factor, padded_columns(hidden) // 64, H=hidden, ROWS=tile.rows, COLS=tile.cols,
        RESIDUAL=residual is not None, DROPOUT=dropout.on, SAVE=save, num_warps=tile.warps,
    )  # fmt: skip
    return y, s


@triton.jit
def backward_kernel(
    dy, ds, s, norm_weight, dx, dresidual, partial, seed, rows, rows_a_split, eps, least, factor, blocks_a_row,
    H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SUM_GRADIENT: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr, NEED_DNORM: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    gamma = tl.load(norm_weight + col, mask=col < H, other=0.0).to(tl.float32)
    dgamma = tl.zeros((COLS,), tl.float32)
    dbeta = tl.zeros((COLS,), tl.float32)
    first = split * rows_a_split
    for step in range(0, rows_a_split, ROWS):
        row = first + step + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < H)[None, :]
        at = row[:, None] * H + col[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)

        centred = _centred(v, inside, H)
        # Rows past the end are all zero; with eps = 0 their rstd would be infinite.
        rstd = tl.where(row < rows, 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / H + eps), 0.0)
        normalised = centred * rstd[:, None]
        if NEED_DNORM:
            dgamma += tl.sum(g * normalised, 0)
            dbeta += tl.sum(g, 0)
        if NEED_DX or NEED_DRESIDUAL:
            d = g * gamma[None, :]
            along = tl.sum(d * normalised, 1) / H
            d = rstd[:, None] * (d - (tl.sum(d, 1) / H)[:, None] - normalised * along[:, None])
            if SUM_GRADIENT:
                d += tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
            if NEED_DRESIDUAL:
                tl.store(dresidual + at, rounded(d, dresidual.dtype.element_ty), mask=inside)
            if NEED_DX:
                if DROPOUT:
                    d = drop(d, tl.load(seed), row, 0, blocks_a_row, least, factor, ROWS, COLS)
                tl.store(dx + at, rounded(d, dx.dtype.element_ty), mask=inside)
    if NEED_DNORM:
        tl.store(partial + split * (2 * H) + col, dgamma, mask=col < H)
        tl.store(partial + split * (2 * H) + H + col, dbeta, mask=col < H)


def backward(dy, ds, s, norm_weight, eps, dropout_p, seed, need_dx, need_dresidual, need_dnorm):
    """``fastadapt::add_norm_backward``."""
    rows, hidden = s.shape
    dx = torch.empty_like(s) if need_dx else s.new_empty(0)
    dresidual = torch.empty_like(s) if need_dresidual else s.new_empty(0)
    width = (hidden,) if need_dnorm else (0,)
    if rows == 0 or not (need_dx or need_dresidual or need_dnorm):
        dgamma, dbeta = (s.new_zeros(width, dtype=torch.float32) for _ in range(2))
        return dx, dresidual, dgamma, dbeta
    tile = launch.norm_rows(launch.architecture(s), rows, hidden, backward=True)
    dropout = Dropout.of(dropout_p, seed)
    partial = s.new_empty((tile.splits, 2 * hidden) if need_dnorm else (0,), dtype=torch.float32)
    backward_kernel[(tile.splits,)](
        dy, ds, s, norm_weight.contiguous(), dx, dresidual, partial, dropout.seed, rows, tile.rows_a_split, eps,
        dropout.least, dropout.factor, padded_columns(hidden) // 64, H=hidden, ROWS=tile.rows, COLS=tile.cols,
        SUM_GRADIENT=ds is not None, DROPOUT=dropout.on, NEED_DX=need_dx, NEED_DRESIDUAL=need_dresidual,
        NEED_DNORM=need_dnorm, num_warps=tile.warps,
    )  # fmt: skip
    if not need_dnorm:
        return dx, dresidual, *(s.new_empty(0, dtype=torch.float32) for _ in range(2))
    return dx, dresidual, *ordered_sum(partial, [(hidden,), (hidden,)])
