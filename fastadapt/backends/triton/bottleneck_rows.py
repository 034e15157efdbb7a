"""The bottleneck adapter for rows that differ in it: every batch row has the adapter and LayerNorm of its slot.

    z = r W_downᵀ + b_down,  a = σ(z),  o = scale · (a W_upᵀ + b_up)
    s = drop(o) + [r if skip] + q,  y = LN(s)

    ds = LN'(dy),  g = drop(ds),  da = (scale · g) W_up,  dz = σ'(z) da,  dr = dz W_down + [ds if skip],  dq = ds
    dW_down = dzᵀ r,  db_down = Σ dz,  dW_up / scale = gᵀ a,  db_up / scale = Σ g,  dγ = Σ dy x̂,  dβ = Σ dy

with the parameters of the row's slot; r is x and q the residual, or the other way round where the slot swaps them. A
slot without an adapter has o = 0.

As in :mod:`fastadapt.backends.triton.lora` a tile lies within one batch row and reads its slot from ``rows`` itself;
the host never looks at it. What the slots are is a table, made once for each such set. Their parameters are stacked by
one copy of the matrices and one of the vectors in every call, so that a replayed graph follows them. The walks over H
are those of :mod:`fastadapt.backends.triton.bottleneck`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt.backends.triton import launch
from fastadapt.backends.triton.activation import activate_one, code_of, derivative_one
from fastadapt.backends.triton.bottleneck import columns_of
from fastadapt.backends.triton.dropout import keep, least_and_factor, padded_columns
from fastadapt.backends.triton.lora import Routing, rows_of_tile
from fastadapt.backends.triton.numeric import dot, rounded
from fastadapt.backends.triton.partial import ordered_sum, slot_sum

# -- the table of slots ------------------------------------------------------------------------------------------

# Its columns. Offsets are into the stack of matrices or of vectors; -1 where the slot has none.
_WIDTH = tl.constexpr(0)  # b; 0 without an adapter
_DOWN = tl.constexpr(1)
_UP = tl.constexpr(2)
_DOWN_BIAS = tl.constexpr(3)
_UP_BIAS = tl.constexpr(4)
_VECTOR = tl.constexpr(5)
_NORM_WEIGHT = tl.constexpr(6)
_NORM_BIAS = tl.constexpr(7)
_SWAP = tl.constexpr(8)
_SKIP = tl.constexpr(9)
_ACTIVATION = tl.constexpr(10)
_DROPS = tl.constexpr(11)
_LEAST = tl.constexpr(12)
_PARTIAL = tl.constexpr(13)  # where its gradients begin in a row of the partial sums
_WANTED = tl.constexpr(14)
_FIELDS = tl.constexpr(15)

# Arguments that count something and enter no row's address: no kernel is compiled anew for their being 1 or even.
_COUNTS = ("length", "tiles_a_row", "slots", "chunk", "chunks_a_row", "chunks", "chunks_a_split", "blocks_a_row")


@dataclass(frozen=True, eq=False)
class Table:
    """The slots of an op, for kernels and for their launch."""

    entries: Tensor  # [slots + 1, _FIELDS]; the last is for rows without a known slot
    factors: Tensor  # [slots + 1, 2]: scale, 1 / (1 - p)
    activations: int  # which occur, a bit each
    width: int  # the largest b
    stride: int  # b of every adapter; 0 where they differ
    columns: int  # of the partial sums of the wanted slots
    drops: bool


@functools.cache  # without bound: a captured graph reads these tensors as long as it lives
def _table(
    hidden: int, widths: tuple[int, ...], biased: tuple[tuple[bool, bool, bool], ...], activations: tuple[str, ...],
    scales: tuple[float, ...], skips: tuple[bool, ...], swaps: tuple[bool, ...], dropout_p: tuple[float, ...],
    wanted: tuple[bool, ...], device: torch.device,
) -> Table:  # fmt: skip
    matrix, partial = 0, 0
    entries, factors = [], []
    count, own = len(widths), [b for b in widths if b]
    # The vectors of H elements lie before the b_down, so that they begin on multiples of H.
    places = itertools.count()
    norm = [(next(places) * hidden, next(places) * hidden) for _ in widths]
    wide = [[next(places) * hidden if has else -1 for has in b[1:]] for b in biased]
    narrow = next(places) * hidden
    for i, b in enumerate(widths):
        least, factor = least_and_factor(dropout_p[i])
        down_bias, narrow = (narrow, narrow + b) if biased[i][0] else (-1, narrow)
        code = code_of(activations[i]) if b else -1
        entries.append([
            b, matrix, matrix + b * hidden, down_bias, *wide[i], *norm[i], int(swaps[i]), int(skips[i]), code,
            int(factor != 1.0), least, partial, int(wanted[i] and b > 0),
        ])  # fmt: skip
        factors.append([scales[i], factor])
        matrix += 2 * b * hidden
        partial += 2 * b * hidden + b + hidden if wanted[i] and b else 0
    entries.append([0, 0, 0, -1, -1, -1, -1, -1, 0, 0, -1, 0, 0, 0, 0])
    factors.append([0.0, 1.0])
    return Table(
        torch.tensor(entries, dtype=torch.int64, device=device),
        torch.tensor(factors, dtype=torch.float32, device=device),
        sum({1 << code_of(activations[i]) for i in range(count) if widths[i]}), max(own, default=0),
        own[0] if len(set(own)) == 1 else 0, partial, any(p > 0.0 for p in dropout_p),
    )  # fmt: skip


def _stacks(x, w_down, b_down, w_up, b_up, vectors, norm_weights, norm_biases):
    """(all matrices, all vectors), in the order that :func:`_table` gives them; wider where dtypes differ."""
    matrices = [m.reshape(-1) for pair in zip(w_down, w_up, strict=True) for m in pair if m is not None]
    norms = [v for pair in zip(norm_weights, norm_biases, strict=True) for v in pair]
    wide = [v for pair in zip(b_up, vectors, strict=True) for v in pair if v is not None]
    return torch.cat(matrices) if matrices else x, torch.cat([*norms, *wide, *(v for v in b_down if v is not None)])


def _table_of(x, w_down, b_down, b_up, vectors, activations, scales, skips, swaps, dropout_p, wanted):
    return _table(
        x.shape[1], tuple(0 if w is None else w.shape[0] for w in w_down),
        tuple((d is not None, u is not None, v is not None) for d, u, v in zip(b_down, b_up, vectors, strict=True)),
        tuple(activations), tuple(scales), tuple(skips), tuple(swaps), tuple(dropout_p), tuple(wanted), x.device,
    )  # fmt: skip


# -- forward -----------------------------------------------------------------------------------------------------


@triton.jit
def _where(block, scalar):
    """``block`` & ``scalar``, booleans; the interpreter makes an integer of a scalar that meets a block in ``&``."""
    return block & (tl.zeros(block.shape, tl.int32) + scalar.to(tl.int32) > 0)


@triton.jit
def _vector(vectors, offset, col, inside, other, ALIGN: tl.constexpr):
    """One of a slot's vectors, float32; ``other`` where it has none."""
    at = vectors + tl.multiple_of(offset, ALIGN) + col
    return tl.load(at, mask=_where(inside, offset >= 0), other=other).to(tl.float32)


