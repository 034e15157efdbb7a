"""Residual add, dropout and LayerNorm as one op, for sublayers without an adapter.

s = drop(x) + [residual],  y = LN(s)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``LN(drop(x) + residual)``, and with ``return_sum`` also the sum under the LayerNorm.

    Args:
        x: [..., H]; ``residual``: of x's shape, or None.
        norm_weight, norm_bias: [H].
        eps: LayerNorm's epsilon.
        dropout_p, seed: as in :func:`fastadapt.ops.bottleneck`, on x.
        return_sum: return ``(y, s)``, both differentiable.

    Returns:
        y, of x's shape, in x's dtype or in autocast's where autocast is on; with ``return_sum`` (y, s), and s, the sum,
        is like y.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    found = dispatch.straight(_inferred, x, dropout_p, residual, norm_weight, norm_bias, eps, return_sum)
    if found is not None:
        return found
    checks.activations("x", x)
    hidden = x.shape[-1]
    checks.like("residual", residual, x)
    checks.shape("norm_weight", norm_weight, (hidden,), x.device)
    checks.shape("norm_bias", norm_bias, (hidden,), x.device)
    dropout_p, eps = checks.probability("dropout_p", dropout_p), checks.epsilon("eps", eps)
    dtype = checks.compute_dtype(x)
    seed = resolve_seed(seed, dropout_p, x.device)
    flat = checks.flatten(x, dtype)
    flat_residual = None if residual is None else checks.flatten(residual, dtype)
    if checks.differentiable(x, residual, norm_weight, norm_bias):
        y, s = _AddNorm.apply(flat, flat_residual, norm_weight, norm_bias, eps, dropout_p, seed, return_sum)
    else:
        kernel = dispatch.pick("add_norm_forward", x.device.type, dtype, hidden=hidden, rows=flat.shape[0])
        y, s = kernel(flat, flat_residual, norm_weight, norm_bias, eps, dropout_p, seed, return_sum)
    return (y.view(x.shape), s.view(x.shape)) if return_sum else y.view(x.shape)


def _inferred(kernels, x, residual, norm_weight, norm_bias, eps, return_sum):
    """:func:`add_norm` by kernels that check what they are given."""
    if type(eps) is not float:
        raise TypeError("the dispatcher would take True for 1.0")
    flat, beside = x.view(-1, x.shape[-1]), None if residual is None else checks.flat_like(residual, x)
    y, s = kernels.add_norm_forward(flat, beside, norm_weight, norm_bias, eps, 0.0, None, return_sum)
    return (y.view_as(x), s.view_as(x)) if return_sum else y.view_as(x)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, norm_bias, eps, dropout_p, seed, return_sum):
        kernel = dispatch.pick("add_norm_forward", x.device.type, x.dtype, hidden=x.shape[1], rows=x.shape[0])
        y, s = kernel(x, residual, norm_weight, norm_bias, eps, dropout_p, seed, True)
        ctx.save_for_backward(s, norm_weight, norm_bias, seed)
        ctx.options = (eps, dropout_p)
        ctx.set_materialize_grads(False)
        if not return_sum:
            ctx.mark_non_differentiable(s)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        s, norm_weight, norm_bias, seed = ctx.saved_tensors
        eps, dropout_p = ctx.options
        need = ctx.needs_input_grad
        dy = torch.zeros_like(s) if dy is None else dy.contiguous()
        ds = None if ds is None else ds.contiguous()
        kernel = dispatch.pick("add_norm_backward", dy.device.type, dy.dtype, hidden=dy.shape[1])
        dx, dresidual, dweight, dbias = kernel(
            dy, ds, s, norm_weight, eps, dropout_p, seed, need[0], need[1], any(need[2:4])
        )
        return (
            dx if need[0] else None,
            dresidual if need[1] else None,
            dweight.to(norm_weight.dtype) if need[2] else None,
            dbias.to(norm_bias.dtype) if need[3] else None,
            *([None] * 4),
        )


# -- reference ---------------------------------------------------------------------------------------------------


def norm_backward_reference(dy, s, norm_weight, eps, need_dnorm):
    """(ds in dy's dtype, dweight, dbias) of y = LN(s), statistics in float32 or wider."""
    wide = accumulation_dtype(dy.dtype)
    wide_s, wide_dy = s.to(wide), dy.to(wide)
    mean = wide_s.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide_s - mean).square().mean(-1, keepdim=True) + eps)
    normalised = (wide_s - mean) * rstd
    d = wide_dy * norm_weight.to(wide)
    ds = rstd * (d - d.mean(-1, keepdim=True) - normalised * (d * normalised).mean(-1, keepdim=True))
    empty = dy.new_empty(0, dtype=wide)
    if not need_dnorm:
        return ds.to(dy.dtype), empty, empty
    return ds.to(dy.dtype), (wide_dy * normalised).sum(0), wide_dy.sum(0)


def add_norm_forward(x, residual, norm_weight, norm_bias, eps, dropout_p, seed, save):
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    s = dropout(x, dropout_p, seed)
    if residual is not None:
        s = s + residual
    y = F.layer_norm(s, s.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    if not save:
        return y, x.new_empty(0)
    return y, s.clone() if s is x else s  # an op's output may not share its input's memory


def add_norm_backward(dy, ds, s, norm_weight, eps, dropout_p, seed, need_dx, need_dresidual, need_dnorm):
    """The oracle of every backend's backward; ``ds`` is the gradient of the sum where that was returned."""
    d, dweight, dbias = norm_backward_reference(dy, s, norm_weight, eps, need_dnorm)
    if ds is not None:
        d = d + ds
    empty = dy.new_empty(0)
    dx = dropout(d, dropout_p, seed) if need_dx else empty
    dresidual = empty if not need_dresidual else d.clone() if dx is d else d
    return dx, dresidual, dweight, dbias
