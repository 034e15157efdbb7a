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
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # Without matrix instructions a sum is one chain of fma, whose error grows with its length. Vendor libraries
        # cut theirs; here every step's is summed by itself (fma, since an addition is folded into the product's sum).
        part = _halves(a, b) if a.shape[1] >= 128 else tl.dot(a, b, input_precision="ieee")
        return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _halves(a, b):
    """a b as the sum of two products of half the depth."""
    half: tl.constexpr = a.shape[1] // 2
    a0, a1 = tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, half)), (0, 2, 1)))
    b0, b1 = tl.split(tl.permute(tl.reshape(b, (2, half, b.shape[1])), (1, 2, 0)))
    first = tl.dot(a0, b0, input_precision="ieee")
    second = tl.dot(a1, b1, input_precision="ieee")
    return tl.fma(second, tl.full(second.shape, 1.0, tl.float32), first)
