"""The mix of AdapterFusion in the bottlenecks.

    scores_n = g_n · σ_n + c_n + shift,  p = softmax_n(drop(scores)),  m = [p_n σ_n | p_n]

    dp_n = dm_p,n + dm_n · σ_n,  dscores = drop(p (dp - p · dp)),  dshift = Σ_n dscores_n
    dσ_n = p_n dm_n + dscores_n g_n,  dt = [dscores_n σ_n | dscores_n]

A program holds all adapters of its rows: σ and t are read once, and the weights are made again in backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastadapt.backends.triton import launch
from fastadapt.backends.triton.dropout import Dropout, keep_elements
from fastadapt.backends.triton.numeric import rounded


@triton.jit
def _places(rows, N: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ADAPTERS: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, adapters, which of them exist, their elements in a row of σ, which of those exist)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    adapter = tl.arange(0, ADAPTERS)
    neuron = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (adapter < N)[None, :]
    element = adapter[:, None] * B + neuron[None, :]
    return row, adapter, inside, element, inside[:, :, None] & (neuron < B)[None, None, :]


@triton.jit
def _weights(
    sigma, g, t, shift, row, adapter, inside, seed, rows, least, factor, blocks_a_row, N: tl.constexpr,
    B: tl.constexpr, SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """p [ROWS, ADAPTERS], and what of the scores was kept."""
    scores = tl.sum(g * sigma, 2)
    scores += tl.load(t + row[:, None] * (N * B + N) + N * B + adapter[None, :], mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        scores += tl.load(shift + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    kept = inside
    if DROPOUT:
        kept = inside & keep_elements(tl.load(seed), row[:, None], adapter[None, :], blocks_a_row, least)
        scores = tl.where(kept, scores * factor, 0.0)
    # Rows past the end have weights too, of adapters that exist, so that nothing there is NaN.
    scores = tl.where((adapter < N)[None, :], scores, float("-inf"))
    e = tl.exp(scores - tl.max(scores, 1)[:, None])
    return e / tl.sum(e, 1)[:, None], kept


@triton.jit
def forward_kernel(
    sigma, t, shift, m, seed, rows, least, factor, blocks_a_row,
    N: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ADAPTERS: tl.constexpr, WIDTH: tl.constexpr,
    SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    dtype = m.dtype.element_ty
    row, adapter, inside, element, exists = _places(rows, N, B, ROWS, ADAPTERS, WIDTH)
    at = row[:, None, None] * (N * B + N) + element[None, :, :]
    s = tl.load(sigma + row[:, None, None] * (N * B) + element[None, :, :], mask=exists, other=0.0).to(tl.float32)
    g = tl.load(t + at, mask=exists, other=0.0).to(tl.float32)
    p, _ = _weights(s, g, t, shift, row, adapter, inside, seed, rows, least, factor, blocks_a_row, N, B, SHIFT, DROPOUT)
    tl.store(m + at, rounded(s * p[:, :, None], dtype), mask=exists)
    tl.store(m + row[:, None] * (N * B + N) + N * B + adapter[None, :], rounded(p, dtype), mask=inside)


def forward(sigma, t, shift, count, dropout_p, seed):
    """``fastadapt::mix_forward``."""
    rows, b = sigma.shape[0], sigma.shape[1] // count
    m = torch.empty_like(t)
    if rows == 0:
        return m
    tile = launch.mix_rows(launch.architecture(sigma), count, b, backward=False)
    dropout = Dropout.of(dropout_p, seed)
    forward_kernel[(triton.cdiv(rows, tile.rows),)](
        sigma, t, shift, m, dropout.seed, rows, dropout.least, dropout.factor, triton.cdiv(count, 64), N=count, B=b,
        ROWS=tile.rows, ADAPTERS=tile.adapters, WIDTH=tile.width, SHIFT=shift is not None, DROPOUT=dropout.on,
        num_warps=tile.warps,
    )  # fmt: skip
    return m


@triton.jit
def backward_kernel(
    dm, sigma, t, shift, dsigma, dt, dshift, seed, rows, least, factor, blocks_a_row,
    N: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, ADAPTERS: tl.constexpr, WIDTH: tl.constexpr,
    SHIFT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    dtype = dsigma.dtype.element_ty
    row, adapter, inside, element, exists = _places(rows, N, B, ROWS, ADAPTERS, WIDTH)
    at = row[:, None, None] * (N * B + N) + element[None, :, :]
    at_sigma = row[:, None, None] * (N * B) + element[None, :, :]
    at_score = row[:, None] * (N * B + N) + N * B + adapter[None, :]
    s = tl.load(sigma + at_sigma, mask=exists, other=0.0).to(tl.float32)
    g = tl.load(t + at, mask=exists, other=0.0).to(tl.float32)
    p, kept = _weights(s, g, t, shift, row, adapter, inside, seed, rows, least, factor, blocks_a_row, N, B, SHIFT,
                       DROPOUT)  # fmt: skip
    d = tl.load(dm + at, mask=exists, other=0.0).to(tl.float32)
    dp = tl.load(dm + at_score, mask=inside, other=0.0).to(tl.float32) + tl.sum(d * s, 2)
    dscores = p * (dp - tl.sum(dp * p, 1)[:, None])
    if DROPOUT:
        dscores = tl.where(kept, dscores * factor, 0.0)
    tl.store(dsigma + at_sigma, rounded(d * p[:, :, None] + g * dscores[:, :, None], dtype), mask=exists)
    tl.store(dt + at, rounded(s * dscores[:, :, None], dtype), mask=exists)
    tl.store(dt + at_score, rounded(dscores, dtype), mask=inside)
    if SHIFT:
        tl.store(dshift + row, rounded(tl.sum(tl.where(inside, dscores, 0.0), 1), dtype), mask=row < rows)


def backward(dm, sigma, t, shift, count, dropout_p, seed):
    """``fastadapt::mix_backward``."""
    rows, b = sigma.shape[0], sigma.shape[1] // count
    dsigma, dt = torch.empty_like(sigma), torch.empty_like(t)
    dshift = t.new_empty(0) if shift is None else torch.empty_like(shift)
    if rows == 0:
        return dsigma, dt, dshift
    tile = launch.mix_rows(launch.architecture(sigma), count, b, backward=True)
    dropout = Dropout.of(dropout_p, seed)
    backward_kernel[(triton.cdiv(rows, tile.rows),)](
        dm, sigma, t, shift, dsigma, dt, dshift, dropout.seed, rows, dropout.least, dropout.factor,
        triton.cdiv(count, 64), N=count, B=b, ROWS=tile.rows, ADAPTERS=tile.adapters, WIDTH=tile.width,
        SHIFT=shift is not None, DROPOUT=dropout.on, num_warps=tile.warps,
    )  # fmt: skip
    return dsigma, dt, dshift
