"""The bottleneck adapter with its skip, residual, dropout and LayerNorm.

    z = x W_downᵀ + b_down,  a = σ(z),  o = scale · (a W_upᵀ + b_up)
    s = drop(o) + [x if skip] + [residual],  y = LN(s) or s

    ds = LN'(dy) or dy,  g = drop(ds),  da = (scale · g) W_up,  dz = σ'(z) da
    dx = dz W_down + [ds if skip],  dresidual = ds
    dW_down = dzᵀ x,  db_down = Σ dz,  dW_up / scale = gᵀ a,  db_up / scale = Σ g,  dγ = Σ dy x̂,  dβ = Σ dy

Forward is one kernel: a program holds the bottleneck of its rows and walks twice over H, down and up. LayerNorm's
statistics gather on the way up (Chan et al. 1979, the pairwise update), and a last walk normalises what is still in
cache. Backward is a kernel over rows, and one over tiles of the weights whose split rows are summed in order.
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


@triton.jit
def columns_of(start, H: tl.constexpr, COLS: tl.constexpr):
    """Columns of a block of H, and which of them exist."""
    col = start + tl.arange(0, COLS)
    return col, (tl.full((COLS,), True, tl.int1) if H % COLS == 0 else col < H)


@triton.jit
def forward_kernel(
    x, w_down, b_down, w_up, b_up, scale_vector, residual, norm_weight, norm_bias, y, z_out, s_out, seed, rows,
    scale, eps, least, factor, blocks_a_row,
    H: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACTIVATION: tl.constexpr, DOWN_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, VECTOR: tl.constexpr,
    SKIP: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    neuron = tl.arange(0, WIDTH)
    row_inside = (row < rows)[:, None]
    exists = neuron < B

    z = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        tile = tl.load(x + row[:, None] * H + col[None, :], mask=row_inside & col_inside[None, :], other=0.0)
        w = tl.load(w_down + neuron[None, :] * H + col[:, None], mask=exists[None, :] & col_inside[:, None], other=0.0)
        z = dot(tile, rounded(w, dtype), z, PRECISION)
    if DOWN_BIAS:
        z += rounded(tl.load(b_down + neuron, mask=exists, other=0.0), dtype).to(tl.float32)[None, :]
    z = rounded(z, dtype)
    if SAVE:
        tl.store(z_out + row[:, None] * B + neuron[None, :], z, mask=row_inside & exists[None, :])
    # σ(0) may be more than 0: neurons that do not exist are cleared after it.
    a = rounded(tl.where(exists[None, :], activate(z.to(tl.float32), ACTIVATION), 0.0), dtype)

    shift = tl.zeros((ROWS,), tl.float32)  # the first columns' mean; a large mean would lose its digits in the update
    mean = tl.zeros((ROWS,), tl.float32)  # of s - shift, of the columns so far
    squares = tl.zeros((ROWS,), tl.float32)  # Σ (s - shift - mean)²
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        at = row[:, None] * H + col[None, :]
        inside = row_inside & col_inside[None, :]
        w = tl.load(w_up + col[None, :] * B + neuron[:, None], mask=exists[:, None] & col_inside[None, :], other=0.0)
        s = dot(a, rounded(w, dtype), tl.zeros((ROWS, COLS), tl.float32), PRECISION)
        if UP_BIAS:
            s += rounded(tl.load(b_up + col, mask=col_inside, other=0.0), dtype).to(tl.float32)[None, :]
        s *= scale
        if VECTOR:
            s *= tl.load(scale_vector + col, mask=col_inside, other=0.0).to(tl.float32)[None, :]
        if DROPOUT:
            s = drop(s, tl.load(seed), row, start, blocks_a_row, least, factor, ROWS, COLS)
        if SKIP:
            s += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        s = rounded(s, dtype)
        tl.store(s_out + at, s, mask=inside)
        if NORM:
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

    if NORM:
        rstd = 1.0 / tl.sqrt_rn(squares / H + eps)
        tl.debug_barrier()  # the rows' sums were written by every thread of this program
        for start in range(0, H, COLS):
            col, col_inside = columns_of(start, H, COLS)
            at = row[:, None] * H + col[None, :]
            inside = row_inside & col_inside[None, :]
            s = tl.load(s_out + at, mask=inside, other=0.0).to(tl.float32)
            gamma = tl.load(norm_weight + col, mask=col_inside, other=0.0).to(tl.float32)
            beta = tl.load(norm_bias + col, mask=col_inside, other=0.0).to(tl.float32)
            out = (s - shift[:, None] - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
            tl.store(y + at, rounded(out, dtype), mask=inside)


def forward(
    x, w_down, b_down, w_up, b_up, activation, scale, scale_vector, skip, residual, norm_weight, norm_bias, eps,
    dropout_p, seed, save,
):  # fmt: skip
    """``fastadapt::bottleneck_forward``."""
    (rows, hidden), b = x.shape, w_down.shape[0]
    norm = norm_weight is not None
    y = torch.empty_like(x)
    z = x.new_empty((rows, b) if save else (0,))
    s = torch.empty_like(x) if save and norm else x.new_empty(0)
    if rows == 0:
        return y, z, s
    tile = launch.bottleneck_rows(
        launch.architecture(x), rows, b, x.element_size(), w_down.element_size(), backward=False
    )
    dropout = Dropout.of(dropout_p, seed)
    w_down, b_down, w_up, b_up, scale_vector, norm_weight, norm_bias = (
        None if p is None else p.contiguous()
        for p in (w_down, b_down, w_up, b_up, scale_vector, norm_weight, norm_bias)
    )
    forward_kernel[(triton.cdiv(rows, tile.rows),)](
        x, w_down, b_down, w_up, b_up, scale_vector, residual, norm_weight, norm_bias, y, z,
        s if save and norm else y,  # sums that nobody keeps wait in y
        dropout.seed, rows, scale, eps, dropout.least, dropout.factor, padded_columns(hidden) // 64, H=hidden, B=b,
        WIDTH=launch.power_of_two(b), ROWS=tile.rows, COLS=tile.cols, ACTIVATION=activation,
        DOWN_BIAS=b_down is not None, UP_BIAS=b_up is not None, VECTOR=scale_vector is not None, SKIP=skip,
        RESIDUAL=residual is not None, NORM=norm, DROPOUT=dropout.on, SAVE=save,
        PRECISION=launch.precision(x.dtype), num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return y, z, s


@triton.jit
def rows_kernel(
    dy, z, s, w_down, w_up, scale_vector, norm_weight, dx, ds, a_out, dz_out, partial, seed, rows, scale, eps,
    least, factor, blocks_a_row,
    H: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, SKIP: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr, WRITE_DS: tl.constexpr, FOR_WEIGHTS: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DNORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds, dx and, for the weights' gradients, a and dz of a tile of rows; its part of dγ and dβ."""
    dtype = dy.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    neuron = tl.arange(0, WIDTH)
    row_inside = (row < rows)[:, None]
    exists = neuron < B

    shift = tl.zeros((ROWS,), tl.float32)  # the first columns' mean, as in forward
    mean = tl.zeros((ROWS,), tl.float32)  # of s - shift
    rstd = tl.zeros((ROWS,), tl.float32)
    mean_d = tl.zeros((ROWS,), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)  # mean(d x̂)
    if NORM:
        squares = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)  # Σ d
        moment = tl.zeros((ROWS,), tl.float32)  # Σ d (s - shift - mean), with the mean of the columns so far
        for start in range(0, H, COLS):
            col, col_inside = columns_of(start, H, COLS)
            at = row[:, None] * H + col[None, :]
            inside = row_inside & col_inside[None, :]
            v = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
            gamma = tl.load(norm_weight + col, mask=col_inside, other=0.0).to(tl.float32)
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
        rstd = tl.where(row < rows, 1.0 / tl.sqrt_rn(squares / H + eps), 0.0)
        mean_d = total / H
        along = moment * rstd / H

    da = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, H, COLS):
        col, col_inside = columns_of(start, H, COLS)
        at = row[:, None] * H + col[None, :]
        inside = row_inside & col_inside[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            v = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
            gamma = tl.load(norm_weight + col, mask=col_inside, other=0.0).to(tl.float32)
            normalised = (v - shift[:, None] - mean[:, None]) * rstd[:, None]
            if NEED_DNORM:
                tl.store(partial + program * (2 * H) + col, tl.sum(g * normalised, 0), mask=col_inside)
                tl.store(partial + program * (2 * H) + H + col, tl.sum(g, 0), mask=col_inside)
            g = rstd[:, None] * (g * gamma[None, :] - mean_d[:, None] - normalised * along[:, None])
            if WRITE_DS:
                tl.store(ds + at, rounded(g, dtype), mask=inside)
        if NEED_DX or FOR_WEIGHTS:
            if DROPOUT:
                g = drop(g, tl.load(seed), row, start, blocks_a_row, least, factor, ROWS, COLS)
            g *= scale
            if VECTOR:
                g *= tl.load(scale_vector + col, mask=col_inside, other=0.0).to(tl.float32)[None, :]
            w = tl.load(
                w_up + col[:, None] * B + neuron[None, :], mask=col_inside[:, None] & exists[None, :], other=0.0
            )
            # x̂ of columns past H is not zero: a select, since their weight's zero would not hide a NaN.
            g = rounded(tl.where(inside, g, 0.0), dtype)
            da = dot(g, rounded(w, dtype), da, PRECISION)

    if NEED_DX or FOR_WEIGHTS:
        at_neuron = row[:, None] * B + neuron[None, :]
        neuron_inside = row_inside & exists[None, :]
        pre = tl.load(z + at_neuron, mask=neuron_inside, other=0.0).to(tl.float32)
        dz = rounded(tl.where(neuron_inside, da * derivative(pre, ACTIVATION), 0.0), dtype)
        if FOR_WEIGHTS:
            tl.store(dz_out + at_neuron, dz, mask=neuron_inside)
            tl.store(a_out + at_neuron, rounded(activate(pre, ACTIVATION), dtype), mask=neuron_inside)
        if NEED_DX:
            if NORM and SKIP:
                tl.debug_barrier()  # ds was written by every thread of this program
            for start in range(0, H, COLS):
                col, col_inside = columns_of(start, H, COLS)
                at = row[:, None] * H + col[None, :]
                inside = row_inside & col_inside[None, :]
                w = tl.load(
                    w_down + neuron[:, None] * H + col[None, :], mask=exists[:, None] & col_inside[None, :], other=0.0
                )
                out = dot(dz, rounded(w, dtype), tl.zeros((ROWS, COLS), tl.float32), PRECISION)
                if SKIP:
                    through = ds if NORM else dy
                    out += tl.load(through + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(dx + at, rounded(out, dtype), mask=inside)


@triton.jit
def weights_kernel(
    ds, x, a, dz, partial, seed, rows, rows_a_split, least, factor, blocks_a_row,
    H: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr, NEED_DOWN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split's part of [dW_down, db_down, dW_up / scale, db_up / scale], which lie in this order."""
    dtype = ds.dtype.element_ty
    start = tl.program_id(0) * COLS
    first_neuron = tl.program_id(1) * WIDTH
    split = tl.program_id(2).to(tl.int64)
    col, col_inside = columns_of(start, H, COLS)
    neuron = first_neuron + tl.arange(0, WIDTH)
    exists = neuron < B

    down = tl.zeros((WIDTH, COLS), tl.float32)
    up = tl.zeros((COLS, WIDTH), tl.float32)
    down_bias = tl.zeros((WIDTH,), tl.float32)
    up_bias = tl.zeros((COLS,), tl.float32)
    first = split * rows_a_split
    for step in range(0, rows_a_split, ROWS):
        row = first + step + tl.arange(0, ROWS)
        row_inside = (row < rows)[:, None]
        at = row[:, None] * H + col[None, :]
        inside = row_inside & col_inside[None, :]
        at_neuron = row[:, None] * B + neuron[None, :]
        neuron_inside = row_inside & exists[None, :]
        d = tl.load(dz + at_neuron, mask=neuron_inside, other=0.0)
        down_bias += tl.sum(d.to(tl.float32), 0)
        if NEED_DOWN:
            tile = tl.load(x + at, mask=inside, other=0.0)
            down = dot(tl.trans(d), tile, down, PRECISION)
        activated = tl.load(a + at_neuron, mask=neuron_inside, other=0.0)
        g = tl.load(ds + at, mask=inside, other=0.0)
        if DROPOUT:
            g = drop(g.to(tl.float32), tl.load(seed), row, start, blocks_a_row, least, factor, ROWS, COLS)
            g = rounded(g, dtype)
        up_bias += tl.sum(g.to(tl.float32), 0)
        up = dot(tl.trans(g), activated, up, PRECISION)

    mine = partial + split * (2 * B * H + B + H)
    if NEED_DOWN:
        at_down = neuron.to(tl.int64)[:, None] * H + col[None, :]
        tl.store(mine + at_down, down, mask=exists[:, None] & col_inside[None, :])
    if start == 0:
        tl.store(mine + B * H + neuron, down_bias, mask=exists)
    at_up = col.to(tl.int64)[:, None] * B + neuron[None, :]
    tl.store(mine + (B * H + B) + at_up, up, mask=col_inside[:, None] & exists[None, :])
    if first_neuron == 0:
        tl.store(mine + (2 * B * H + B) + col, up_bias, mask=col_inside)


def backward(
    dy, x, z, s, w_down, w_up, activation, scale, scale_vector, skip, norm_weight, eps, dropout_p, seed, need_dx,
    need_dresidual, need_dweights, need_dnorm,
):  # fmt: skip
    """``fastadapt::bottleneck_backward``."""
    (rows, hidden), b = dy.shape, w_down.shape[0]
    norm = norm_weight is not None
    need_dnorm = need_dnorm and norm
    weight_shapes = [(b, hidden), (b,), (hidden, b), (hidden,)] if need_dweights else [(0,)] * 4
    norm_shapes = [(hidden,), (hidden,)] if need_dnorm else [(0,)] * 2
    dx = torch.empty_like(dy) if need_dx else dy.new_empty(0)
    dresidual = torch.empty_like(dy) if need_dresidual else dy.new_empty(0)
    if rows == 0:
        wide = (dy.new_zeros(shape, dtype=torch.float32) for shape in weight_shapes + norm_shapes)
        return dx, dresidual, *wide

    arch, dropout = launch.architecture(dy), Dropout.of(dropout_p, seed)
    w_down, w_up, scale_vector, norm_weight = (
        None if p is None else p.contiguous() for p in (w_down, w_up, scale_vector, norm_weight)
    )
    blocks_a_row = padded_columns(hidden) // 64
    ds = dy
    if not norm:
        if need_dresidual:
            dresidual.copy_(dy)
    elif need_dresidual:
        ds = dresidual
    elif need_dweights or (need_dx and skip):
        ds = torch.empty_like(dy)
    a, dz = (dy.new_empty((rows, b) if need_dweights else (0,)) for _ in range(2))
    norm_gradients = [dy.new_empty(0, dtype=torch.float32) for _ in range(2)]
    if need_dx or need_dweights or (norm and (need_dresidual or need_dnorm)):
        tile = launch.bottleneck_rows(arch, rows, b, dy.element_size(), w_down.element_size(), backward=True)
        programs = triton.cdiv(rows, tile.rows)
        partial = dy.new_empty((programs, 2 * hidden) if need_dnorm else (0,), dtype=torch.float32)
        rows_kernel[(programs,)](
            dy, z, s, w_down, w_up, scale_vector, norm_weight, dx, ds, a, dz, partial, dropout.seed, rows, scale, eps,
            dropout.least, dropout.factor, blocks_a_row, H=hidden, B=b, WIDTH=launch.power_of_two(b), ROWS=tile.rows,
            COLS=tile.cols, ACTIVATION=activation, VECTOR=scale_vector is not None, SKIP=skip, NORM=norm,
            DROPOUT=dropout.on, WRITE_DS=ds is not dy, FOR_WEIGHTS=need_dweights, NEED_DX=need_dx,
            NEED_DNORM=need_dnorm, PRECISION=launch.precision(dy.dtype), num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        if need_dnorm:
            norm_gradients = ordered_sum(partial, norm_shapes)

    weight_gradients = [dy.new_empty(0, dtype=torch.float32) for _ in range(4)]
    if need_dweights:
        need_down = x.shape[0] == rows  # x is not kept where W_down and b_down are frozen
        tile = launch.bottleneck_weights(arch, rows, hidden, b, dy.element_size())
        partial = dy.new_empty((tile.splits, 2 * b * hidden + b + hidden), dtype=torch.float32)
        if not need_down:
            partial[:, : b * hidden].zero_()
        weights_kernel[(triton.cdiv(hidden, tile.cols), triton.cdiv(b, tile.bottleneck), tile.splits)](
            ds, x, a, dz, partial, dropout.seed, rows, tile.rows_a_split, dropout.least, dropout.factor, blocks_a_row,
            H=hidden, B=b, ROWS=tile.rows, COLS=tile.cols, WIDTH=tile.bottleneck,
            DROPOUT=dropout.on, NEED_DOWN=need_down, PRECISION=launch.precision(dy.dtype), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        weight_gradients = ordered_sum(partial, weight_shapes)
    return dx, dresidual, *weight_gradients, *norm_gradients
