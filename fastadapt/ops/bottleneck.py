"""The bottleneck adapter with its skip, residual, LayerNorm and dropout as one op.

    h = x W_downᵀ + b_down,  o = scale · (σ(h) W_upᵀ + b_up)
    s = drop(o) + [x if skip] + [residual],  y = LN(s) or s

Houlsby et al. 2019 (arXiv:1902.00751, fig. 2) is skip=True with residual and norm; Pfeiffer et al. 2020
(arXiv:2005.00247, eq. 1) skip=False; He et al. 2022 (arXiv:2110.04366, table 1) the parallel form, whose x is the
sublayer's input and whose residual is its output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.activations import activate, canonical, derivative
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.norm import norm_backward_reference
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype


def bottleneck(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    skip: bool = True,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``[LN](drop(scale · (σ(x W_downᵀ + b_down) W_upᵀ + b_up)) + [x if skip] + [residual])``.

    Args:
        x: [..., H], what the adapter reads; any strides, zero rows allowed.
        w_down: [b, H]; ``b_down``: [b] or None.
        w_up: [H, b]; ``b_up``: [H] or None.
        activation: a name of ``fastadapt.ops.ACTIVATIONS`` or an alias (``swish``, ``linear``, ...).
        scale: a float, or a tensor of shape [1] or [H], which may require a gradient.
        skip: add x (the adapter's own skip connection).
        residual: [..., H], the sublayer's skip, or None.
        norm_weight, norm_bias: [H], LayerNorm of the sum; both or neither.
        eps: LayerNorm's epsilon.
        dropout_p: probability with which an element of the adapter's output is dropped.
        seed: int or 0-d int64 tensor that keys the mask; None draws one from PyTorch's generator.

    Returns:
        [..., H] in x's dtype, or in autocast's where autocast is on.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    y = dispatch.straight(
        _inferred, x, dropout_p, w_down, b_down, w_up, b_up, activation, scale, skip, residual, norm_weight, norm_bias,
        eps,
    )  # fmt: skip
    if y is not None:
        return y
    checks.activations("x", x)
    hidden = x.shape[-1]
    checks.floating("w_down", w_down)
    if w_down.dim() != 2:
        raise ValueError(f"w_down: got shape {tuple(w_down.shape)}; accepted is [b, {hidden}]")
    b = w_down.shape[0]
    checks.shape("w_down", w_down, (b, hidden), x.device)
    checks.shape("b_down", b_down, (b,), x.device)
    checks.shape("w_up", w_up, (hidden, b), x.device)
    checks.shape("b_up", b_up, (hidden,), x.device)
    checks.like("residual", residual, x)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight, norm_bias: got one of them; accepted are both or neither")
    checks.shape("norm_weight", norm_weight, (hidden,), x.device)
    checks.shape("norm_bias", norm_bias, (hidden,), x.device)
    activation = canonical(activation)
    dropout_p, eps = checks.probability("dropout_p", dropout_p), checks.epsilon("eps", eps)
    if not isinstance(skip, bool):
        raise TypeError(f"skip: got {skip!r}; accepted are True and False")
    if isinstance(scale, Tensor):
        checks.scale("scale", scale, hidden, x.device)
        factor, vector = 1.0, scale
    else:
        factor, vector = checks.number("scale", scale, f"a float, or a tensor [1] or [{hidden}]"), None

    dtype = checks.compute_dtype(x)
    seed = resolve_seed(seed, dropout_p, x.device)
    flat = checks.flatten(x, dtype)
    flat_residual = None if residual is None else checks.flatten(residual, dtype)
    parameters = (w_down, b_down, w_up, b_up, vector, norm_weight, norm_bias)
    options = (activation, factor, skip, eps, dropout_p, seed)
    if checks.differentiable(x, residual, *parameters):
        y = _Bottleneck.apply(flat, flat_residual, *parameters, *options)
    else:
        y, _, _ = _forward(flat, flat_residual, *parameters, *options, save=False)
    return y.view(x.shape)


def _inferred(kernels, x, w_down, b_down, w_up, b_up, activation, scale, skip, residual, norm_weight, norm_bias, eps):
    """:func:`bottleneck` by kernels that check what they are given."""
    flat, beside = x.view(-1, x.shape[-1]), None if residual is None else checks.flat_like(residual, x)
    factor, vector = (1.0, scale.expand(x.shape[-1])) if isinstance(scale, Tensor) else (scale, None)
    if type(factor) is not float or type(eps) is not float or type(skip) is not bool:
        raise TypeError("the dispatcher would take True for 1.0 and None for False")
    return kernels.bottleneck_forward(
        flat, w_down, b_down, w_up, b_up, canonical(activation), factor, vector, skip, beside, norm_weight, norm_bias,
        eps, 0.0, None, False,
    )[0].view_as(x)  # fmt: skip


def _forward(x, residual, w_down, b_down, w_up, b_up, vector, norm_weight, norm_bias, activation, factor, skip, eps,
             dropout_p, seed, *, save):  # fmt: skip
    kernel = dispatch.pick(
        "bottleneck_forward", x.device.type, x.dtype, hidden=x.shape[1], bottleneck=w_down.shape[0], rows=x.shape[0]
    )
    if vector is not None:
        vector = vector.expand(x.shape[1])
    return kernel(
        x, w_down, b_down, w_up, b_up, activation, factor, vector, skip, residual, norm_weight, norm_bias, eps,
        dropout_p, seed, save,
    )  # fmt: skip


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, w_down, b_down, w_up, b_up, vector, norm_weight, norm_bias, activation, factor,
                skip, eps, dropout_p, seed):  # fmt: skip
        y, z, s = _forward(
            x, residual, w_down, b_down, w_up, b_up, vector, norm_weight, norm_bias, activation, factor, skip, eps,
            dropout_p, seed, save=True,
        )  # fmt: skip
        need_x = any(ctx.needs_input_grad[i] for i in (2, 3))
        ctx.save_for_backward(x if need_x else None, z, s, w_down, b_down, w_up, b_up, vector, norm_weight, norm_bias,
                              seed)  # fmt: skip
        ctx.options = (activation, factor, skip, eps, dropout_p)
        ctx.width = x.shape[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, s, w_down, b_down, w_up, b_up, vector, norm_weight, norm_bias, seed = ctx.saved_tensors
        activation, factor, skip, eps, dropout_p = ctx.options
        need = ctx.needs_input_grad
        dy = dy.contiguous()
        if x is None:
            x = dy.new_empty((0, ctx.width))  # w_down has no gradient: x is not read
        kernel = dispatch.pick(
            "bottleneck_backward", dy.device.type, dy.dtype, hidden=ctx.width, bottleneck=w_down.shape[0]
        )
        dx, dresidual, dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias = kernel(
            dy, x, z, s, w_down, w_up, activation, factor, None if vector is None else vector.expand(ctx.width), skip,
            norm_weight, eps, dropout_p, seed, need[0], need[1], any(need[2:7]), any(need[7:9]),
        )  # fmt: skip

        dvector = None
        if need[6]:
            dvector = (g_up * w_up).sum(1)
            if b_up is not None:
                dvector = dvector + g_bias * b_up
            dvector = dvector.sum_to_size(vector.shape).to(vector.dtype)
        if any(need[4:6]):
            scale = factor if vector is None else vector.expand(ctx.width).to(g_bias.dtype)
            dw_up = g_up * (scale if vector is None else scale[:, None])
            db_up = g_bias * scale
        grads = (
            dx,
            dresidual,
            dw_down.to(w_down.dtype) if need[2] else None,
            db_down.to(b_down.dtype) if need[3] else None,
            dw_up.to(w_up.dtype) if need[4] else None,
            db_up.to(b_up.dtype) if need[5] else None,
            dvector,
            dnorm_weight.to(norm_weight.dtype) if need[7] else None,
            dnorm_bias.to(norm_bias.dtype) if need[8] else None,
        )
        return (*(g if n else None for g, n in zip(grads, need, strict=False)), *([None] * 6))


# -- reference ---------------------------------------------------------------------------------------------------


def bottleneck_forward(x, w_down, b_down, w_up, b_up, activation, scale, scale_vector, skip, residual, norm_weight,
                       norm_bias, eps, dropout_p, seed, save):  # fmt: skip
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    dtype = x.dtype

    def cast(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.to(dtype)

    z = F.linear(x, cast(w_down), cast(b_down))
    o = F.linear(activate(activation, z), cast(w_up), cast(b_up))
    if scale_vector is not None:
        o = o * scale_vector.to(dtype)
    if scale != 1.0:
        o = o * scale
    s = dropout(o, dropout_p, seed)
    if skip:
        s = s + x
    if residual is not None:
        s = s + residual
    y = s
    if norm_weight is not None:
        y = F.layer_norm(s, s.shape[-1:], cast(norm_weight), cast(norm_bias), eps)
    empty = x.new_empty(0)
    return y, z if save else empty, s if save and norm_weight is not None else empty


def bottleneck_backward(dy, x, z, s, w_down, w_up, activation, scale, scale_vector, skip, norm_weight, eps, dropout_p,
                        seed, need_dx, need_dresidual, need_dweights, need_dnorm):  # fmt: skip
    """The oracle of every backend's backward."""
    wide = accumulation_dtype(dy.dtype)
    empty, empty_grad = dy.new_empty(0), dy.new_empty(0, dtype=wide)
    ds, dnorm_weight, dnorm_bias = dy, empty_grad, empty_grad
    if norm_weight is not None:
        ds, dnorm_weight, dnorm_bias = norm_backward_reference(dy, s, norm_weight, eps, need_dnorm)
    g = dropout(ds, dropout_p, seed)  # gradient of the scaled output o
    do = g * scale if scale != 1.0 else g
    if scale_vector is not None:
        do = do * scale_vector.to(do.dtype)
    dh = (do @ w_up.to(dy.dtype)) * derivative(activation, z)
    dx = dh @ w_down.to(dy.dtype) if need_dx else empty
    if need_dx and skip:
        dx = dx + ds
    dw_down = db_down = g_up = g_bias = empty_grad
    if need_dweights:
        a = activate(activation, z)
        dw_down = (dh.T @ x).to(wide) if x.shape[0] == dh.shape[0] else dh.new_zeros(w_down.shape, dtype=wide)
        db_down = dh.to(wide).sum(0)
        g_up = (g.T @ a).to(wide)
        g_bias = g.to(wide).sum(0)
    # A copy, because an op's outputs may not share memory with its inputs or with each other.
    dresidual = ds.clone() if need_dresidual else empty
    return dx, dresidual, dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias
