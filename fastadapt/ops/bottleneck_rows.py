"""Bottleneck adapters for a batch whose rows differ in theirs: every row has the adapter and LayerNorm of its slot.

    s = drop(scale · (σ(x W_downᵀ + b_down) W_upᵀ + b_up)) + [x if skip] + [residual],  y = LN(s)

with all parameters those of the row's slot; a slot without an adapter is y = LN([x if skip] + [residual]). Adapters are
those of :mod:`fastadapt.ops.bottleneck`; rows with parameters of their own as in Punica (arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.activations import canonical
from fastadapt.ops.bottleneck import bottleneck_backward, bottleneck_forward
from fastadapt.ops.dropout import resolve_seed
from fastadapt.ops.norm import add_norm_backward, add_norm_forward
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype


@dataclass(frozen=True, eq=False)
class Slot:
    """What runs in the rows of one slot.

    Args:
        norm_weight, norm_bias: [H], the LayerNorm of the sum.
        w_down: [b, H], or None for no adapter; ``b_down``: [b] or None.
        w_up: [H, b], with w_down; ``b_up``: [H] or None.
        activation: as in :func:`fastadapt.ops.bottleneck`.
        scale: a float, or a tensor [1] or [H], which may require a gradient.
        skip: x joins the sum.
        swap: the adapter reads the residual instead of x; both join the sum as before.
        dropout_p: probability with which an element of the adapter's output is dropped.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    w_down: Tensor | None = None
    b_down: Tensor | None = None
    w_up: Tensor | None = None
    b_up: Tensor | None = None
    activation: str = "gelu"
    scale: float | Tensor = 1.0
    skip: bool = True
    swap: bool = False
    dropout_p: float = 0.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """w_down, b_down, w_up, b_up, a scale that is a tensor, norm_weight and norm_bias; None for what is none."""
        vector = self.scale if isinstance(self.scale, Tensor) else None
        return (self.w_down, self.b_down, self.w_up, self.b_up, vector, self.norm_weight, self.norm_bias)


_PER_SLOT = 7


