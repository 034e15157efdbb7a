"""Merging low-rank updates into weights, over a table of pointers: one launch for all matrices.

    out:   W ← R(W - Δ) + code        (:mod:`fastadapt.ops.merge` has the sum's order and the code's meaning)
    check: is R(W + Δ) finite, and how many codes of each tile don't fit a byte; writes no weight
    in:    W ← R(W + Δ), codes, and the list of those that don't fit, at places that the check's counts gave

A weight is read and written as its bits. No product stands beside a sum but in fma, so nothing can be contracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt.backends.triton import launch
from fastadapt.backends.triton.numeric import INTERPRETED
from fastadapt.ops.merge import COPY_ABOVE, scaled

# Columns of the table, one row a matrix.
_WEIGHT, _A, _T, _CODES, _ROWS, _COLS, _RANK, _FIRST_TILE = range(8)
WEIGHT, A, T, CODES = (tl.constexpr(i) for i in (_WEIGHT, _A, _T, _CODES))
ROWS_OF, COLS_OF, RANK, FIRST_TILE = (tl.constexpr(i) for i in (_ROWS, _COLS, _RANK, _FIRST_TILE))
FIELDS = tl.constexpr(8)


@triton.jit
def _fma(t, x, d):
    """t·x + d, rounded once. The interpreter's own rounds twice: there the sum is rounded to odd in float64."""
    if INTERPRETED:
        p = t.to(tl.float64) * x.to(tl.float64)
        wide = d.to(tl.float64)
        s = p + wide
        part = s - p
        error = (p - (s - part)) + (wide - part)
        bits = s.to(tl.int64, bitcast=True)
        step = tl.where((error > 0) == (s > 0), 1, -1)
        bits = tl.where((error != 0) & ((bits & 1) == 0), bits + step, bits)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(t, x, d)


@triton.jit
def _value(bits, NAME: tl.constexpr):
    """The float32 of a weight's bits (uint32)."""
    if NAME == "float32":
        return bits.to(tl.float32, bitcast=True)
    elif NAME == "bfloat16":
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _narrow(x, NAME: tl.constexpr):
    """The bits (uint32) of x in the weight's type, to nearest even."""
    if NAME == "float32":
        return x.to(tl.uint32, bitcast=True)
    elif NAME == "bfloat16":
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0)  # a GPU's NaN has all bits set: the sum would wrap to a zero
    else:
        return x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _pointer(table, matrix, FIELD: tl.constexpr, dtype: tl.constexpr):
    return tl.load(table + matrix * FIELDS + FIELD).to(tl.pointer_type(dtype))


