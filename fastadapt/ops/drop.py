"""Dropout alone, for where no product and no LayerNorm stands beside it: y = x · mask / (1 - p)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.dropout import resolve_seed
from fastadapt.ops.once import once_differentiable


def drop(x: Tensor, dropout_p: float, *, seed: int | Tensor | None = None) -> Tensor:
    """Dropout whose mask comes from a counter and is made again in backward.

    Args:
        x: [..., H]; the mask's columns are its last dimension.
        dropout_p, seed: as in :func:`fastadapt.ops.bottleneck`.

    Returns:
        A tensor like x; x itself where ``dropout_p`` is 0.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    checks.activations("x", x)
    dropout_p = checks.probability("dropout_p", dropout_p)
    seed = resolve_seed(seed, dropout_p, x.device)
    if seed is None:
        return x
    flat = checks.flatten(x, x.dtype)
    y = _Drop.apply(flat, dropout_p, seed) if checks.differentiable(x) else _run(flat, dropout_p, seed)
    return y.view(x.shape)


def _run(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return dispatch.pick("drop", x.device.type, x.dtype)(x, dropout_p, seed)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        ctx.save_for_backward(seed)
        ctx.dropout_p = dropout_p
        return _run(x, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _run(dy.contiguous(), ctx.dropout_p, ctx.saved_tensors[0]), None, None
