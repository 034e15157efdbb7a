"""Rounding and matrix products, alike on a GPU and in the interpreter.

The interpreter truncates float32 to bfloat16, multiplies bfloat16's bit patterns as integers and leaves the order of
a sum to numpy's BLAS; a GPU rounds to nearest even and sums exact products in float32. The branches on INTERPRETED
give it the right rounding and a sum without an order; they leave no trace in a compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in float32."""
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), total.to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
