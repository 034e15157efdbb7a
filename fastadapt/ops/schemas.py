"""The kernel contract: one schema an op, and what its outputs look like (the fake kernels).

Kernels see flattened, contiguous activations [T, H] in one compute dtype (float32, bfloat16, float16 or float64).
Parameters may have another floating dtype: a kernel rounds matrices and their biases to the compute dtype once and
reads LayerNorm parameters and scales as they are. Sums run in float32 or wider. Gradients of parameters leave in
float32 (float64 in float64). An output that was not asked for is an empty tensor.
`z` is the bottleneck's pre-activation, `s` the input of the LayerNorm, both rounded to the compute dtype. A linear's
`z` is for its own backend's backward alone: the pre-activation, or in bfloat16 on a CPU the activation's derivative as
one byte (:func:`derivative_in_a_byte`).
"""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("fastadapt", "DEF")

library.define(
    "bottleneck_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, str activation, "
    "float scale, Tensor? scale_vector, bool skip, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, float dropout_p, Tensor? seed, bool save) -> (Tensor y, Tensor z, Tensor s)"
)
# g_up, g_bias: gradients of w_up and b_up before the scale is applied (dw_up = scale * g_up).
library.define(
    "bottleneck_backward(Tensor dy, Tensor x, Tensor z, Tensor s, Tensor w_down, Tensor w_up, str activation, "
    "float scale, Tensor? scale_vector, bool skip, Tensor? norm_weight, float eps, float dropout_p, Tensor? seed, "
    "bool need_dx, bool need_dresidual, bool need_dweights, bool need_dnorm) -> (Tensor dx, Tensor dresidual, "
    "Tensor dw_down, Tensor db_down, Tensor g_up, Tensor g_bias, Tensor dnorm_weight, Tensor dnorm_bias)"
)
library.define(
    "add_norm_forward(Tensor x, Tensor? residual, Tensor norm_weight, Tensor norm_bias, float eps, "
    "float dropout_p, Tensor? seed, bool save) -> (Tensor y, Tensor s)"
)
library.define(
    "add_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor norm_weight, float eps, float dropout_p, "
    "Tensor? seed, bool need_dx, bool need_dresidual, bool need_dnorm) "
    "-> (Tensor dx, Tensor dresidual, Tensor dnorm_weight, Tensor dnorm_bias)"
)
library.define(
    "linear_forward(Tensor x, Tensor[] weights, Tensor?[] biases, str activation, float dropout_p, Tensor? seed, "
    "bool save) -> (Tensor y, Tensor z)"
)
library.define(
    "linear_backward(Tensor dy, Tensor z, Tensor[] weights, str activation, float dropout_p, Tensor? seed, "
    "bool need_dx, bool need_dbias) -> (Tensor dx, Tensor dbias)"
)
library.define("drop(Tensor x, float dropout_p, Tensor seed) -> Tensor")
library.define(
    "attention_forward(Tensor qkv, Tensor? mask, int heads, float scale, float dropout_p, Tensor? seed, bool save) "
    "-> (Tensor out, Tensor lse)"
)
library.define(
    "attention_backward(Tensor dout, Tensor qkv, Tensor? mask, Tensor lse, int heads, float scale, "
    "float dropout_p, Tensor? seed) -> Tensor dqkv"
)


def derivative_in_a_byte(x: Tensor, activation: str) -> bool:
    """Whether the CPU kernels keep σ' of a linear as one byte: round(202 σ') + 26, so that 0 and 1 are exact.

    The step of 1/202 is as coarse as bfloat16 is just below 1, and σ' of these activations lies in [-0.13, 1.13].
    """
    ranges = ("relu", "gelu", "gelu_new", "silu", "leaky_relu")
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and activation in ranges


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape)


def _grad(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("fastadapt::bottleneck_forward", lib=library)
def _(
    x, w_down, b_down, w_up, b_up, activation, scale, scale_vector, skip, residual, norm_weight, norm_bias, eps,
    dropout_p, seed, save,
):  # fmt: skip
    rows, hidden = x.shape
    z = _like(x, rows, w_down.shape[0]) if save else _like(x, 0)
    s = _like(x, rows, hidden) if save and norm_weight is not None else _like(x, 0)
    return _like(x, rows, hidden), z, s


@torch.library.register_fake("fastadapt::bottleneck_backward", lib=library)
def _(
    dy, x, z, s, w_down, w_up, activation, scale, scale_vector, skip, norm_weight, eps, dropout_p, seed, need_dx,
    need_dresidual, need_dweights, need_dnorm,
):  # fmt: skip
    (rows, hidden), b = x.shape, w_down.shape[0]
    weights = [(b, hidden), (b,), (hidden, b), (hidden,)] if need_dweights else [(0,)] * 4
    norm = [(hidden,)] * 2 if need_dnorm else [(0,)] * 2
    return (
        _like(x, rows, hidden) if need_dx else _like(x, 0),
        _like(x, rows, hidden) if need_dresidual else _like(x, 0),
        *(_grad(x, *shape) for shape in weights),
        *(_grad(x, *shape) for shape in norm),
    )


@torch.library.register_fake("fastadapt::add_norm_forward", lib=library)
def _(x, residual, norm_weight, norm_bias, eps, dropout_p, seed, save):
    return torch.empty_like(x), torch.empty_like(x) if save else _like(x, 0)


@torch.library.register_fake("fastadapt::add_norm_backward", lib=library)
def _(dy, ds, s, norm_weight, eps, dropout_p, seed, need_dx, need_dresidual, need_dnorm):
    norm = (s.shape[1],) if need_dnorm else (0,)
    return (
        torch.empty_like(s) if need_dx else _like(s, 0),
        torch.empty_like(s) if need_dresidual else _like(s, 0),
        _grad(s, *norm),
        _grad(s, *norm),
    )


@torch.library.register_fake("fastadapt::linear_forward", lib=library)
def _(x, weights, biases, activation, dropout_p, seed, save):
    y = _like(x, x.shape[0], sum(w.shape[0] for w in weights))
    if not save or activation == "none":
        return y, _like(x, 0)
    return y, torch.empty_like(y, dtype=torch.uint8 if derivative_in_a_byte(x, activation) else None)


@torch.library.register_fake("fastadapt::linear_backward", lib=library)
def _(dy, z, weights, activation, dropout_p, seed, need_dx, need_dbias):
    return (
        _like(dy, dy.shape[0], weights[0].shape[1]) if need_dx else _like(dy, 0),
        _grad(dy, dy.shape[1]) if need_dbias else _grad(dy, 0),
    )


@torch.library.register_fake("fastadapt::drop", lib=library)
def _(x, dropout_p, seed):
    return torch.empty_like(x)


@torch.library.register_fake("fastadapt::attention_forward", lib=library)
def _(qkv, mask, heads, scale, dropout_p, seed, save):
    batch, length, width = qkv.shape
    return _like(qkv, batch, length, width // 3), _grad(qkv, batch, heads, length) if save else _grad(qkv, 0)


@torch.library.register_fake("fastadapt::attention_backward", lib=library)
def _(dout, qkv, mask, lse, heads, scale, dropout_p, seed):
    return torch.empty_like(qkv)