@triton.jit
def _tile(table, matrix, tile, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr):
    """(rows, columns, flat indices and mask of the program's tile)."""
    rows = tl.load(table + matrix * FIELDS + ROWS_OF)
    cols = tl.load(table + matrix * FIELDS + COLS_OF)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    local = tile - tl.load(table + matrix * FIELDS + FIRST_TILE)
    across = (cols + COLS - 1) // COLS
    row = (local // across) * ROWS + tl.arange(0, ROWS)
    col = (local % across) * COLS + tl.arange(0, COLS)
    return row, col, row[:, None] * cols + col[None, :], (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def _delta(table, matrix, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr):
    """Δ of the tile, k by k."""
    a = _pointer(table, matrix, A, tl.float32)
    t = _pointer(table, matrix, T, tl.float32)
    rank = tl.load(table + matrix * FIELDS + RANK)
    rows = tl.load(table + matrix * FIELDS + ROWS_OF)
    cols = tl.load(table + matrix * FIELDS + COLS_OF)
    if ALIGNED:
        a = tl.multiple_of(a, 16)
        cols = tl.multiple_of(cols, 16)
    d = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, rank):
        factor = tl.load(t + row * rank + k, mask=row < rows, other=0.0)
        x = tl.load(a + k * cols + col, mask=col < cols, other=0.0)
        d = _fma(tl.broadcast_to(factor[:, None], (ROWS, COLS)), tl.broadcast_to(x[None, :], (ROWS, COLS)), d)
    return d


@triton.jit
def _weight(table, matrix, NAME: tl.constexpr, ALIGNED: tl.constexpr):
    w = _pointer(table, matrix, WEIGHT, tl.uint32 if NAME == "float32" else tl.uint16)
    return tl.multiple_of(w, 16) if ALIGNED else w


@triton.jit
def _codes(table, matrix, ALIGNED: tl.constexpr):
    codes = _pointer(table, matrix, CODES, tl.int8)
    return tl.multiple_of(codes, 16) if ALIGNED else codes


@triton.jit
def _merged(raw, d, NAME: tl.constexpr):
    """(the merged weight's bits, whether it is not finite, the code of the way back)."""
    bits = _narrow(_value(raw, NAME) + d, NAME)
    merged = _value(bits, NAME)
    code = (raw - _narrow(merged - d, NAME)).to(tl.int32, bitcast=True)
    return bits, merged - merged != 0.0, code


@triton.jit
def _large(code):
    return (code < -128) | (code > 127)


@triton.jit
def out_kernel(
    table, matrix_of, NAME: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    matrix = tl.load(matrix_of + tile).to(tl.int64)
    row, col, at, inside = _tile(table, matrix, tile, ROWS, COLS, ALIGNED)
    w = _weight(table, matrix, NAME, ALIGNED)
    raw = tl.load(w + at, mask=inside, other=0).to(tl.uint32)
    bits = _narrow(_value(raw, NAME) - _delta(table, matrix, row, col, ROWS, COLS, ALIGNED), NAME)
    if tl.load(table + matrix * FIELDS + CODES) != 0:
        codes = _codes(table, matrix, ALIGNED)
        code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
        bits += code.to(tl.uint32, bitcast=True)
    tl.store(w + at, bits.to(w.dtype.element_ty), mask=inside)


@triton.jit
def check_kernel(
    old, table, matrix_of, counts, broken, NAME: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    matrix = tl.load(matrix_of + tile).to(tl.int64)
    row, col, at, inside = _tile(table, matrix, tile, ROWS, COLS, ALIGNED)
    raw = tl.load(_weight(table, matrix, NAME, ALIGNED) + at, mask=inside, other=0).to(tl.uint32)
    bad = tl.zeros((ROWS, COLS), tl.int32) != 0
    if OUT:
        raw = _narrow(_value(raw, NAME) - _delta(old, matrix, row, col, ROWS, COLS, ALIGNED), NAME)
        bare = _value(raw, NAME)
        bad = bare - bare != 0.0
    if IN:
        _bits, not_finite, code = _merged(raw, _delta(table, matrix, row, col, ROWS, COLS, ALIGNED), NAME)
        bad = bad | not_finite
        tl.store(counts + tile, tl.sum(tl.sum((_large(code) & inside).to(tl.int32), 1), 0))
    tl.store(broken + tile, tl.sum(tl.sum((bad & inside).to(tl.int32), 1), 0))


@triton.jit
def in_kernel(
    table, matrix_of, places, keys, listed, NAME: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    matrix = tl.load(matrix_of + tile).to(tl.int64)
    row, col, at, inside = _tile(table, matrix, tile, ROWS, COLS, ALIGNED)
    w = _weight(table, matrix, NAME, ALIGNED)
    raw = tl.load(w + at, mask=inside, other=0).to(tl.uint32)
    bits, _not_finite, code = _merged(raw, _delta(table, matrix, row, col, ROWS, COLS, ALIGNED), NAME)
    if tl.load(table + matrix * FIELDS + CODES) != 0:
        codes = _codes(table, matrix, ALIGNED)
        tl.store(codes + at, code.to(tl.int8), mask=inside)
        large = _large(code) & inside
        n = tl.reshape(large.to(tl.int32), (ROWS * COLS,))
        place = tl.load(places + tile) + tl.reshape(tl.cumsum(n, 0) - n, (ROWS, COLS))
        tl.store(keys + place, (matrix << 32) | at, mask=large)
        tl.store(listed + place, raw.to(tl.int32, bitcast=True), mask=large)
    tl.store(w + at, bits.to(w.dtype.element_ty), mask=inside)


# -- host --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Update:
    """s·BA of every matrix, as the kernels read it."""

    a: list[Tensor]
    t: list[Tensor]

    @classmethod
    def of(cls, a: list[Tensor], b: list[Tensor], scales: list[float]) -> _Update:
        t = [scaled(factor, scale) for factor, scale in zip(b, scales, strict=True)]
        return cls([factor.float() for factor in a], t)

    def first_broken(self) -> int:
        finite = torch.stack([torch.isfinite(x).all() & torch.isfinite(y).all()
                              for x, y in zip(self.a, self.t, strict=True)])  # fmt: skip
        return -1 if bool(finite.all()) else int((~finite).nonzero()[0])


class _Tiles:
    """The tiles of all weights, and tables of what the kernels shall do to them."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.device = weights[0].device
        self.choice = launch.merge_tile(launch.architecture(weights[0]))
        per = [triton.cdiv(w.shape[0], self.choice.rows) * triton.cdiv(w.shape[1], self.choice.cols) for w in weights]
        self.count = sum(per)
        self.first = [sum(per[:i]) for i in range(len(per))]
        self.matrix_of = torch.repeat_interleave(
            torch.arange(len(per), dtype=torch.int32), torch.tensor(per), output_size=self.count
        ).to(self.device)
        self.name = str(weights[0].dtype).removeprefix("torch.")

    def table(self, update: _Update, codes: list[Tensor | None]) -> tuple[Tensor, bool]:
        """(the table, whether rows start at multiples of 16 bytes)."""
        rows = [
            (w.data_ptr(), a.data_ptr(), t.data_ptr(), 0 if code is None else code.data_ptr(), *w.shape, a.shape[0], at)
            for w, a, t, code, at in zip(self.weights, update.a, update.t, codes, self.first, strict=True)
        ]
        aligned = all(row[i] % 16 == 0 for row in rows for i in (_WEIGHT, _A, _CODES, _COLS))
        return torch.tensor(rows, dtype=torch.int64).to(self.device), aligned

    def options(self, *tables: tuple[Tensor, bool]) -> dict[str, int | bool | str]:
        return {
            "NAME": self.name, "ROWS": self.choice.rows, "COLS": self.choice.cols,
            "ALIGNED": all(aligned for _, aligned in tables), "num_warps": self.choice.warps,
        }  # fmt: skip

    def take_out(self, update: _Update, codes: list[Tensor], index: list[Tensor], bits: list[Tensor]) -> None:
        """Exact with codes, rounded without (empty lists)."""
        kept = [code if code.dtype == torch.int8 else None for code in codes] or [None] * len(self.weights)
        table = self.table(update, kept)
        out_kernel[(self.count,)](table[0], self.matrix_of, **self.options(table))
        for w, code, where, what in zip(self.weights, codes, index, bits, strict=False):
            if code.dtype == w.dtype:
                w.copy_(code)
            elif where.numel():
                w.view(what.dtype).view(-1)[where.long()] = what

    def check(self, old: _Update | None, new: _Update | None) -> tuple[int, list[int], Tensor]:
        """(a weight that would not be finite or -1, large codes of each matrix, of each tile); both ways round."""
        none = [None] * len(self.weights)
        outs = self.table(old, none) if old else None
        ins = self.table(new, none) if new else None
        counts, broken = (torch.zeros(self.count, dtype=torch.int64, device=self.device) for _ in range(2))
        tables = [table for table in (outs, ins) if table is not None]
        check_kernel[(self.count,)](
            (outs or tables[0])[0], (ins or tables[0])[0], self.matrix_of, counts, broken, OUT=outs is not None,
            IN=ins is not None, **self.options(*tables),
        )  # fmt: skip
        per_matrix = torch.zeros((2, len(self.weights)), dtype=torch.int64, device=self.device)
        per_matrix.index_add_(1, self.matrix_of, torch.stack([counts, broken]))
        large, bad = per_matrix.tolist()
        return next((i for i, n in enumerate(bad) if n), -1), large, counts

    def put_in(self, update: _Update, codes: list[Tensor | None], counts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (matrix · 2³² + index) and bits of what the codes of ``counts`` can't hold, ascending."""
        table = self.table(update, codes)
        total = int(counts.sum())
        keys = torch.empty(total, dtype=torch.int64, device=self.device)
        listed = torch.empty(total, dtype=torch.int32, device=self.device)
        places = counts.cumsum(0) - counts
        in_kernel[(self.count,)](table[0], self.matrix_of, places, keys, listed, **self.options(table))
        keys, order = keys.sort()
        return keys, listed[order]


def remerge_(weights, old_a, old_b, old_scales, old_codes, old_index, old_bits, a, b, scales, exact):
    """``fastadapt::remerge_``: out, check and in, and the old one in again where the check refuses the new one."""
    held = list(range(len(weights)))
    refused = torch.tensor(-1)
    filled = [i for i in held if weights[i].numel()]
    old = _Update.of(old_a, old_b, old_scales) if old_a else None
    new = _Update.of(a, b, scales) if a else None
    for update in (old, new):
        if update and (culprit := update.first_broken()) >= 0:
            return [], [], [], torch.tensor(culprit)
    codes = [torch.empty_like(w, dtype=torch.int8) for w in weights] if exact and new else []
    of_bits = torch.int32 if weights[0].dtype == torch.float32 else torch.int16
    index = [w.new_empty(0, dtype=torch.int32) for w in weights] if codes else []
    bits = [w.new_empty(0, dtype=of_bits) for w in weights] if codes else []
    if not filled:
        return codes, index, bits, refused

    def of(tensors):
        return [tensors[i] for i in filled] if tensors else []

    def update_of(update):
        return update and _Update(of(update.a), of(update.t))

    tiles, old, new = _Tiles([weights[i].detach() for i in filled]), update_of(old), update_of(new)
    kept = of(old_codes), of(old_index), of(old_bits)
    if old and not old_codes:
        culprit, large, counts = tiles.check(old, new)
        if culprit >= 0:
            return [], [], [], torch.tensor(filled[culprit])
    if old:
        tiles.take_out(old, *kept)
    if not new:
        return codes, index, bits, refused
    if not old or old_codes:
        culprit, large, counts = tiles.check(None, new)
        if culprit >= 0:
            if old:
                tiles.put_in(old, [None] * len(filled), torch.zeros_like(counts))
            return [], [], [], torch.tensor(filled[culprit])
    if not codes:
        tiles.put_in(new, [None] * len(filled), torch.zeros_like(counts))
        return codes, index, bits, refused

    as_codes: list[Tensor | None] = []
    for at, (i, count) in enumerate(zip(filled, large, strict=True)):
        w = weights[i]
        if count * COPY_ABOVE > w.numel() or w.numel() > 2**31 - 1:
            codes[i] = w.detach().clone()
            as_codes.append(None)
            counts = torch.where(tiles.matrix_of == at, 0, counts)
            large[at] = 0
        else:
            as_codes.append(codes[i])
    keys, listed = tiles.put_in(new, as_codes, counts)
    for i, where, what in zip(filled, keys.split(large), listed.split(large), strict=True):
        index[i], bits[i] = (where & 0xFFFFFFFF).int(), what.to(of_bits)
    return codes, index, bits, refused
