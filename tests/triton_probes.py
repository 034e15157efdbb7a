"""Kernels around the Triton backend's helpers, for tests of single helpers; import it where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.backends.triton.merge import _narrow


@triton.jit
def narrow_kernel(x, out, NAME: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    bits = _narrow(tl.load(x + at).to(tl.float32, bitcast=True), NAME)
    tl.store(out + at, bits.to(tl.int32, bitcast=True))
