"""The mix of AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2), computed in the bottlenecks.

    scores_n = g_n · σ_n + c_n + shift,  p = softmax_n(drop(scores)),  m = [p_1 σ_1, ..., p_N σ_N, p_1, ..., p_N]

σ_n is adapter n's activation, t = [g_1, ..., g_N, c_1, ..., c_N] what a query makes of its W_up and b_up
(:mod:`fastadapt.modules.fusion`), and m what one product with all W_up and b_up side by side turns into the mix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype


def mix(
    sigma: Tensor,
    t: Tensor,
    count: int,
    *,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Scores of N adapters, their softmax, and the activations weighted with it.

    Args:
        sigma: [..., N·b], the adapters' activations side by side.
        t: [..., N·b + N]: what σ is multiplied with for the scores, then what is added to them.
        count: N.
        shift: [...], added to every score of a row; it matters where a score is dropped. Or None.
        dropout_p, seed: as in :func:`fastadapt.ops.bottleneck`, on the scores, whose columns are the N adapters.

    Returns:
        [..., N·b + N] in sigma's dtype, or in autocast's where autocast is on.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    checks.floating("sigma", sigma)
    if sigma.dim() < 1 or count < 1 or sigma.shape[-1] % count or not sigma.shape[-1]:
        raise ValueError(f"sigma: got shape {tuple(sigma.shape)}; accepted is [..., N·b] with N = {count}")
    rows = tuple(sigma.shape[:-1])
    checks.shape("t", t, (*rows, sigma.shape[-1] + count), sigma.device)
    checks.shape("shift", shift, rows, sigma.device)
    dropout_p = checks.probability("dropout_p", dropout_p)
    seed = resolve_seed(seed, dropout_p, sigma.device)
    dtype = checks.compute_dtype(sigma)
    flat = checks.flatten(sigma, dtype), checks.flatten(t, dtype)
    flat_shift = None if shift is None else shift.reshape(-1).to(dtype).contiguous()
    if checks.differentiable(sigma, t, shift):
        m = _Mix.apply(*flat, flat_shift, count, dropout_p, seed)
    else:
        m = _kernel("forward", flat[0], count)(*flat, flat_shift, count, dropout_p, seed)
    return m.view(t.shape)


def _kernel(direction: str, sigma: Tensor, count: int):
    facts = {"adapters": count, "bottleneck": sigma.shape[1] // count}
    return dispatch.pick(f"mix_{direction}", sigma.device.type, sigma.dtype, **facts)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigma, t, shift, count, dropout_p, seed):
        ctx.save_for_backward(sigma, t, shift, seed)
        ctx.options = (count, dropout_p)
        return _kernel("forward", sigma, count)(sigma, t, shift, count, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dm):
        sigma, t, shift, seed = ctx.saved_tensors
        count, _ = ctx.options
        kernel = _kernel("backward", sigma, count)
        dsigma, dt, dshift = kernel(dm.contiguous(), sigma, t, shift, *ctx.options, seed)
        return dsigma, dt, None if shift is None else dshift, None, None, None


# -- reference ---------------------------------------------------------------------------------------------------


def _parts(t: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[T, N, b] and [T, N], wide."""
    t = t.to(accumulation_dtype(t.dtype))
    return t[:, :-count].unflatten(1, (count, -1)), t[:, -count:]


def _weights(
    sigma: Tensor, g: Tensor, c: Tensor, shift: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    scores = (g * sigma).sum(-1) + c
    if shift is not None:
        scores = scores + shift.to(scores.dtype)[:, None]
    return torch.softmax(dropout(scores, dropout_p, seed), -1)


def mix_forward(sigma, t, shift, count, dropout_p, seed):
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    g, c = _parts(t, count)
    wide = sigma.to(g.dtype).unflatten(1, (count, -1))  # once: products of two dtypes take longer than the cast
    p = _weights(wide, g, c, shift, dropout_p, seed)
    return torch.cat([(wide * p[..., None]).flatten(1).to(t.dtype), p.to(t.dtype)], 1)


def mix_backward(dm, sigma, t, shift, count, dropout_p, seed):
    """The oracle of every backend's backward; the weights are made again."""
    g, c = _parts(t, count)
    dmixed, dp = _parts(dm, count)
    wide = sigma.unflatten(1, (count, -1)).to(g.dtype)
    p = _weights(wide, g, c, shift, dropout_p, seed)
    dp = dp + (dmixed * wide).sum(-1)
    dscores = dropout(p * (dp - (dp * p).sum(-1, keepdim=True)), dropout_p, seed)
    dsigma = (dmixed * p[..., None] + dscores[..., None] * g).flatten(1).to(sigma.dtype)
    dt = torch.cat([(dscores[..., None] * wide).flatten(1), dscores], 1).to(t.dtype)
    return dsigma, dt, t.new_empty(0) if shift is None else dscores.sum(-1).to(shift.dtype)
