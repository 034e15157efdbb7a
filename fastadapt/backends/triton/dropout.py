"""The dropout mask of :mod:`fastadapt.ops.dropout` inside a kernel, bit for bit.

Element (r, c) has the index e = r * P + c, P being the columns rounded up to 64, and reads word (e >> 4) & 3 of
Philox4x32-10 at the counter (e >> 6) * 16 + (e & 15): 16 counters give an aligned block of 64 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastadapt.ops.dropout import BLOCK, threshold


@dataclass(frozen=True)
class Dropout:
    """What a kernel needs to know of p and the seed."""

    on: bool
    seed: Tensor | None
    least: int  # kept are the words above this one, whose bits are given as a signed integer
    factor: float  # 1 / (1 - p)

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout:
        if seed is None or threshold(p) == 0:
            return cls(False, None, 0, 1.0)
        return cls(True, seed, *least_and_factor(p))


def least_and_factor(p: float) -> tuple[int, float]:
    """:class:`Dropout`'s numbers for a p that drops something; (0, 1) for one that does not."""
    least = threshold(p) - 1
    if least < 0:
        return 0, 1.0
    return least - 2**32 if least >= 2**31 else least, 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def padded_columns(columns: int) -> int:
    """Columns rounded up to whole blocks of the stream."""
    return triton.cdiv(columns, BLOCK) * BLOCK


@triton.jit
def keep(seed, row, column, blocks_a_row, least, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] booleans for the rows ``row`` (int64) and the columns from ``column``, a multiple of 64, on."""
    block = column // 64 + tl.arange(0, COLS // 64)
    first = (row[:, None] * blocks_a_row + block[None, :]) * 16
    counter = first[:, :, None] + tl.arange(0, 16)[None, None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    bound = tl.full((1, 1, 1), least, tl.int32).to(tl.uint32, bitcast=True)
    # [.., 16] words become [.., 4, 16]: the word's number runs slower than the counter.
    even = tl.join((w0 > bound).to(tl.int8), (w2 > bound).to(tl.int8))
    odd = tl.join((w1 > bound).to(tl.int8), (w3 > bound).to(tl.int8))
    words = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
    return tl.reshape(words, (ROWS, COLS)) != 0


@triton.jit
def keep_elements(seed, row, column, blocks_a_row, least):
    """As :func:`keep` for elements that need not be blocks of 64: ``row`` (int64) and ``column`` broadcast."""
    counter = (row * blocks_a_row + column // 64) * 16 + column % 16
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    word = column % 64 // 16 + tl.zeros(counter.shape, tl.int32)
    drawn = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return drawn > tl.full(counter.shape, least, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def drop(x, seed, row, column, blocks_a_row, least, factor, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x [ROWS, COLS] with its mask applied; a select, so that a dropped infinity leaves no NaN."""
    return tl.where(keep(seed, row, column, blocks_a_row, least, ROWS, COLS), x * factor, 0.0)
