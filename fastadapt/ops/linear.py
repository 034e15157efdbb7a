"""Linear layers with frozen, packed weights, an activation and dropout; several weights share one input.

y = drop(σ(x [W_0; W_1; ...]ᵀ + [b_0; b_1; ...]))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks, lora
from fastadapt.ops.activations import activate, canonical, derivative
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.lora import LowRank, LowRanks
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    activation: str = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    loras: Sequence[LowRank] | LowRanks = (),
    rows: Tensor | None = None,
) -> Tensor:
    """``drop(σ(x Wᵀ + bias))``; a list of weights is one stacked matrix (query, key and value as one product).

    Weights are packed once and packed anew when their version counter changes; a bias may require a gradient, and
    a weight that requires one takes the reference path, which differentiates it.

    Args:
        x: [..., K].
        weight: [N, K], or a sequence of [N_i, K].
        bias: [N] or None, or a sequence of the same length; with ``rows``, of that length for every slot.
        activation, dropout_p, seed: as in :func:`fastadapt.ops.bottleneck`.
        loras: low-rank additions; several to one weight sum.
        rows: [B] int64, for x of B batch rows: the slot of each. A batch row has the biases of its slot and the LoRAs
            that name that slot. None is slot 0 for all.

    Returns:
        [..., ΣN_i] in x's dtype, or in autocast's where autocast is on.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [bias] if bias is None or isinstance(bias, Tensor) else list(bias)
    if len(biases) == 1 and biases[0] is None:
        biases = [None] * len(weights)
    if not weights or not biases or len(biases) % len(weights) or (rows is None and len(weights) != len(biases)):
        accepted = "one a weight" if rows is None else "one a weight for each slot"
        raise ValueError(f"bias: got {len(biases)} for {len(weights)} weights; accepted is {accepted}")
    y = dispatch.straight(_inferred, x, dropout_p, weights, biases, activation, loras, rows)
    if y is not None:
        return y
    checks.activations("x", x)
    depth, device = x.shape[-1], x.device
    for w in weights:
        checks.floating("weight", w)
        if w.dim() != 2:
            raise ValueError(f"weight: got shape {tuple(w.shape)}; accepted is [N, {depth}]")
        checks.shape("weight", w, (w.shape[0], depth), device)
    for i, w in enumerate(weights):
        checked = None  # the slots of a batch mostly share a bias
        for b in biases[i :: len(weights)]:
            if b is not checked:
                checks.shape("bias", b, (w.shape[0],), device)
                checked = b
    activation = canonical(activation)
    dropout_p = checks.probability("dropout_p", dropout_p)
    dtype = checks.compute_dtype(x)
    loras = loras if isinstance(loras, LowRanks) else LowRanks().extend(loras)
    if loras or rows is not None:
        lora.check(loras, weights, len(biases) // len(weights), x.device)
        checks.rows(rows, x, len(biases) // len(weights))
    seed = resolve_seed(seed, dropout_p, x.device)
    flat = checks.flatten(x, dtype)
    options = (activation, dropout_p, seed)
    if loras or rows is not None:
        y = lora.lora(flat, weights, biases, loras, rows, *options)
    elif checks.differentiable(*weights):
        y, _ = linear_forward(flat, weights, biases, *options, False)
    elif checks.differentiable(x, *biases):
        y = _Linear.apply(flat, *options, len(weights), *weights, *biases)
    else:
        kernel = dispatch.pick("linear_forward", x.device.type, dtype, **_facts(x, weights))
        y, _ = kernel(flat, weights, biases, *options, False)
    return y.view(*x.shape[:-1], y.shape[-1])


def _inferred(kernels, x, weights, biases, activation, loras, rows):
    """:func:`linear` by kernels that check what they are given."""
    flat, activation = x.view(-1, x.shape[-1]), canonical(activation)
    if rows is None and not loras:
        y = kernels.linear_forward(flat, weights, biases, activation, 0.0, None, False)[0]
    else:
        loras = loras if isinstance(loras, LowRanks) else LowRanks().extend(loras)
        if any(loras.dropout_p) or (rows is not None and rows.shape != x.shape[:1]):
            raise ValueError("a dropout, or rows that are not the batch's")
        y = kernels.lora_forward(
            flat, weights, biases, loras.a, loras.b, loras.scales, loras.weights, loras.slots, rows, loras.dropout_p,
            None, activation, 0.0, None, False,
        )[0]  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias + scale · (drop(x) aᵀ) bᵀ`` as one product.

    Args:
        x: [..., K].
        weight: [N, K]; ``bias``: [N] or None.
        a: [r, K]; ``b``: [N, r].
        scale: a float.
        dropout_p, seed: dropout of what ``a`` reads, as in :func:`fastadapt.ops.bottleneck`.

    Returns:
        [..., N] in x's dtype, or in autocast's where autocast is on.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    return linear(x, weight, bias, loras=[LowRank(a, b, scale, dropout_p=dropout_p, seed=seed)])


def _facts(x: Tensor, weights: list[Tensor]) -> dict[str, int]:
    return {"features": x.shape[-1], "outputs": sum(w.shape[0] for w in weights)}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, dropout_p, seed, count, *parameters):
        weights, biases = list(parameters[:count]), list(parameters[count:])
        # z is the backend's own, so backward must be of the backend that serves forward.
        backend = dispatch.serving("linear_forward", x.device.type, x.dtype, **_facts(x, weights))
        y, z = dispatch.kernel(backend, "linear_forward")(x, weights, biases, activation, dropout_p, seed, True)
        ctx.save_for_backward(z, seed, *weights)
        ctx.options = (activation, dropout_p, backend)
        ctx.biases = [None if b is None else (b.shape[0], b.dtype) for b in biases]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, seed, *weights = ctx.saved_tensors
        activation, dropout_p, backend = ctx.options
        need_dbias = ctx.needs_input_grad[5 + len(weights) :]
        dx, dbias = dispatch.kernel(backend, "linear_backward")(
            dy.contiguous(), z, weights, activation, dropout_p, seed, ctx.needs_input_grad[0], any(need_dbias)
        )
        dbiases: list[Tensor | None] = [None] * len(weights)
        if any(need_dbias):
            parts = dbias.split([w.shape[0] for w in weights])
            dbiases = [p.to(b[1]) if n else None for p, b, n in zip(parts, ctx.biases, need_dbias, strict=True)]
        return dx if ctx.needs_input_grad[0] else None, None, None, None, None, *([None] * len(weights)), *dbiases


# -- reference ---------------------------------------------------------------------------------------------------


def linear_forward(x, weights, biases, activation, dropout_p, seed, save):
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    cast = [None if b is None else b.to(x.dtype) for b in biases]
    parts = [F.linear(x, w.to(x.dtype), b) for w, b in zip(weights, cast, strict=True)]
    z = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    y = dropout(activate(activation, z), dropout_p, seed)
    return y, z if save and activation != "none" else x.new_empty(0)


def linear_backward(dy, z, weights, activation, dropout_p, seed, need_dx, need_dbias):
    """The oracle of every backend's backward."""
    dz = dropout(dy, dropout_p, seed)
    if activation != "none":
        dz = dz * derivative(activation, z)
    wide = accumulation_dtype(dy.dtype)
    dx = dz @ torch.cat([w.to(dy.dtype) for w in weights]) if need_dx else dy.new_empty(0)
    dbias = dz.to(wide).sum(0) if need_dbias else dy.new_empty(0, dtype=wide)
    return dx, dbias