def bottleneck_rows(
    x: Tensor,
    slots: Sequence[Slot],
    rows: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-12,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The adapter, residual and LayerNorm of each row's slot, in one op.

    Args:
        x: [B, ..., H].
        slots: what the rows can have; at least one. Slots of no row cost nothing, and their gradients are zeros.
        rows: [B] int64, on x's device: the slot of each batch row. It is read when the op runs, so that a captured
            graph follows what is written into it.
        residual: of x's shape, or None.
        eps: of every LayerNorm.
        seed: int or 0-d int64 tensor that keys the dropout mask; None draws one from PyTorch's generator.

    Returns:
        A tensor of x's shape, in x's dtype, or in autocast's where autocast is on.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """
    y = dispatch.straight(_inferred, x, 0.0, slots, rows, residual, eps)
    if y is not None:
        return y
    checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted is [B, ..., H]")
    if not slots:
        raise ValueError("slots: got none; accepted is at least one Slot")
    hidden = x.shape[-1]
    checks.like("residual", residual, x)
    if rows is None:
        raise TypeError(f"rows: got None; accepted is an int64 tensor of shape ({x.shape[0]},), a slot a batch row")
    checks.rows(rows, x, len(slots))
    for n, slot in enumerate(slots):
        _check(n, slot, hidden, residual is not None, x.device)
    dtype = checks.compute_dtype(x)
    activations = [canonical(slot.activation) for slot in slots]
    dropout_p = [checks.probability(f"slots[{n}].dropout_p", slot.dropout_p) for n, slot in enumerate(slots)]
    scales = [
        1.0 if isinstance(slot.scale, Tensor) else checks.number(f"slots[{n}].scale", slot.scale)
        for n, slot in enumerate(slots)
    ]
    skips, swaps = [bool(slot.skip) for slot in slots], [bool(slot.swap) for slot in slots]
    seed = resolve_seed(seed, max(dropout_p), x.device)
    how = (activations, scales, skips, swaps, checks.epsilon("eps", eps), dropout_p, seed)
    flat = checks.flatten(x, dtype)
    flat_residual = None if residual is None else checks.flatten(residual, dtype)
    parameters = [p for slot in slots for p in slot.tensors()]
    if checks.differentiable(x, residual, *parameters):
        y = _Rows.apply(flat, flat_residual, rows, how, *parameters)
    else:
        y, _, _ = _forward(flat, flat_residual, rows, how, parameters, save=False)
    return y.view(x.shape)


def _inferred(kernels, x, slots, rows, residual, eps):
    """:func:`bottleneck_rows` by kernels that check what they are given."""
    if rows.shape != x.shape[:1] or any(type(s.dropout_p) is not float or s.dropout_p for s in slots):
        raise ValueError("a dropout, or rows that are not the batch's")
    flat, beside = x.view(-1, x.shape[-1]), None if residual is None else checks.flat_like(residual, x)
    w_down, b_down, w_up, b_up, vectors, norm_weights, norm_biases = zip(*(s.tensors() for s in slots), strict=True)
    scales = [s.scale if type(s.scale) is float else _one(s.scale) for s in slots]
    if type(eps) is not float:
        raise TypeError("the dispatcher would take True for 1.0")
    return kernels.bottleneck_rows_forward(
        flat, beside, rows, w_down, b_down, w_up, b_up, _expanded(vectors, x.shape[-1]), norm_weights, norm_biases,
        [canonical(s.activation) for s in slots], scales, [s.skip for s in slots], [s.swap for s in slots], eps,
        [0.0] * len(slots), None, False,
    )[0].view_as(x)  # fmt: skip


def _one(scale: Tensor) -> float:
    """The factor of a slot whose scale is a tensor."""
    if not isinstance(scale, Tensor):
        raise TypeError("the dispatcher would take True for 1.0")
    return 1.0


def _check(n: int, slot: Slot, hidden: int, residual: bool, device: torch.device) -> None:
    at = f"slots[{n}]"
    for name, p in (("norm_weight", slot.norm_weight), ("norm_bias", slot.norm_bias)):
        checks.floating(f"{at}.{name}", p)
        checks.shape(f"{at}.{name}", p, (hidden,), device)
    if not residual and (slot.swap or (slot.w_down is None and not slot.skip)):
        raise ValueError(f"residual: got None, but {at} reads it; accepted is a tensor of x's shape")
    if slot.w_down is None:
        if slot.w_up is not None:
            raise ValueError(f"{at}.w_up: got one without w_down; accepted are both or neither")
        return
    checks.floating(f"{at}.w_down", slot.w_down)
    if slot.w_down.dim() != 2 or slot.w_down.shape[0] < 1:
        raise ValueError(f"{at}.w_down: got shape {tuple(slot.w_down.shape)}; accepted is [b, {hidden}], b ≥ 1")
    b = slot.w_down.shape[0]
    checks.shape(f"{at}.w_down", slot.w_down, (b, hidden), device)
    checks.shape(f"{at}.b_down", slot.b_down, (b,), device)
    if slot.w_up is None:
        raise ValueError(f"{at}.w_up: got None with w_down; accepted are both or neither")
    checks.shape(f"{at}.w_up", slot.w_up, (hidden, b), device)
    checks.shape(f"{at}.b_up", slot.b_up, (hidden,), device)
    if isinstance(slot.scale, Tensor):
        checks.scale(f"{at}.scale", slot.scale, hidden, device)


def _facts(hidden: int, w_down: Sequence[Tensor | None]) -> dict[str, int]:
    return {"hidden": hidden, "bottleneck": _widest(w_down)}


def _widest(w_down: Sequence[Tensor | None]) -> int:
    """The largest b; 0 without an adapter."""
    return max([0, *[w.shape[0] for w in w_down if w is not None]])


def _columns(parameters: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """w_down of every slot, b_down of every slot, ..."""
    return [list(parameters[i::_PER_SLOT]) for i in range(_PER_SLOT)]


def _expanded(vectors: Sequence[Tensor | None], hidden: int) -> list[Tensor | None]:
    return [None if v is None else v.expand(hidden) for v in vectors]


def _forward(x, residual, rows, how, parameters, *, save):
    activations, scales, skips, swaps, eps, dropout_p, seed = how
    w_down, b_down, w_up, b_up, vectors, norm_weights, norm_biases = _columns(parameters)
    kernel = dispatch.pick("bottleneck_rows_forward", x.device.type, x.dtype, **_facts(x.shape[1], w_down))
    return kernel(
        x, residual, rows, w_down, b_down, w_up, b_up, _expanded(vectors, x.shape[1]), norm_weights, norm_biases,
        activations, scales, skips, swaps, eps, dropout_p, seed, save,
    )  # fmt: skip


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, rows, how, *parameters):
        y, z, s = _forward(x, residual, rows, how, parameters, save=True)
        *options, seed = how
        swaps, need = options[3], ctx.needs_input_grad[4:]
        ctx.need_weights = [any(need[i : i + 5]) for i in range(0, len(need), _PER_SLOT)]
        ctx.need_norm = [any(need[i + 5 : i + 7]) for i in range(0, len(need), _PER_SLOT)]
        read = [swap for swap, wanted in zip(swaps, ctx.need_weights, strict=True) if wanted]
        ctx.save_for_backward(
            x if not all(read) else None, residual if any(read) else None, z, s, rows, seed, *parameters
        )
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, residual, z, s, rows, seed, *parameters = ctx.saved_tensors
        activations, scales, skips, swaps, eps, dropout_p = ctx.options
        need = ctx.needs_input_grad
        hidden, nothing = dy.shape[1], dy.new_empty((0, dy.shape[1]))
        w_down, _, w_up, b_up, vectors, norm_weights, _ = _columns(parameters)
        expanded = _expanded(vectors, hidden)
        kernel = dispatch.pick("bottleneck_rows_backward", dy.device.type, dy.dtype, **_facts(hidden, w_down))
        dx, dresidual, *grads = kernel(
            dy.contiguous(), nothing if x is None else x, nothing if residual is None else residual, z, s, rows, w_down,
            w_up, expanded, norm_weights, activations, scales, skips, swaps, eps, dropout_p, seed, need[0], need[1],
            ctx.need_weights, ctx.need_norm,
        )  # fmt: skip
        found: list[Tensor | None] = []
        for i, (dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias) in enumerate(zip(*grads, strict=True)):
            own: list[Tensor | None] = [None] * 5
            if ctx.need_weights[i]:
                scale = scales[i] if expanded[i] is None else expanded[i].to(g_bias.dtype)
                dvector = None
                if vectors[i] is not None:
                    dvector = (g_up * w_up[i]).sum(1)
                    if b_up[i] is not None:
                        dvector = dvector + g_bias * b_up[i]
                    dvector = dvector.sum_to_size(vectors[i].shape)
                across = scale if expanded[i] is None else scale[:, None]
                own = [dw_down, db_down, g_up * across, g_bias * scale, dvector]
            found += [*own, dnorm_weight, dnorm_bias]
        wanted = [g.to(p.dtype) if n else None for g, p, n in zip(found, parameters, need[4:], strict=True)]
        return dx if need[0] else None, dresidual if need[1] else None, None, None, *wanted


# -- reference ---------------------------------------------------------------------------------------------------


def _rows_of(rows: Tensor, count: int) -> Tensor:
    """[T, 1] slot of every row of x."""
    return rows.repeat_interleave(count // max(rows.numel(), 1)).unsqueeze(1)


def bottleneck_rows_forward(x, residual, rows, w_down, b_down, w_up, b_up, scale_vectors, norm_weights, norm_biases,
                            activations, scales, skips, swaps, eps, dropout_p, seed, save):  # fmt: skip
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract.

    Every slot is computed for all rows and chosen from, because which rows a slot has is not known on the host.
    """
    slot_of = _rows_of(rows, x.shape[0])
    y = torch.zeros_like(x)
    z, s = (x.new_zeros(x.shape[0], _widest(w_down)), torch.zeros_like(x)) if save else (x.new_empty(0), x.new_empty(0))
    for i, down in enumerate(w_down):
        read, other = (residual, x) if swaps[i] else (x, residual)
        mine = slot_of == i
        if down is None:
            first, second = (read, other) if skips[i] else (other, None)
            y_i, s_i = add_norm_forward(first, second, norm_weights[i], norm_biases[i], eps, 0.0, None, save)
        else:
            y_i, z_i, s_i = bottleneck_forward(
                read, down, b_down[i], w_up[i], b_up[i], activations[i], scales[i], scale_vectors[i], skips[i], other,
                norm_weights[i], norm_biases[i], eps, dropout_p[i], seed, save,
            )  # fmt: skip
            if save:
                z[:, : down.shape[0]] = torch.where(mine, z_i, z[:, : down.shape[0]])
        y = torch.where(mine, y_i, y)
        if save:
            s = torch.where(mine, s_i, s)
    return y, z, s


def bottleneck_rows_backward(dy, x, residual, z, s, rows, w_down, w_up, scale_vectors, norm_weights, activations,
                             scales, skips, swaps, eps, dropout_p, seed, need_dx, need_dresidual, need_dweights,
                             need_dnorm):  # fmt: skip
    """The oracle of every backend's backward: what a slot's rows give, all others having no gradient."""
    slot_of, empty = _rows_of(rows, dy.shape[0]), dy.new_empty(0)
    empty_grad = dy.new_empty(0, dtype=accumulation_dtype(dy.dtype))
    dx = torch.zeros_like(dy) if need_dx else empty
    dresidual = torch.zeros_like(dy) if need_dresidual else empty
    grads: list[list[Tensor]] = [[] for _ in range(6)]
    for i, down in enumerate(w_down):
        own = torch.where(slot_of == i, dy, 0.0)
        needs = (need_dresidual, need_dx) if swaps[i] else (need_dx, need_dresidual)
        if down is None:
            d_read, d_other, *norm = add_norm_backward(
                own, None, s, norm_weights[i], eps, 0.0, None, needs[0] and skips[i], needs[1], need_dnorm[i]
            )
            found = [empty_grad] * 4 + (norm if need_dnorm[i] else [empty_grad] * 2)
        else:
            d_read, d_other, *found = bottleneck_backward(
                own, residual if swaps[i] else x, z[:, : down.shape[0]], s, down, w_up[i], activations[i], scales[i],
                scale_vectors[i], skips[i], norm_weights[i], eps, dropout_p[i], seed, *needs, need_dweights[i],
                need_dnorm[i],
            )  # fmt: skip
        if swaps[i]:
            d_read, d_other = d_other, d_read
        if need_dx and d_read.numel():
            dx = dx + d_read
        if need_dresidual and d_other.numel():
            dresidual = dresidual + d_other
        for listed, g in zip(grads, found, strict=True):
            listed.append(g.clone() if g is empty_grad else g)
    return dx, dresidual, *grads
