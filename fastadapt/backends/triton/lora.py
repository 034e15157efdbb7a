"""Linear layers with low-rank additions; the rows of a batch may differ in them.

    s_e = scale_e drop_e(x) A_eᵀ,  z = x W_iᵀ + bias_i + Σ_e s_e B_eᵀ,  y = drop(σ(z))

    dz = σ'(z) drop(dy),  t_e = scale_e dz B_e,  dx = dz W + Σ_e drop_e(t_e A_e)
    dA_e = t_eᵀ drop_e(x),  dB_e = dzᵀ s_e,  dbias = Σ_rows dz

with e over the LoRAs of the row's slot. y and dx are the same product: what comes in times W, and behind it a step for
each LoRA, [x | s] [W | B]ᵀ and [dz | t] [W; A]. A small LoRA's s (or t) is made by every tile of that product, which
reads x anyway; a larger one's, or one with dropout, by a launch of its own. dA and dB are sums over split rows, added
in order.

A tile lies within one batch row, so that it has one slot, read from ``rows`` itself: nothing is sorted, no table is
made of it and the host never looks at it. What the LoRAs are (their shapes, scales and places) is a table made once
for each such set and kept. Matrices of several LoRAs are stacked by a copy in every call: a table of their addresses
would go stale when a captured graph is replayed after a matrix moved, and the copy is small beside the product.
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
from fastadapt.backends.triton.activation import activate
from fastadapt.backends.triton.dropout import Dropout, drop, keep, least_and_factor, padded_columns
from fastadapt.backends.triton.linear import epilogue_gradient, stacked
from fastadapt.backends.triton.numeric import dot, rounded
from fastadapt.backends.triton.partial import ordered_sum, slot_sum
from fastadapt.ops.schemas import lora_offsets

# -- the table of LoRAs ------------------------------------------------------------------------------------------

# Its columns; the LoRAs lie in it by slot and within a slot by weight.
_LOW = tl.constexpr(0)  # first column of s
_RANK = tl.constexpr(1)
_A = tl.constexpr(2)  # where A begins in the stack of all A
_B = tl.constexpr(3)
_FIRST = tl.constexpr(4)  # first column of y that the weight has
_COLUMNS = tl.constexpr(5)  # how many it has
_SLOT = tl.constexpr(6)
_NUMBER = tl.constexpr(7)  # among the op's LoRAs
_DROPS = tl.constexpr(8)
_LEAST = tl.constexpr(9)
_FIELDS = tl.constexpr(10)

# Arguments that count something and enter no row's address: no kernel is compiled anew for their being 1 or even.
_COUNTS = ("rows", "length", "row_tiles", "tiles_a_row", "slots", "chunk", "chunks_a_row", "chunks", "chunks_a_split",
           "blocks_a_row")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Table:
    """The LoRAs of an op, for kernels and for their launch."""

    entries: Tensor  # [LoRAs, _FIELDS]
    factors: Tensor  # [LoRAs, 2]: scale, 1 / (1 - p)
    spans: Tensor  # where the LoRAs of (slot, weight) begin; an empty slot more, for rows without a known one
    width: int  # columns of s
    filled: bool  # each slot has them all
    a_slot: int  # most LoRAs of a slot
    rank: int  # the largest
    columns: int  # of each LoRA's weight; 0 where they differ
    align: int  # divides the first column and the columns of each LoRA's weight
    drops: bool


@functools.cache  # without bound: a captured graph reads these tensors as long as it lives
def _table(
    ranks: tuple[int, ...], owners: tuple[int, ...], slots: tuple[int, ...], slot_count: int, outputs: tuple[int, ...],
    features: int, scales: tuple[float, ...], lora_p: tuple[float, ...], device: torch.device,
) -> Table:  # fmt: skip
    offsets, width = lora_offsets(ranks, slots)
    firsts = [0, *itertools.accumulate(outputs)]
    a_begins = [0, *itertools.accumulate(r * features for r in ranks)]
    b_begins = [0, *itertools.accumulate(r * outputs[w] for r, w in zip(ranks, owners, strict=True))]
    order = sorted(range(len(ranks)), key=lambda i: (slots[i], owners[i], i))
    entries, factors = [], []
    for i in order:
        least, factor = least_and_factor(lora_p[i])
        columns, drops = outputs[owners[i]], int(factor != 1.0)
        entries.append([offsets[i], ranks[i], a_begins[i], b_begins[i], firsts[owners[i]], columns, slots[i], i,
                        drops, least])  # fmt: skip
        factors.append([scales[i], factor])
    places = [(slots[i], owners[i]) for i in order]
    spans = [
        sum(place < (slot, weight) for place in places)
        for slot, weight in itertools.product(range(slot_count + 1), range(len(outputs)))
    ]
    used = {slot: sum(r for r, s in zip(ranks, slots, strict=True) if s == slot) for slot in range(slot_count)}
    columns = {outputs[w] for w in owners}
    return Table(
        torch.tensor(entries, dtype=torch.int64, device=device),
        torch.tensor(factors, dtype=torch.float32, device=device),
        torch.tensor([*spans, len(order)], dtype=torch.int64, device=device),
        width, all(n == width for n in used.values()), max(slots.count(s) for s in range(slot_count)),
        max(ranks, default=1), columns.pop() if len(columns) == 1 else 0,
        math.gcd(16, *(firsts[w] for w in owners), *(outputs[w] for w in owners)), any(p > 0.0 for p in lora_p),
    )  # fmt: skip


def _flat(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All of them one behind the other; a single one as it is, in its own dtype."""
    if len(matrices) == 1:
        return matrices[0].contiguous()
    return torch.cat([m.to(dtype).reshape(-1) for m in matrices])


