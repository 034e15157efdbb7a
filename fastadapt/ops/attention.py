"""Multi-head self-attention over a packed query-key-value projection, with dropout on the probabilities.

    P = softmax(scale · Q Kᵀ + mask),  out = drop(P) V

Nothing of size [S, S] is kept for backward: the probabilities are made again from the saved log-sum-exp, as
FlashAttention does (Dao et al. 2022, arXiv:2205.14135, section 3.1), and the mask from the counter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.schemas import accumulation_dtype


def attention(
    qkv: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Self-attention of every head.

    Args:
        qkv: [B, S, 3H]: queries, keys and values side by side, each of ``heads`` heads of H / heads.
        heads: number of heads.
        mask: broadcastable to [B, heads, S, S]; boolean (True: may be attended to) or added to the scores.
        scale: factor of the scores; None is (H / heads) ** -0.5.
        dropout_p, seed: as in :func:`fastadapt.ops.bottleneck`, on the probabilities; the mask's rows are
            (batch, head, query), its columns the keys.

    Returns:
        [B, S, H] in qkv's dtype.
    """
    checks.floating("qkv", qkv)
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}; accepted is [B, S, 3H] with H a multiple of {heads} heads"
        )
    dropout_p = checks.probability("dropout_p", dropout_p)
    batch, length, width = qkv.shape
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask: got dtype {mask.dtype}; accepted are bool and floating")
        try:
            mask = mask.expand(batch, heads, length, length)
        except RuntimeError:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}; accepted is what broadcasts to {(batch, heads, length, length)}"
            ) from None
    seed = resolve_seed(seed, dropout_p, qkv.device)
    scale = (width // 3 // heads) ** -0.5 if scale is None else scale
    qkv = qkv.to(checks.compute_dtype(qkv)).contiguous()
    if checks.differentiable(qkv):
        return _Attention.apply(qkv, mask, heads, scale, dropout_p, seed)
    kernel = dispatch.pick("attention_forward", qkv.device.type, qkv.dtype, head_dim=width // 3 // heads, length=length)
    return kernel(qkv, mask, heads, scale, dropout_p, seed, False)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, mask, heads, scale, dropout_p, seed):
        facts = {"head_dim": qkv.shape[2] // 3 // heads, "length": qkv.shape[1]}
        kernel = dispatch.pick("attention_forward", qkv.device.type, qkv.dtype, **facts)
        out, lse = kernel(qkv, mask, heads, scale, dropout_p, seed, True)
        ctx.save_for_backward(qkv, mask, lse, seed)
        ctx.options, ctx.facts = (heads, scale, dropout_p), facts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, mask, lse, seed = ctx.saved_tensors
        kernel = dispatch.pick("attention_backward", qkv.device.type, qkv.dtype, **ctx.facts)
        return kernel(dout.contiguous(), qkv, mask, lse, *ctx.options, seed), *([None] * 5)


# -- reference ---------------------------------------------------------------------------------------------------


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(accumulation_dtype(q.dtype)) * scale
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def attention_forward(qkv, mask, heads, scale, dropout_p, seed, save):
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    q, k, v = _split(qkv, heads)
    scores = _scores(q, k, mask, scale)
    lse = torch.logsumexp(scores, -1)
    # A row with every key masked attends to nothing and gives zeros, as PyTorch's own attention does.
    p = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    p = dropout(p, dropout_p, seed).to(qkv.dtype)
    out = (p @ v).transpose(1, 2).reshape(*qkv.shape[:2], qkv.shape[2] // 3)
    return out, lse if save else lse.new_empty(0)


def attention_backward(dout, qkv, mask, lse, heads, scale, dropout_p, seed):
    """The oracle of every backend's backward."""
    wide = lse.dtype
    q, k, v = _split(qkv, heads)
    do = dout.view(*qkv.shape[:2], heads, q.shape[-1]).transpose(1, 2)
    p = torch.exp(_scores(q, k, mask, scale) - lse.unsqueeze(-1)).nan_to_num(0.0)
    dv = dropout(p, dropout_p, seed).to(qkv.dtype).transpose(-1, -2) @ do
    dp = dropout((do @ v.transpose(-1, -2)).to(wide), dropout_p, seed)
    ds = (p * (dp - (dp * p).sum(-1, keepdim=True)) * scale).to(qkv.dtype)
    dq, dk = ds @ k, ds.transpose(-1, -2) @ q
    return torch.stack([dq, dk, dv], dim=2).permute(0, 3, 2, 1, 4).reshape(qkv.shape)