@triton.jit
def _dropped(s, seed, row, start, blocks_a_row, entry, factor, ROWS: tl.constexpr, COLS: tl.constexpr):
    kept = keep(tl.load(seed), row, start, blocks_a_row, tl.load(entry + _LEAST), ROWS, COLS)
    return tl.where(tl.load(entry + _DROPS) == 0, s, tl.where(kept, s * factor, 0.0))


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    x, residual, matrices, vectors, y, z_out, s_out, entries, factors, slot_of, seed, length, tiles_a_row, slots, eps,
    blocks_a_row,
    H: tl.constexpr, B: tl.constexpr, WIDEST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, ALIGN: tl.constexpr, ACTIVATIONS: tl.constexpr, DOWN_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr, VECTOR: tl.constexpr, RESIDUAL: tl.constexpr, SWAPS: tl.constexpr, DROPOUT: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = y.dtype.element_ty
    row, within, slot = rows_of_tile(tl.program_id(0), slot_of, length, tiles_a_row, slots, ROWS, True)
    entry = entries + slot * _FIELDS
    known = slot < slots
    row_inside = _where(within, known)[:, None]
    neuron = tl.arange(0, WIDTH)
    width = tl.load(entry + _WIDTH)
    exists = neuron < width
    stride = B if B else width
    scale, factor = tl.load(factors + slot * 2), tl.load(factors + slot * 2 + 1)
    skip, swap = tl.load(entry + _SKIP), tl.load(entry + _SWAP)
    with_x, with_residual = skip + swap > 0, skip + 1 - swap > 0
    read = x
    if SWAPS:
        read = tl.where(swap > 0, residual, x)

    a = tl.zeros((ROWS, WIDTH), dtype)
    if ACTIVATIONS:
        z = tl.zeros((ROWS, WIDTH), tl.float32)
        w_down = matrices + tl.multiple_of(tl.load(entry + _DOWN), ALIGN)
        for start in range(0, tl.where(width > 0, H, 0), COLS):
            col, col_inside = columns_of(start, H, COLS)
            tile = tl.load(read + row[:, None] * H + col[None, :], mask=row_inside & col_inside[None, :], other=0.0)
            at = neuron[None, :] * H + col[:, None]
            w = tl.load(w_down + at, mask=exists[None, :] & col_inside[:, None], other=0.0)
            z = dot(tile, rounded(w, dtype), z, PRECISION)
        if DOWN_BIAS:
            offset = tl.load(entry + _DOWN_BIAS)
            z += rounded(_vector(vectors, offset, neuron, exists, 0.0, 1), dtype).to(tl.float32)[None, :]
        z = rounded(z, dtype)
        if SAVE:
            at_neuron = row[:, None] * WIDEST + neuron[None, :]
            stored = within[:, None] & (neuron < WIDEST)[None, :]
            tl.store(z_out + at_neuron, tl.where(exists[None, :], z, 0.0).to(dtype), mask=stored)
        # σ(0) may be more than 0: neurons that do not exist are cleared after it.
        active = activate_one(z.to(tl.float32), tl.load(entry + _ACTIVATION), ACTIVATIONS)
        a = rounded(tl.where(exists[None, :], active, 0.0), dtype)
    w_up = matrices + tl.multiple_of(tl.load(entry + _UP), ALIGN)

    shift = tl.zeros((ROWS,), tl.float32)  # the first columns' mean; a large mean would lose its digits in the update
    mean = tl.zeros((ROWS,), tl.float32)  # of s - shift, of the columns so far
    squares = tl.zeros((ROWS,), tl.float32)  # Σ (s - shift - mean)²
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        at = row[:, None] * H + col[None, :]
        inside = row_inside & col_inside[None, :]
        s = tl.zeros((ROWS, COLS), tl.float32)
        if ACTIVATIONS:
            at_up = col.to(tl.int64)[None, :] * stride + neuron[:, None]
            w = tl.load(w_up + at_up, mask=exists[:, None] & col_inside[None, :], other=0.0)
            s = dot(a, rounded(w, dtype), s, PRECISION)
            if UP_BIAS:
                own = _vector(vectors, tl.load(entry + _UP_BIAS), col, col_inside, 0.0, ALIGN)
                s += rounded(own, dtype).to(tl.float32)[None, :]
            s *= scale
            if VECTOR:
                s *= _vector(vectors, tl.load(entry + _VECTOR), col, col_inside, 1.0, ALIGN)[None, :]
            if DROPOUT:
                s = _dropped(s, seed, row, start, blocks_a_row, entry, factor, ROWS, COLS)
        s += tl.load(x + at, mask=_where(inside, with_x), other=0.0).to(tl.float32)
        if RESIDUAL:
            s += tl.load(residual + at, mask=_where(inside, with_residual), other=0.0).to(tl.float32)
        s = rounded(s, dtype)
        tl.store(s_out + at, s, mask=within[:, None] & col_inside[None, :])
        s = s.to(tl.float32)
        count = tl.minimum(H - start, COLS).to(tl.float32)
        share = count / (start + count)
        if start == 0:
            shift = tl.sum(tl.where(col_inside[None, :], s, 0.0), 1) / count
        s -= shift[:, None]
        block_mean = tl.sum(tl.where(col_inside[None, :], s, 0.0), 1) / count
        centred = tl.where(col_inside[None, :], s - block_mean[:, None], 0.0)
        step = block_mean - mean
        squares += tl.sum(centred * centred, 1) + step * step * (start * share)
        mean += step * share

    rstd = tl.where(known, 1.0 / tl.sqrt_rn(squares / H + eps), 0.0)
    tl.debug_barrier()  # the rows' sums were written by every thread of this program
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        at = row[:, None] * H + col[None, :]
        inside = within[:, None] & col_inside[None, :]
        s = tl.load(s_out + at, mask=inside, other=0.0).to(tl.float32)
        gamma = _vector(vectors, tl.load(entry + _NORM_WEIGHT), col, col_inside, 0.0, ALIGN)
        beta = _vector(vectors, tl.load(entry + _NORM_BIAS), col, col_inside, 0.0, ALIGN)
        out = (s - shift[:, None] - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
        tl.store(y + at, rounded(out, dtype), mask=inside)


def _any(tensors):
    return any(t is not None for t in tensors)


def forward(
    x, residual, rows, w_down, b_down, w_up, b_up, scale_vectors, norm_weights, norm_biases, activations, scales, skips,
    swaps, eps, dropout_p, seed, save,
):  # fmt: skip
    """``fastadapt::bottleneck_rows_forward``."""
    count, hidden = x.shape
    widest = max((w.shape[0] for w in w_down if w is not None), default=0)
    y = torch.empty_like(x)
    z = x.new_empty((count, widest) if save else (0,))
    s = torch.empty_like(x) if save else x.new_empty(0)
    if count == 0:
        return y, z, s
    table = _table_of(x, w_down, b_down, b_up, scale_vectors, activations, scales, skips, swaps, dropout_p,
                      [False] * len(w_down))  # fmt: skip
    matrices, vectors = _stacks(x, w_down, b_down, w_up, b_up, scale_vectors, norm_weights, norm_biases)
    routing = Routing.of(rows, count, len(w_down))
    tile = launch.bottleneck_routed(
        launch.architecture(x), routing.length, routing.batch_rows, max(widest, 1), x.element_size(),
        matrices.element_size(), backward=False,
    )  # fmt: skip
    tiles_a_row, tiles = routing.tiles(tile.rows)
    drops = table.drops and seed is not None
    forward_kernel[(tiles,)](
        x, residual, matrices, vectors, y, z, s if save else y,  # sums that nobody keeps wait in y
        table.entries, table.factors, routing.slot_of, seed if drops else None, routing.length, tiles_a_row,
        routing.slots, eps, padded_columns(hidden) // 64, H=hidden, B=table.stride, WIDEST=widest,
        WIDTH=launch.power_of_two(widest), ROWS=tile.rows, COLS=tile.cols, ALIGN=math.gcd(16, hidden),
        ACTIVATIONS=table.activations, DOWN_BIAS=_any(b_down), UP_BIAS=_any(b_up), VECTOR=_any(scale_vectors),
        RESIDUAL=residual is not None, SWAPS=any(swaps), DROPOUT=drops, SAVE=save,
        PRECISION=launch.precision(x.dtype), num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return y, z, s


# -- backward ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_COUNTS)
def rows_kernel(
    dy, z, s, matrices, vectors, dx, dresidual, ds, a_out, dz_out, partial, entries, factors, slot_of, seed, length,
    tiles_a_row, slots, eps, blocks_a_row,
    H: tl.constexpr, B: tl.constexpr, WIDEST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, ALIGN: tl.constexpr, ACTIVATIONS: tl.constexpr, VECTOR: tl.constexpr, SWAPS: tl.constexpr,
    DROPOUT: tl.constexpr, FOR_WEIGHTS: tl.constexpr, NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    DS_IS_DRESIDUAL: tl.constexpr, NEED_DNORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds, dx, dresidual and, for the weights' gradients, a and dz of a tile of rows; its part of dγ and dβ."""
    dtype = dy.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row, within, slot = rows_of_tile(tl.program_id(0), slot_of, length, tiles_a_row, slots, ROWS, True)
    entry = entries + slot * _FIELDS
    known = slot < slots
    row_inside = _where(within, known)[:, None]
    neuron = tl.arange(0, WIDTH)
    width = tl.load(entry + _WIDTH)
    exists = neuron < width
    stride = B if B else width
    scale, factor = tl.load(factors + slot * 2), tl.load(factors + slot * 2 + 1)
    norm_weight = tl.load(entry + _NORM_WEIGHT)

    shift = tl.zeros((ROWS,), tl.float32)  # the first columns' mean, as in forward
    mean = tl.zeros((ROWS,), tl.float32)  # of s - shift
    squares = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)  # Σ d
    moment = tl.zeros((ROWS,), tl.float32)  # Σ d (s - shift - mean), with the mean of the columns so far
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        at = row[:, None] * H + col[None, :]
        inside = row_inside & col_inside[None, :]
        v = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
        gamma = _vector(vectors, norm_weight, col, col_inside, 0.0, ALIGN)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * gamma[None, :]
        count = tl.minimum(H - start, COLS).to(tl.float32)
        share = count / (start + count)
        if start == 0:
            shift = tl.sum(v, 1) / count
        v = tl.where(col_inside[None, :], v - shift[:, None], 0.0)
        block_mean = tl.sum(v, 1) / count
        centred = tl.where(col_inside[None, :], v - block_mean[:, None], 0.0)
        block_total = tl.sum(d, 1)
        step = block_mean - mean
        squares += tl.sum(centred * centred, 1) + step * step * (start * share)
        moment += tl.sum(d * centred, 1) + block_total * step * (1.0 - share) - total * step * share
        total += block_total
        mean += step * share
    # Rows past the end are all zero; with eps = 0 their rstd would be infinite.
    rstd = tl.where(_where(within, known), 1.0 / tl.sqrt_rn(squares / H + eps), 0.0)
    mean_d = total / H
    along = moment * rstd / H

    da = tl.zeros((ROWS, WIDTH), tl.float32)
    w_up = matrices + tl.multiple_of(tl.load(entry + _UP), ALIGN)
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        at = row[:, None] * H + col[None, :]
        inside = row_inside & col_inside[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
        gamma = _vector(vectors, norm_weight, col, col_inside, 0.0, ALIGN)
        normalised = (v - shift[:, None] - mean[:, None]) * rstd[:, None]
        if NEED_DNORM:
            tl.store(partial + program * (2 * H) + col, tl.sum(g * normalised, 0), mask=col_inside)
            tl.store(partial + program * (2 * H) + H + col, tl.sum(g, 0), mask=col_inside)
        g = rstd[:, None] * (g * gamma[None, :] - mean_d[:, None] - normalised * along[:, None])
        tl.store(ds + at, rounded(g, dtype), mask=within[:, None] & col_inside[None, :])
        if ACTIVATIONS and (NEED_DX or NEED_DRESIDUAL or FOR_WEIGHTS):
            if DROPOUT:
                g = _dropped(g, seed, row, start, blocks_a_row, entry, factor, ROWS, COLS)
            g *= scale
            if VECTOR:
                g *= _vector(vectors, tl.load(entry + _VECTOR), col, col_inside, 1.0, ALIGN)[None, :]
            at_up = col.to(tl.int64)[:, None] * stride + neuron[None, :]
            w = tl.load(w_up + at_up, mask=col_inside[:, None] & exists[None, :], other=0.0)
            # x̂ of columns past H is not zero: a select, since their weight's zero would not hide a NaN.
            g = rounded(tl.where(inside, g, 0.0), dtype)
            da = dot(g, rounded(w, dtype), da, PRECISION)

    if NEED_DX or NEED_DRESIDUAL or FOR_WEIGHTS:
        skip, swap = tl.load(entry + _SKIP) > 0, tl.load(entry + _SWAP) > 0
        dz = tl.zeros((ROWS, WIDTH), dtype)
        if ACTIVATIONS:
            at_neuron = row[:, None] * WIDEST + neuron[None, :]
            neuron_inside = row_inside & exists[None, :]
            stored = within[:, None] & (neuron < WIDEST)[None, :]
            code = tl.load(entry + _ACTIVATION)
            pre = tl.load(z + at_neuron, mask=neuron_inside, other=0.0).to(tl.float32)
            dz = rounded(tl.where(neuron_inside, da * derivative_one(pre, code, ACTIVATIONS), 0.0), dtype)
            if FOR_WEIGHTS:
                a = tl.where(neuron_inside, activate_one(pre, code, ACTIVATIONS), 0.0)
                tl.store(dz_out + at_neuron, dz, mask=stored)
                tl.store(a_out + at_neuron, rounded(a, dtype), mask=stored)
        if NEED_DX or (SWAPS and NEED_DRESIDUAL):
            tl.debug_barrier()  # ds was written by every thread of this program
            w_down = matrices + tl.multiple_of(tl.load(entry + _DOWN), ALIGN)
            for start in range(0, H, COLS):
                col, col_inside = columns_of(start, H, COLS)
                at = row[:, None] * H + col[None, :]
                inside = within[:, None] & col_inside[None, :]
                through = tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
                out = tl.where(skip, through, 0.0)
                if ACTIVATIONS:
                    at_down = neuron[:, None] * H + col[None, :]
                    w = tl.load(w_down + at_down, mask=exists[:, None] & col_inside[None, :], other=0.0)
                    out += dot(dz, rounded(w, dtype), tl.zeros((ROWS, COLS), tl.float32), PRECISION)
                if NEED_DX:
                    tl.store(dx + at, rounded(tl.where(swap, through, out), dtype), mask=inside)
                if NEED_DRESIDUAL and not DS_IS_DRESIDUAL:
                    tl.store(dresidual + at, rounded(tl.where(swap, out, through), dtype), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def weights_kernel(
    ds, x, residual, a, dz, partial, entries, factors, slot_of, seed, length, chunk, chunks_a_row, chunks,
    chunks_a_split, columns, blocks_a_row,
    H: tl.constexpr, B: tl.constexpr, WIDEST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SWAPS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split's part of each wanted slot's [dW_down, db_down, dW_up / scale, db_up / scale], in this order."""
    dtype = ds.dtype.element_ty
    start = tl.program_id(0) * COLS
    slot = tl.program_id(1) // BLOCKS
    first_neuron = tl.program_id(1) % BLOCKS * WIDTH
    split = tl.program_id(2)
    entry = entries + slot * _FIELDS
    width = tl.load(entry + _WIDTH)
    stride = B if B else width
    col, col_inside = columns_of(start, H, COLS)
    neuron = first_neuron + tl.arange(0, WIDTH)
    exists = neuron < width
    factor = tl.load(factors + slot * 2 + 1)
    read = x
    if SWAPS:
        read = tl.where(tl.load(entry + _SWAP) != 0, residual, x)
    if tl.load(entry + _WANTED) != 0:
        down = tl.zeros((WIDTH, COLS), tl.float32)
        up = tl.zeros((COLS, WIDTH), tl.float32)
        down_bias = tl.zeros((WIDTH,), tl.float32)
        up_bias = tl.zeros((COLS,), tl.float32)
        for piece in tl.range(split * chunks_a_split, tl.minimum((split + 1) * chunks_a_split, chunks), num_stages=1):
            batch_row = piece // chunks_a_row
            first = piece % chunks_a_row * chunk
            end = tl.minimum(first + chunk, length)
            # Nothing to walk over in a batch row of another slot.
            end = tl.where(tl.load(slot_of + batch_row) == slot, end, first)
            for step in range(first, end, ROWS):
                within = step + tl.arange(0, ROWS)
                row = batch_row.to(tl.int64) * length + within
                row_inside = (within < end)[:, None]
                at = row[:, None] * H + col[None, :]
                inside = row_inside & col_inside[None, :]
                at_neuron = row[:, None] * WIDEST + neuron[None, :]
                neuron_inside = row_inside & exists[None, :]
                d = tl.load(dz + at_neuron, mask=neuron_inside, other=0.0)
                down_bias += tl.sum(d.to(tl.float32), 0)
                down = dot(tl.trans(d), tl.load(read + at, mask=inside, other=0.0), down, PRECISION)
                activated = tl.load(a + at_neuron, mask=neuron_inside, other=0.0)
                g = tl.load(ds + at, mask=inside, other=0.0)
                if DROPOUT:
                    g = _dropped(g.to(tl.float32), seed, row, start, blocks_a_row, entry, factor, ROWS, COLS)
                    g = rounded(g, dtype)
                up_bias += tl.sum(g.to(tl.float32), 0)
                up = dot(tl.trans(g), activated, up, PRECISION)

        mine = partial + split.to(tl.int64) * columns + tl.load(entry + _PARTIAL)
        at_down = neuron.to(tl.int64)[:, None] * H + col[None, :]
        tl.store(mine + at_down, down, mask=exists[:, None] & col_inside[None, :])
        if start == 0:
            tl.store(mine + width * H + neuron, down_bias, mask=exists)
        at_up = col.to(tl.int64)[:, None] * stride + neuron[None, :]
        tl.store(mine + width * (H + 1) + at_up, up, mask=col_inside[:, None] & exists[None, :])
        if first_neuron == 0:
            tl.store(mine + width * (2 * H + 1) + col, up_bias, mask=col_inside)


def backward(
    dy, x, residual, z, s, rows, w_down, w_up, scale_vectors, norm_weights, activations, scales, skips, swaps, eps,
    dropout_p, seed, need_dx, need_dresidual, need_dweights, need_dnorm,
):  # fmt: skip
    """``fastadapt::bottleneck_rows_backward``."""
    (count, hidden), slots = dy.shape, len(w_down)
    widths = [0 if w is None else w.shape[0] for w in w_down]
    widest = max(widths)
    wanted = [need and b > 0 for need, b in zip(need_dweights, widths, strict=True)]
    dx = torch.empty_like(dy) if need_dx else dy.new_empty(0)
    dresidual = torch.empty_like(dy) if need_dresidual else dy.new_empty(0)
    shapes = [
        [(b, hidden), (b,), (hidden, b), (hidden,)] if want else [] for b, want in zip(widths, wanted, strict=True)
    ]
    grads = [[dy.new_zeros(0, dtype=torch.float32) for _ in range(6)] for _ in w_down]
    if count == 0:
        for own, of_slot, norm in zip(grads, shapes, need_dnorm, strict=True):
            own[: len(of_slot)] = [dy.new_zeros(shape, dtype=torch.float32) for shape in of_slot]
            own[4:] = [dy.new_zeros((hidden,) if norm else (0,), dtype=torch.float32) for _ in range(2)]
        return dx, dresidual, *(list(of) for of in zip(*grads, strict=True))

    arch, routing = launch.architecture(dy), Routing.of(rows, count, slots)
    none = [None] * slots
    table = _table_of(dy, w_down, none, none, scale_vectors, activations, scales, skips, swaps, dropout_p, wanted)
    matrices, vectors = _stacks(dy, w_down, none, w_up, none, scale_vectors, norm_weights, norm_weights)
    drops, for_weights, for_norm = table.drops and seed is not None, any(wanted), any(need_dnorm)
    swap, blocks_a_row = any(swaps), padded_columns(hidden) // 64
    ds_is_dresidual = need_dresidual and not swap
    ds = dresidual if ds_is_dresidual else torch.empty_like(dy)
    a, dz = (dy.new_empty((count, widest) if for_weights else (0,)) for _ in range(2))
    tile = launch.bottleneck_routed(
        arch, routing.length, routing.batch_rows, max(widest, 1), dy.element_size(), matrices.element_size(),
        backward=True,
    )  # fmt: skip
    tiles_a_row, tiles = routing.tiles(tile.rows)
    partial = dy.new_empty((tiles, 2 * hidden) if for_norm else (0,), dtype=torch.float32)
    rows_kernel[(tiles,)](
        dy, z, s, matrices, vectors, dx, dresidual, ds, a, dz, partial, table.entries, table.factors, routing.slot_of,
        seed if drops else None, routing.length, tiles_a_row, slots, eps, blocks_a_row, H=hidden, B=table.stride,
        WIDEST=widest, WIDTH=launch.power_of_two(widest), ROWS=tile.rows, COLS=tile.cols, ALIGN=math.gcd(16, hidden),
        ACTIVATIONS=table.activations, VECTOR=_any(scale_vectors), SWAPS=swap, DROPOUT=drops,
        FOR_WEIGHTS=for_weights, NEED_DX=need_dx, NEED_DRESIDUAL=need_dresidual, DS_IS_DRESIDUAL=ds_is_dresidual,
        NEED_DNORM=for_norm, PRECISION=launch.precision(dy.dtype), num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
    )  # fmt: skip
    if for_norm:
        sums = slot_sum(partial, routing.slot_of, slots)
        for i, own in enumerate(grads):
            own[4:] = [g.clone() for g in sums[i].split(hidden)] if need_dnorm[i] else own[4:]
    if for_weights:
        tile = launch.routed_weights(arch, routing.length, routing.batch_rows, hidden, slots, widest, dy.element_size())
        blocks = triton.cdiv(widest, tile.bottleneck)
        partial = dy.new_empty((tile.splits, table.columns), dtype=torch.float32)
        weights_kernel[(triton.cdiv(hidden, tile.cols), slots * blocks, tile.splits)](
            ds, x, residual, a, dz, partial, table.entries, table.factors, routing.slot_of, seed if drops else None,
            routing.length, tile.chunk, tile.chunks_a_row, tile.chunks_a_row * routing.batch_rows,
            tile.chunks_a_split, table.columns, blocks_a_row, H=hidden, B=table.stride, WIDEST=widest, ROWS=tile.rows,
            COLS=tile.cols, WIDTH=tile.bottleneck, BLOCKS=blocks, SWAPS=swap, DROPOUT=drops,
            PRECISION=launch.precision(dy.dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        sums = iter(ordered_sum(partial, [shape for of_slot in shapes for shape in of_slot]))
        for own, of_slot in zip(grads, shapes, strict=True):
            own[: len(of_slot)] = [next(sums) for _ in of_slot]
    return dx, dresidual, *(list(of) for of in zip(*grads, strict=True))
