"""The table of :mod:`fastadapt.ops.activations` inside a kernel, on float32."""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.ops.activations import ACTIVATIONS


@triton.jit
def _tanh(x):
    # Near 0 the quotient cancels, and the series is exact to float32.
    t = tl.exp(-2.0 * tl.abs(x))
    quotient = tl.where(x < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
    q = x * x
    series = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 - q * (1382 / 155925)))))
    return tl.where(q < 0.09, x * series, quotient)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """σ(x)."""
    if NAME == "relu":
        return tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # NaN stays NaN
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "tanh":
        return _tanh(x)
    elif NAME == "sigmoid":
        return _sigmoid(x)
    elif NAME == "leaky_relu":
        return tl.where(x > 0, x, 0.01 * x)
    else:
        tl.static_assert(NAME == "none")
        return x


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """σ'(x)."""
    if NAME == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_new":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif NAME == "silu":
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif NAME == "tanh":
        t = _tanh(x)
        return 1.0 - t * t
    elif NAME == "sigmoid":
        s = _sigmoid(x)
        return s * (1.0 - s)
    elif NAME == "leaky_relu":
        return tl.where(x > 0, 1.0, 0.01)
    else:
        tl.static_assert(NAME == "none")
        return tl.full(x.shape, 1.0, tl.float32)


def code_of(name: str) -> int:
    """The number by which a kernel knows an activation where its rows differ in it."""
    return ACTIVATIONS.index(name)


@triton.jit
def activate_one(x, code, AMONG: tl.constexpr):
    """σ(x) of the activation numbered ``code``, one of those whose bits are set in AMONG."""
    out = x
    if AMONG & 2:
        out = tl.where(code == 1, activate(x, "relu"), out)
    if AMONG & 4:
        out = tl.where(code == 2, activate(x, "gelu"), out)
    if AMONG & 8:
        out = tl.where(code == 3, activate(x, "gelu_new"), out)
    if AMONG & 16:
        out = tl.where(code == 4, activate(x, "silu"), out)
    if AMONG & 32:
        out = tl.where(code == 5, activate(x, "tanh"), out)
    if AMONG & 64:
        out = tl.where(code == 6, activate(x, "sigmoid"), out)
    if AMONG & 128:
        out = tl.where(code == 7, activate(x, "leaky_relu"), out)
    return out


@triton.jit
def derivative_one(x, code, AMONG: tl.constexpr):
    """σ'(x) of the activation numbered ``code``."""
    out = tl.full(x.shape, 1.0, tl.float32)
    if AMONG & 2:
        out = tl.where(code == 1, derivative(x, "relu"), out)
    if AMONG & 4:
        out = tl.where(code == 2, derivative(x, "gelu"), out)
    if AMONG & 8:
        out = tl.where(code == 3, derivative(x, "gelu_new"), out)
    if AMONG & 16:
        out = tl.where(code == 4, derivative(x, "silu"), out)
    if AMONG & 32:
        out = tl.where(code == 5, derivative(x, "tanh"), out)
    if AMONG & 64:
        out = tl.where(code == 6, derivative(x, "sigmoid"), out)
    if AMONG & 128:
        out = tl.where(code == 7, derivative(x, "leaky_relu"), out)
    return out
