"""Multi-head self-attention over a packed query-key-value projection, with dropout on the probabilities.

    P = softmax(scale · Q [P_K; K]ᵀ + [0, mask]),  out = drop(P) [P_V; V]

with a prefix (P_K, P_V) of learned keys and values (Li and Liang 2021, arXiv:2101.00190) or none.

Nothing of size [S, S] is kept for backward: the probabilities are made again from the saved log-sum-exp, as
FlashAttention does (Dao et al. 2022, arXiv:2205.14135, section 3.1), and the mask from the counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype


def attention(
    qkv: Tensor,
    heads: int,
    *,
    prefix: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Self-attention of every head.

    Args:
        qkv: [B, S, 3H]: queries, keys and values side by side, each of ``heads`` heads of H / heads.
        heads: number of heads.
        prefix: [2, P, H], or [B, 2, P, H] with one for each row of the batch: keys and values of P positions before
            the sequence's own, of any floating dtype, cast to the compute dtype. Its gradient is summed over the
            batch in float32, always in the same order, and rounded once.
        mask: broadcastable to [B, heads, S, S]; boolean (True: may be attended to) or added to the scores. It is of
            the sequence's own keys; a prefix is never masked.
        scale: factor of the scores; None is (H / heads) ** -0.5.
        dropout_p, seed: as in :func:`fastadapt.ops.bottleneck`, on the probabilities; the mask's rows are
            (batch, head, query), its columns the P + S keys, the prefix's first.

    Returns:
        [B, S, H] in qkv's dtype, or in autocast's where autocast is on.

    Raises:
        TypeError: an argument has a dtype that is not accepted.
        ValueError: shapes or devices do not fit together, or ``dropout_p`` is no probability.
    """
    out = dispatch.straight(_inferred, qkv, dropout_p, heads, prefix, mask, scale)
    if out is not None:
        return out
    checks.floating("qkv", qkv)
    checks.count("heads", heads)
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}; accepted is [B, S, 3H] with H a multiple of {heads} heads"
        )
    dropout_p = checks.probability("dropout_p", dropout_p)
    batch, length, width = qkv.shape
    if prefix is not None:
        checks.floating("prefix", prefix)
        expected = (2, prefix.shape[-2] if prefix.dim() > 1 else 0, width // 3)
        if tuple(prefix.shape) not in (expected, (batch, *expected)):
            raise ValueError(
                f"prefix: got shape {tuple(prefix.shape)}; accepted are [2, P, {width // 3}] and "
                f"[{batch}, 2, P, {width // 3}]"
            )
        if prefix.device != qkv.device:
            raise ValueError(f"prefix: is on {prefix.device}, but qkv is on {qkv.device}; move one of them")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: got {type(mask).__name__}; accepted are None and a tensor")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask: got dtype {mask.dtype}; accepted are bool and floating")
        try:
            mask = mask.expand(batch, heads, length, length)
        except RuntimeError:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}; accepted is what broadcasts to {(batch, heads, length, length)}"
            ) from None
        if mask.device != qkv.device:
            raise ValueError(f"mask: is on {mask.device}, but qkv is on {qkv.device}; move one of them")
    seed = resolve_seed(seed, dropout_p, qkv.device)
    scale = (width // 3 // heads) ** -0.5 if scale is None else checks.number("scale", scale, "None or a number")
    qkv = qkv.to(checks.compute_dtype(qkv)).contiguous()
    if checks.differentiable(qkv, prefix):
        return _Attention.apply(qkv, prefix, mask, heads, scale, dropout_p, seed)
    prefix = _cast(prefix, qkv.dtype)
    kernel = dispatch.pick("attention_forward", qkv.device.type, qkv.dtype, **_facts(qkv, prefix, heads))
    return kernel(qkv, prefix, mask, heads, scale, dropout_p, seed, False)[0]


def _inferred(kernels, qkv, heads, prefix, mask, scale):
    """:func:`attention` by kernels that check what they are given."""
    batch, length, width = qkv.shape
    factor = (width // 3 // heads) ** -0.5 if scale is None else scale
    if type(factor) is not float or type(heads) is not int:
        raise TypeError("the dispatcher would take True for 1.0 and for 1")
    seen = None if mask is None else mask.expand(batch, heads, length, length)
    return kernels.attention_forward(qkv, _cast(prefix, qkv.dtype), seen, heads, factor, 0.0, None, False)[0]


def _cast(prefix: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if prefix is None else prefix.to(dtype).contiguous()


def _facts(qkv: Tensor, prefix: Tensor | None, heads: int) -> dict[str, int]:
    keys = qkv.shape[1] + (0 if prefix is None else prefix.shape[-2])
    return {"head_dim": qkv.shape[2] // 3 // heads, "length": keys}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, prefix, mask, heads, scale, dropout_p, seed):
        # Cast here and not outside, where the gradient would be rounded to the compute dtype on its way back.
        ctx.prefix_dtype = None if prefix is None else prefix.dtype
        prefix = _cast(prefix, qkv.dtype)
        facts = _facts(qkv, prefix, heads)
        kernel = dispatch.pick("attention_forward", qkv.device.type, qkv.dtype, **facts)
        out, lse = kernel(qkv, prefix, mask, heads, scale, dropout_p, seed, True)
        ctx.save_for_backward(qkv, prefix, mask, lse, seed)
        ctx.options, ctx.facts = (heads, scale, dropout_p), facts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, prefix, mask, lse, seed = ctx.saved_tensors
        kernel = dispatch.pick("attention_backward", qkv.device.type, qkv.dtype, **ctx.facts)
        dqkv, dprefix = kernel(dout.contiguous(), qkv, prefix, mask, lse, *ctx.options, seed)
        return dqkv, None if prefix is None else dprefix.to(ctx.prefix_dtype), *([None] * 5)


# -- reference ---------------------------------------------------------------------------------------------------


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _with_prefix(k: Tensor, v: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
    """k, v [B, heads, S, d] behind the prefix's."""
    if prefix is None:
        return k, v
    batch, heads = k.shape[:2]
    by_row = prefix if prefix.dim() == 4 else prefix.expand(batch, *prefix.shape)
    before_k, before_v = by_row.unflatten(-1, (heads, k.shape[-1])).permute(1, 0, 3, 2, 4)
    return torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(accumulation_dtype(q.dtype)) * scale
    if mask is None:
        return scores
    prefix, own = scores.split([k.shape[2] - q.shape[2], q.shape[2]], dim=-1)
    own = own.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else own + mask
    return torch.cat([prefix, own], dim=-1)


def attention_forward(qkv, prefix, mask, heads, scale, dropout_p, seed, save):
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    q, k, v = _split(qkv, heads)
    k, v = _with_prefix(k, v, prefix)
    scores = _scores(q, k, mask, scale)
    lse = torch.logsumexp(scores, -1)
    # A row with every key masked attends to nothing and gives zeros, as PyTorch's own attention does.
    p = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    p = dropout(p, dropout_p, seed).to(qkv.dtype)
    out = (p @ v).transpose(1, 2).reshape(*qkv.shape[:2], qkv.shape[2] // 3)
    return out, lse if save else lse.new_empty(0)


def attention_backward(dout, qkv, prefix, mask, lse, heads, scale, dropout_p, seed):
    """The oracle of every backend's backward."""
    wide = lse.dtype
    q, k, v = _split(qkv, heads)
    k, v = _with_prefix(k, v, prefix)
    do = dout.view(*qkv.shape[:2], heads, q.shape[-1]).transpose(1, 2)
    p = torch.exp(_scores(q, k, mask, scale) - lse.unsqueeze(-1)).nan_to_num(0.0)
    dv = dropout(p, dropout_p, seed).to(qkv.dtype).transpose(-1, -2) @ do
    dp = dropout((do @ v.transpose(-1, -2)).to(wide), dropout_p, seed)
    ds = (p * (dp - (dp * p).sum(-1, keepdim=True)) * scale).to(qkv.dtype)
    dq, dk = ds @ k, ds.transpose(-1, -2) @ q
    before = k.shape[2] - q.shape[2]
    dqkv = torch.stack([dq, dk[:, :, before:], dv[:, :, before:]], dim=2).permute(0, 3, 2, 1, 4).reshape(qkv.shape)
    if prefix is None:
        return dqkv, qkv.new_empty(0, dtype=wide)
    by_row = torch.stack([dk[:, :, :before], dv[:, :, :before]], dim=1).transpose(2, 3).flatten(3).to(wide)
    return dqkv, by_row if prefix.dim() == 4 else by_row.sum(0)