# -- products ----------------------------------------------------------------------------------------------------


@triton.jit
def rows_of_tile(tile, slot_of, length, tiles_a_row, slots, ROWS: tl.constexpr, ROUTED: tl.constexpr):
    """(rows of a tile, which of them exist, their slot); a tile does not cross into the next batch row."""
    if ROUTED:
        within = (tile % tiles_a_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        batch_row = tile // tiles_a_row
        slot = tl.load(slot_of + batch_row)
        slot = tl.where((slot >= 0) & (slot < slots), slot, slots)
        return batch_row.to(tl.int64) * length + within, within < length, slot
    else:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        return row, row < length, tl.full((), 0, tl.int64)


@triton.jit
def _tile_of_program(row_tiles, first_column, N: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, first column of y). Programs go down GROUP row tiles before the next column tile (weights in L2)."""
    program = tl.program_id(0)
    aligned = first_column // 64 * 64  # a tile of the mask starts on a block of its stream
    column_tiles = tl.cdiv(first_column - aligned + N, COLS)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return group * GROUP + within % height, aligned + within // height * COLS


@triton.jit
def _epilogue(
    total, bias, y, z, seed, row, row_inside, column, n, n_inside, slot, slots, out_columns, least, factor,
    blocks_a_row, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    dtype = y.dtype.element_ty
    if BIAS:
        own = tl.load(bias + tl.minimum(slot, slots - 1) * N + n, mask=n_inside, other=0.0)
        own = tl.where(slot < slots, own, 0.0)
        total += rounded(own, dtype).to(tl.float32)[None, :]
    inside = row_inside[:, None] & n_inside[None, :]
    at = row[:, None] * out_columns + (column + tl.arange(0, COLS))[None, :]
    pre = rounded(total, dtype)
    if SAVE:
        tl.store(z + at, pre, mask=inside)
    out = activate(pre.to(tl.float32), ACTIVATION)
    if DROPOUT:
        out = drop(out, tl.load(seed), row, column, blocks_a_row, least, factor, ROWS, COLS)
    tl.store(y + at, rounded(out, dtype), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def fused_kernel(
    source, weight, bias, inner, outer, y, z, low, seed, rows, row_tiles, first_column, out_columns, low_width, scale,
    least, factor, blocks_a_row,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    RANK: tl.constexpr, GROUP: tl.constexpr, FORWARD: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SAVE: tl.constexpr, SAVE_LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A weight and its only LoRA, both products in one walk over K.

    Forward: source x, weight W [N, K], inner A [R, K], outer B [N, R]. Backward: dz, W [K, N], B [K, R], A [R, N].
    """
    tile, column = _tile_of_program(row_tiles, first_column, N, COLS, GROUP)
    row, row_inside, slot = rows_of_tile(tile, source, rows, row_tiles, 1, ROWS, False)
    n = (column + tl.arange(0, COLS) - first_column).to(tl.int64)
    n_inside = (n >= 0) & (n < N)
    r = tl.arange(0, RANK)
    r_inside = r < R

    total = tl.zeros((ROWS, COLS), tl.float32)
    small = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        k_inside = tl.full((DEPTH,), True, tl.int1) if K % DEPTH == 0 else k < K
        t = tl.load(source + row[:, None] * K + k[None, :], mask=row_inside[:, None] & k_inside[None, :], other=0.0)
        at_weight = n[None, :] * K + k[:, None] if FORWARD else k.to(tl.int64)[:, None] * N + n[None, :]
        w = tl.load(weight + at_weight, mask=n_inside[None, :] & k_inside[:, None], other=0.0)
        at_inner = r[None, :] * K + k[:, None] if FORWARD else k[:, None] * R + r[None, :]
        m = tl.load(inner + at_inner, mask=r_inside[None, :] & k_inside[:, None], other=0.0)
        total = dot(t, rounded(w, t.dtype), total, PRECISION)
        small = dot(t, rounded(m, t.dtype), small, PRECISION)

    dtype = y.dtype.element_ty
    s = rounded(small * scale, dtype)
    if SAVE_LOW and column <= first_column:  # once: in the first column tile
        at_low = row[:, None] * low_width + r[None, :]
        tl.store(low + at_low, s, mask=row_inside[:, None] & r_inside[None, :])
    at_outer = n[None, :] * R + r[:, None] if FORWARD else r[:, None] * N + n[None, :]
    m = tl.load(outer + at_outer, mask=n_inside[None, :] & r_inside[:, None], other=0.0)
    total = dot(s, rounded(m, dtype), total, PRECISION)
    _epilogue(
        total, bias, y, z, seed, row, row_inside, column, n, n_inside, slot, 1, out_columns, least, factor,
        blocks_a_row, N, ROWS, COLS, ACTIVATION, BIAS, DROPOUT, SAVE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def low_kernel(
    source, matrices, low, entries, factors, spans, slot_of, seeds, length, tiles_a_row, source_columns, low_width,
    slots, blocks_a_row,
    WEIGHTS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCKS: tl.constexpr, FORWARD: tl.constexpr, DROPOUT: tl.constexpr,
    ROUTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s = scale drop(x) Aᵀ or t = scale dz B, one LoRA and RANK of its ranks a program."""
    dtype = low.dtype.element_ty
    row, row_inside, slot = rows_of_tile(tl.program_id(0), slot_of, length, tiles_a_row, slots, ROWS, ROUTED)
    number = tl.load(spans + slot * WEIGHTS) + tl.program_id(1) // RANK_BLOCKS
    if number < tl.load(spans + (slot + 1) * WEIGHTS):
        entry = entries + number * _FIELDS
        rank = tl.load(entry + _RANK)
        r = tl.program_id(1) % RANK_BLOCKS * RANK + tl.arange(0, RANK)
        r_inside = r < rank
        begin = 0 if FORWARD else tl.multiple_of(tl.load(entry + _FIRST), ALIGN)
        matrix = matrices + tl.load(entry + (_A if FORWARD else _B))
        # A constant where the LoRAs agree in it.
        columns = COLUMNS if COLUMNS else tl.multiple_of(tl.load(entry + _COLUMNS), ALIGN)

        total = tl.zeros((ROWS, RANK), tl.float32)
        for first in range(0, columns, DEPTH):
            k = first + tl.arange(0, DEPTH)
            k_inside = tl.full((DEPTH,), True, tl.int1) if COLUMNS and COLUMNS % DEPTH == 0 else k < columns
            at = row[:, None] * source_columns + (begin + k)[None, :]
            t = tl.load(source + at, mask=row_inside[:, None] & k_inside[None, :], other=0.0)
            if DROPOUT:
                kept = keep(tl.load(seeds + tl.load(entry + _NUMBER)), row, first, blocks_a_row,
                            tl.load(entry + _LEAST), ROWS, DEPTH)  # fmt: skip
                scaled = rounded(t.to(tl.float32) * tl.load(factors + number * 2 + 1), dtype)
                t = tl.where(kept | (tl.load(entry + _DROPS) == 0), scaled, 0.0).to(dtype)
            at_matrix = r[None, :] * columns + k[:, None] if FORWARD else k[:, None] * rank + r[None, :]
            m = tl.load(matrix + at_matrix, mask=r_inside[None, :] & k_inside[:, None], other=0.0)
            total = dot(t, rounded(m, dtype), total, PRECISION)
        s = rounded(total * tl.load(factors + number * 2), dtype)
        at_low = row[:, None] * low_width + (tl.load(entry + _LOW) + r)[None, :]
        tl.store(low + at_low, s, mask=row_inside[:, None] & r_inside[None, :])


@triton.jit(do_not_specialize=[*_COUNTS, "own_weight"])
def product_kernel(
    source, weight, bias, low, matrices, y, z, entries, factors, spans, slot_of, seeds, seed, length, tiles_a_row,
    row_tiles, first_column, out_columns, low_width, slots, own_weight, least, factor, blocks_a_row,
    N: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr, FORWARD: tl.constexpr, LORA: tl.constexpr,
    LORA_DROPOUT: tl.constexpr, ROUTED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[x | s] [W | B]ᵀ with the LoRAs of one weight, or [dz | t] [W; A] with those of all (source dz, W [K, N])."""
    tile, column = _tile_of_program(row_tiles, first_column, N, COLS, GROUP)
    row, row_inside, slot = rows_of_tile(tile, slot_of, length, tiles_a_row, slots, ROWS, ROUTED)
    n = (column + tl.arange(0, COLS) - first_column).to(tl.int64)
    n_inside = (n >= 0) & (n < N)

    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        k_inside = tl.full((DEPTH,), True, tl.int1) if K % DEPTH == 0 else k < K
        t = tl.load(source + row[:, None] * K + k[None, :], mask=row_inside[:, None] & k_inside[None, :], other=0.0)
        at_weight = n[None, :] * K + k[:, None] if FORWARD else k.to(tl.int64)[:, None] * N + n[None, :]
        w = tl.load(weight + at_weight, mask=n_inside[None, :] & k_inside[:, None], other=0.0)
        total = dot(t, rounded(w, t.dtype), total, PRECISION)

    dtype = y.dtype.element_ty
    if LORA:
        span = spans + slot * WEIGHTS + own_weight
        begin, end = tl.load(span), tl.load(span + (1 if FORWARD else WEIGHTS))
        for number in tl.range(begin, end, num_stages=1):
            entry = entries + number * _FIELDS
            rank = tl.load(entry + _RANK)
            own_low = low + tl.load(entry + _LOW)
            matrix = matrices + tl.load(entry + (_B if FORWARD else _A))
            added = tl.zeros((ROWS, COLS), tl.float32) if LORA_DROPOUT else total
            for part in tl.range(0, rank, RANK, num_stages=1):
                r = part + tl.arange(0, RANK)
                r_inside = r < rank
                at_low = row[:, None] * low_width + r[None, :]
                s = tl.load(own_low + at_low, mask=row_inside[:, None] & r_inside[None, :], other=0.0)
                at_matrix = n[None, :] * rank + r[:, None] if FORWARD else r[:, None] * N + n[None, :]
                m = tl.load(matrix + at_matrix, mask=n_inside[None, :] & r_inside[:, None], other=0.0)
                added = dot(s, rounded(m, dtype), added, PRECISION)
            if LORA_DROPOUT:
                kept = keep(tl.load(seeds + tl.load(entry + _NUMBER)), row, column, blocks_a_row,
                            tl.load(entry + _LEAST), ROWS, COLS)  # fmt: skip
                kept = kept | (tl.load(entry + _DROPS) == 0)
                total += tl.where(kept, added * tl.load(factors + number * 2 + 1), 0.0)
            else:
                total = added
    _epilogue(
        total, bias, y, z, seed, row, row_inside, column, n, n_inside, slot, slots, out_columns, least, factor,
        blocks_a_row, N, ROWS, COLS, ACTIVATION, BIAS, DROPOUT, SAVE,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Routing:
    """The batch rows, of ``length`` rows each, and their slots; one batch row of all where there is no table."""

    slot_of: Tensor | None
    length: int
    batch_rows: int
    slots: int

    @classmethod
    def of(cls, slot_of: Tensor | None, rows: int, slots: int) -> Routing:
        batch_rows = 1 if slot_of is None else slot_of.shape[0]
        return cls(None if slot_of is None else slot_of.contiguous(), rows // batch_rows, batch_rows, slots)

    def tiles(self, rows: int) -> tuple[int, int]:
        """(tiles of ``rows`` rows in a batch row, in all)."""
        tiles = triton.cdiv(self.length, rows)
        return tiles, tiles * self.batch_rows


def _low(source, matrices, low, table, routing, seeds, weights, forward):
    """Fill ``low`` [T, R] with s or t."""
    arch, drops = launch.architecture(source), table.drops and forward
    tile = launch.lora_low(arch, routing.length, routing.batch_rows, table.rank, source.element_size(),
                           matrices.element_size(), drops)  # fmt: skip
    tiles_a_row, tiles = routing.tiles(tile.rows)
    blocks = triton.cdiv(table.rank, tile.rank)
    low_kernel[(tiles, table.a_slot * blocks)](
        source, matrices, low, table.entries, table.factors, table.spans, routing.slot_of, seeds, routing.length,
        tiles_a_row, source.shape[1], low.shape[1], routing.slots, padded_columns(source.shape[1]) // 64,
        WEIGHTS=weights, COLUMNS=source.shape[1] if forward else table.columns, ALIGN=table.align, ROWS=tile.rows,
        DEPTH=tile.depth, RANK=tile.rank, RANK_BLOCKS=blocks, FORWARD=forward, DROPOUT=drops,
        ROUTED=routing.slot_of is not None, PRECISION=launch.precision(source.dtype), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def _product(
    source, weight, bias, low, matrices, y, z, table, routing, seeds, dropout, *, forward, weights=1, own=0, first=0,
    activation="none", save=False,
):  # fmt: skip
    """The columns of y from ``first`` on that belong to a weight; in backward all of dx."""
    n, k = weight.shape if forward else weight.shape[::-1]
    drops = not forward and table is not None and table.drops
    tile = launch.lora_product(launch.architecture(source), routing.length, routing.batch_rows, n,
                               table.rank if table else 1, source.element_size(), weight.element_size(),
                               fused=False, drops=drops)  # fmt: skip
    tiles_a_row, tiles = routing.tiles(tile.rows)
    entries, factors, spans = (table.entries, table.factors, table.spans) if table else (None, None, None)
    product_kernel[(tiles * triton.cdiv(first % 64 + n, tile.cols),)](
        source, weight, bias, low, matrices, y, z, entries, factors, spans, routing.slot_of, seeds, dropout.seed,
        routing.length, tiles_a_row, tiles, first, y.shape[1], low.shape[1], routing.slots, own, dropout.least,
        dropout.factor, padded_columns(y.shape[1]) // 64, N=n, K=k, WEIGHTS=weights, ROWS=tile.rows, COLS=tile.cols,
        DEPTH=tile.depth, RANK=tile.rank, GROUP=tile.group, FORWARD=forward, LORA=table is not None,
        LORA_DROPOUT=drops, ROUTED=routing.slot_of is not None, ACTIVATION=activation, BIAS=bias is not None,
        DROPOUT=dropout.on, SAVE=save, PRECISION=launch.precision(source.dtype), num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def _fused(
    source, weight, bias, inner, outer, scale, y, z, low, dropout, *, forward, first=0, activation="none", save=False,
    save_low=False,
):  # fmt: skip
    """:func:`_product` for a weight with one LoRA, which also makes the LoRA's s or t, its columns of ``low``."""
    n, k = weight.shape if forward else weight.shape[::-1]
    rank = inner.shape[0] if forward else inner.shape[1]
    rows = source.shape[0]
    tile = launch.lora_product(launch.architecture(source), rows, 1, n, rank, source.element_size(),
                               weight.element_size(), fused=True, drops=False)  # fmt: skip
    tiles = triton.cdiv(rows, tile.rows)
    fused_kernel[(tiles * triton.cdiv(first % 64 + n, tile.cols),)](
        source, weight, bias, inner, outer, y, z, low, dropout.seed, rows, tiles, first, y.shape[1],
        low.stride(0), float(scale), dropout.least, dropout.factor, padded_columns(y.shape[1]) // 64, N=n, K=k, R=rank,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, RANK=tile.rank, GROUP=tile.group, FORWARD=forward,
        ACTIVATION=activation, BIAS=bias is not None, DROPOUT=dropout.on, SAVE=save, SAVE_LOW=save_low,
        PRECISION=launch.precision(source.dtype), num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
    )  # fmt: skip


def _biases_of_slots(biases, weights, dtype):
    """[slots, N_i] for each weight, or None; slots without one have zeros."""
    tables = []
    for i, weight in enumerate(weights):
        own = biases[i :: len(weights)]
        if len(own) == 1 or all(b is None for b in own):
            tables.append(None if own[0] is None else own[0].contiguous())
        else:
            zero = weight.new_zeros(weight.shape[0], dtype=dtype)
            tables.append(torch.stack([zero if b is None else b.to(dtype) for b in own]))
    return tables


def forward(x, weights, biases, a, b, scales, owners, slots, rows, lora_p, lora_seeds, activation, dropout_p, seed,
            save):  # fmt: skip
    """``fastadapt::lora_forward``: one launch a weight, and one before them where s is made apart."""
    (count, features), outputs = x.shape, [w.shape[0] for w in weights]
    y = x.new_empty((count, sum(outputs)))
    z = torch.empty_like(y) if save and activation != "none" else x.new_empty(0)
    width = lora_offsets([m.shape[0] for m in a], slots)[1]
    if count == 0:
        return y, z, x.new_empty((0, width) if save else (0,))
    arch, dropout = launch.architecture(x), Dropout.of(dropout_p, seed)
    routing = Routing.of(rows, count, len(biases) // len(weights))
    epilogue = {"activation": activation, "save": save and activation != "none"}
    firsts = [0, *itertools.accumulate(outputs)]
    tables = _biases_of_slots(biases, weights, x.dtype)
    weights = [w.contiguous() for w in weights]

    rank = max((m.shape[0] for m in a), default=0)
    alone = rows is None and len(set(owners)) == len(owners) and not any(lora_p)
    if a and alone and launch.lora_fuses(arch, rank, x.element_size()):
        s = x.new_empty((count, width) if save else (0, 1))
        offsets, _ = lora_offsets([m.shape[0] for m in a], slots)
        for i, (weight, bias) in enumerate(zip(weights, tables, strict=True)):
            if i not in owners:
                _product(x, weight, bias, s, x, y, z, None, routing, None, dropout, forward=True, first=firsts[i],
                         **epilogue)  # fmt: skip
                continue
            e = owners.index(i)
            _fused(x, weight, bias, a[e].contiguous(), b[e].contiguous(), scales[e], y, z, s[:, offsets[e] :], dropout,
                   forward=True, first=firsts[i], save_low=save, **epilogue)  # fmt: skip
        return y, z, s if save else x.new_empty(0)

    table = None
    s, up = x.new_empty((count, width)), x
    if a:
        table = _table_of(a, owners, slots, routing.slots, outputs, features, scales, lora_p, x.device)
        s = s if table.filled else s.zero_()
        up = _flat(b, x.dtype)
        _low(x, _flat(a, x.dtype), s, table, routing, lora_seeds, len(weights), forward=True)
    for i, (weight, bias) in enumerate(zip(weights, tables, strict=True)):
        _product(x, weight, bias, s, up, y, z, table if i in owners else None, routing, lora_seeds, dropout,
                 forward=True, weights=len(weights), own=i, first=firsts[i], **epilogue)  # fmt: skip
    return y, z, s if save else x.new_empty(0)


def _table_of(a, owners, slots, slot_count, outputs, features, scales, lora_p, device):
    return _table(
        tuple(m.shape[0] for m in a), tuple(owners), tuple(slots), slot_count, tuple(outputs), features, tuple(scales),
        tuple(lora_p), device,
    )  # fmt: skip


# -- gradients of A and B ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_COUNTS)
def weights_kernel(
    low, wide, partial, entries, factors, slot_of, seeds, length, chunk, chunks_a_row, chunks, chunks_a_split,
    low_width, wide_columns, partial_columns, blocks_a_row,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, OF_A: tl.constexpr, DROPOUT: tl.constexpr, ROUTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split's part of every dA = tᵀ drop(x), or of every dB = dzᵀ s; a split is a few chunks of rows."""
    dtype = low.dtype.element_ty
    number = tl.program_id(1) // RANK_BLOCKS
    entry = entries + number * _FIELDS
    rank = tl.load(entry + _RANK)
    r = tl.program_id(1) % RANK_BLOCKS * RANK + tl.arange(0, RANK)
    r_inside = r < rank
    own_low = low + tl.load(entry + _LOW)
    begin = 0 if OF_A else tl.multiple_of(tl.load(entry + _FIRST), ALIGN)
    columns = COLUMNS if COLUMNS else tl.multiple_of(tl.load(entry + _COLUMNS), ALIGN)
    start = tl.program_id(0) * COLS
    col = start + tl.arange(0, COLS)
    col_inside = tl.full((COLS,), True, tl.int1) if COLUMNS and COLUMNS % COLS == 0 else col < columns
    split = tl.program_id(2)

    total = tl.zeros((RANK, COLS), tl.float32)
    for piece in tl.range(split * chunks_a_split, tl.minimum((split + 1) * chunks_a_split, chunks), num_stages=1):
        batch_row = piece // chunks_a_row
        first = piece % chunks_a_row * chunk
        end = tl.minimum(first + chunk, length)
        if ROUTED:  # nothing to walk over in a batch row of another slot
            end = tl.where(tl.load(slot_of + batch_row) == tl.load(entry + _SLOT), end, first)
        for step in range(first, end, ROWS):
            within = step + tl.arange(0, ROWS)
            row = batch_row.to(tl.int64) * length + within
            inside = (within < end)[:, None]
            d = tl.load(own_low + row[:, None] * low_width + r[None, :], mask=inside & r_inside[None, :], other=0.0)
            at = row[:, None] * wide_columns + (begin + col)[None, :]
            t = tl.load(wide + at, mask=inside & col_inside[None, :], other=0.0)
            if DROPOUT:
                kept = keep(tl.load(seeds + tl.load(entry + _NUMBER)), row, start, blocks_a_row,
                            tl.load(entry + _LEAST), ROWS, COLS)  # fmt: skip
                scaled = rounded(t.to(tl.float32) * tl.load(factors + number * 2 + 1), dtype)
                t = tl.where(kept | (tl.load(entry + _DROPS) == 0), scaled, 0.0).to(dtype)
            total = dot(tl.trans(d), t, total, PRECISION)

    out = partial + split.to(tl.int64) * partial_columns + tl.load(entry + (_A if OF_A else _B))
    at_out = r[:, None] * columns + col[None, :] if OF_A else col[None, :] * rank + r[:, None]
    tl.store(out + at_out, total, mask=r_inside[:, None] & col_inside[None, :])


def _weight_gradients(x, dz, s, t, a, b, table, routing, seeds):
    """Every dA and every dB."""
    features = x.shape[1]
    of_a = sum(m.numel() for m in a)
    partial_columns = of_a + sum(m.numel() for m in b)
    widest = max(features, *(m.shape[0] for m in b))
    tile = launch.lora_weights(launch.architecture(x), routing.length, routing.batch_rows, widest, len(a), table.rank,
                               x.element_size(), drops=table.drops)  # fmt: skip
    partial = x.new_empty((tile.splits, partial_columns), dtype=torch.float32)
    blocks = triton.cdiv(table.rank, tile.rank)
    for low, wide, out, columns, drops in (
        (t, x, partial, features, table.drops),
        (s, dz, partial[:, of_a:], table.columns, False),
    ):
        most = columns or max(m.shape[0] for m in b)
        weights_kernel[(triton.cdiv(most, tile.cols), len(a) * blocks, tile.splits)](
            low, wide, out, table.entries, table.factors, routing.slot_of, seeds, routing.length, tile.chunk,
            tile.chunks_a_row, tile.chunks_a_row * routing.batch_rows, tile.chunks_a_split, low.shape[1],
            wide.shape[1], partial_columns, padded_columns(wide.shape[1]) // 64, COLUMNS=columns, ALIGN=table.align,
            ROWS=tile.rows, COLS=tile.cols, RANK=tile.rank, RANK_BLOCKS=blocks, OF_A=wide is x, DROPOUT=drops,
            ROUTED=routing.slot_of is not None, PRECISION=launch.precision(x.dtype), num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    sums = ordered_sum(partial, [tuple(m.shape) for m in [*a, *b]])
    return sums[: len(a)], sums[len(a) :]


def backward(dy, x, z, s, weights, slot_count, a, b, scales, owners, slots, rows, lora_p, lora_seeds, activation,
             dropout_p, seed, need_dx, need_dbias, need_dlora):  # fmt: skip
    """``fastadapt::lora_backward``."""
    (count, columns), features = dy.shape, weights[0].shape[1]
    dx = dy.new_empty((count, features) if need_dx else (0,))
    nothing = dy.new_empty(0, dtype=torch.float32)
    if count == 0:
        da, db = ([m.new_zeros(m.shape, dtype=torch.float32) for m in of] if need_dlora else [] for of in (a, b))
        return dx, dy.new_zeros((slot_count, columns), dtype=torch.float32) if need_dbias else nothing, da, db
    arch, routing = launch.architecture(dy), Routing.of(rows, count, slot_count)
    dz, partial = epilogue_gradient(
        dy, z, activation, Dropout.of(dropout_p, seed), need_dx or need_dlora, need_dbias, routing.batch_rows
    )
    dbias = nothing
    if need_dbias and rows is None:
        (dbias,) = ordered_sum(partial, [(1, columns)])
    elif need_dbias:
        dbias = slot_sum(partial, routing.slot_of, slot_count)
    if not a or not (need_dx or need_dlora):
        return dz @ stacked(weights, dy.dtype) if need_dx else dx, dbias, [], []

    outputs = [w.shape[0] for w in weights]
    table = _table_of(a, owners, slots, slot_count, outputs, features, scales, lora_p, dy.device)
    t = dy.new_empty((count, table.width))
    off = Dropout.of(0.0, None)
    alone = rows is None and len(weights) == len(a) == 1 and not table.drops
    if need_dx and alone and launch.lora_fuses(arch, table.rank, dy.element_size()):
        _fused(dz, weights[0].contiguous(), None, b[0].contiguous(), a[0].contiguous(), scales[0], dx, dx, t, off,
               forward=False, save_low=need_dlora)  # fmt: skip
    else:
        _low(dz, _flat(b, dy.dtype), t, table, routing, None, len(weights), forward=False)
        if need_dx:
            matrix = stacked(weights, dy.dtype) if len(weights) > 1 else weights[0].contiguous()
            _product(dz, matrix, None, t, _flat(a, dy.dtype), dx, dx, table, routing, lora_seeds, off, forward=False,
                     weights=len(weights))  # fmt: skip
    if not need_dlora:
        return dx, dbias, [], []
    return dx, dbias, *_weight_gradients(x, dz, s, t, a, b, table, routing, lora_seeds)
