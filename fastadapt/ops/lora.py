"""Low-rank additions to linear layers, in the product itself; different rows may have different ones.

    y = drop(σ(x W_iᵀ + b_i + Σ_n scale_n (drop_n(x) A_nᵀ) B_nᵀ))

LoRA is Hu et al. 2021 (arXiv:2106.09685, eq. 3); rows with adapters of their own as in Punica (arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import dispatch
from fastadapt.ops import checks
from fastadapt.ops.activations import activate, derivative
from fastadapt.ops.dropout import dropout, resolve_seed
from fastadapt.ops.once import once_differentiable
from fastadapt.ops.schemas import accumulation_dtype, lora_offsets


@dataclass(frozen=True, eq=False)
class LowRank:
    """One LoRA of a linear op.

    Args:
        a: [r, K].
        b: [N_i, r], N_i the columns of the weight that it adds to.
        scale: α / r in the paper.
        weight: which of the op's weights it adds to.
        slot: the rows it acts on, see ``rows`` of :func:`fastadapt.ops.linear`.
        dropout_p: probability with which an element of x is dropped on its way to ``a``.
        seed: int or 0-d int64 tensor that keys the mask; None draws one from PyTorch's generator.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    weight: int = 0
    slot: int = 0
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


@dataclass(eq=False)
class LowRanks:
    """The LoRAs of one linear op, a list for each field of :class:`LowRank`: a routed batch has hundreds of them.

    Args:
        a, b, scales, weights, slots, dropout_p, seeds: of every LoRA, in one order, as many in each list.
    """

    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    dropout_p: list[float] = field(default_factory=list)
    seeds: list[int | Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, n: int) -> LowRank:
        lists = (self.a, self.b, self.scales, self.weights, self.slots, self.dropout_p, self.seeds)
        return LowRank(*(values[n] for values in lists))

    def add(
        self,
        a: Tensor,
        b: Tensor,
        scale: float,
        weight: int,
        slot: int = 0,
        dropout_p: float = 0.0,
        seed: int | Tensor | None = None,
    ) -> None:
        """Append one, its fields as in :class:`LowRank`."""
        self.a.append(a)
        self.b.append(b)
        self.scales.append(scale)
        self.weights.append(weight)
        self.slots.append(slot)
        self.dropout_p.append(dropout_p)
        self.seeds.append(seed)

    def extend(self, loras: Iterable[LowRank]) -> LowRanks:
        """Append ``loras``, in their order; returns itself."""
        for m in loras:
            self.add(m.a, m.b, m.scale, m.weight, m.slot, m.dropout_p, m.seed)
        return self


def check(loras: LowRanks, weights: Sequence[Tensor], slot_count: int, device: torch.device) -> None:
    """Raise for a LoRA that does not fit its weight."""
    depth, widths = weights[0].shape[1], [w.shape[0] for w in weights]
    floating = checks.FLOATING
    own = zip(loras.a, loras.b, loras.scales, loras.weights, loras.slots, loras.dropout_p, strict=True)
    for n, (a, b, scale, weight, slot, p) in enumerate(own):
        # No message is made while all is right: a routed batch has hundreds.
        if (
            isinstance(a, Tensor) and isinstance(b, Tensor)
            and 0 <= weight < len(widths) and 0 <= slot < slot_count
            and a.shape[1:] == (depth,) and b.shape == (widths[weight], a.shape[0]) and a.shape[0] >= 1
            and a.device == device == b.device and a.dtype in floating and b.dtype in floating
            and type(scale) is type(p) is float and 0.0 <= p <= 1.0
        ):  # fmt: skip
            continue
        _refuse(n, loras[n], depth, widths, slot_count, device)


def _refuse(n: int, m: LowRank, depth: int, widths: Sequence[int], slot_count: int, device: torch.device) -> None:
    """Raise for what does not fit; numbers that are no floats may be right all the same."""
    checks.floating(f"a[{n}]", m.a)
    if m.a.dim() != 2 or m.a.shape[0] < 1:
        raise ValueError(f"a[{n}]: got shape {tuple(m.a.shape)}; accepted is [r, {depth}], r ≥ 1")
    if not 0 <= m.weight < len(widths):
        raise ValueError(f"loras[{n}].weight: got {m.weight}; accepted are 0 to {len(widths) - 1}")
    if not 0 <= m.slot < slot_count:
        raise ValueError(f"loras[{n}].slot: got {m.slot}; accepted are 0 to {slot_count - 1}")
    rank = m.a.shape[0]
    checks.shape(f"a[{n}]", m.a, (rank, depth), device)
    checks.shape(f"b[{n}]", m.b, (widths[m.weight], rank), device)
    checks.number(f"loras[{n}].scale", m.scale)
    checks.probability(f"loras[{n}].dropout_p", m.dropout_p)


def lora(
    flat: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    loras: LowRanks,
    rows: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """What :func:`fastadapt.ops.linear` does for checked arguments where there are LoRAs or rows."""
    lora_p = [float(p) for p in loras.dropout_p]
    seeds = None
    if any(lora_p):
        seeds = torch.stack([
            resolve_seed(0 if p == 0.0 else own, 1.0, flat.device) for own, p in zip(loras.seeds, lora_p, strict=True)
        ])  # fmt: skip
    a, b, slots = loras.a, loras.b, loras.slots
    how = ([float(s) for s in loras.scales], loras.weights, slots, rows, lora_p, seeds, activation, dropout_p, seed)
    if checks.differentiable(*weights):
        return lora_forward(flat, weights, biases, a, b, *how, False)[0]
    if checks.differentiable(flat, *biases, *a, *b):
        return _LoRA.apply(flat, how, len(weights), len(biases), *weights, *biases, *a, *b)
    kernel = dispatch.pick("lora_forward", flat.device.type, flat.dtype, **_facts(flat, weights, a, slots))
    return kernel(flat, weights, biases, a, b, *how, False)[0]


def _facts(x: Tensor, weights: list[Tensor], a: list[Tensor], slots: list[int]) -> dict[str, int]:
    outputs = sum(w.shape[0] for w in weights)
    return {"features": x.shape[1], "outputs": outputs, "rank": lora_offsets([m.shape[0] for m in a], slots)[1]}


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how, weight_count, bias_count, *parameters):
        weights, rest = list(parameters[:weight_count]), parameters[weight_count:]
        biases, rest = list(rest[:bias_count]), rest[bias_count:]
        a, b = list(rest[: len(rest) // 2]), list(rest[len(rest) // 2 :])
        scales, owners, slots, rows, lora_p, seeds, activation, dropout_p, seed = how
        # z and s are the backend's own, so backward must be of the backend that serves forward.
        ctx.backend = dispatch.serving("lora_forward", x.device.type, x.dtype, **_facts(x, weights, a, slots))
        y, z, s = dispatch.kernel(ctx.backend, "lora_forward")(x, weights, biases, a, b, *how, True)
        ctx.need_lora = any(ctx.needs_input_grad[4 + weight_count + bias_count :])
        ctx.save_for_backward(
            x if ctx.need_lora else None, z, s if ctx.need_lora else None, rows, seeds, seed, *weights, *a, *b
        )
        ctx.options = (scales, owners, slots, lora_p, activation, dropout_p)
        ctx.counts = (weight_count, len(a))
        ctx.biases = [None if m is None else m.dtype for m in biases]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, s, rows, seeds, seed, *parameters = ctx.saved_tensors
        scales, owners, slots, lora_p, activation, dropout_p = ctx.options
        weight_count, count = ctx.counts
        weights, a, b = (
            parameters[:weight_count],
            parameters[weight_count : -count or None],
            parameters[-count or None :],
        )
        if count == 0:
            a, b = [], []
        need_dx, bias_needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4 + weight_count :][: len(ctx.biases)]
        dy = dy.contiguous()
        nothing = dy.new_empty(0)
        slot_count = len(ctx.biases) // weight_count
        dx, dbias, da, db = dispatch.kernel(ctx.backend, "lora_backward")(
            dy, nothing if x is None else x, z, nothing if s is None else s, weights, slot_count, a, b, scales, owners,
            slots, rows, lora_p, seeds, activation, dropout_p, seed, need_dx, any(bias_needs), ctx.need_lora,
        )  # fmt: skip
        dbiases: list[Tensor | None] = [None] * len(ctx.biases)
        if any(bias_needs):
            parts = [p for row in dbias.unbind(0) for p in row.split([w.shape[0] for w in weights])]
            dbiases = [p.to(t) if n else None for p, t, n in zip(parts, ctx.biases, bias_needs, strict=True)]
        dlora: list[Tensor | None] = [None] * (2 * count)
        if ctx.need_lora:
            needs = ctx.needs_input_grad[len(ctx.needs_input_grad) - 2 * count :]
            dlora = [g.to(p.dtype) if n else None for g, p, n in zip([*da, *db], [*a, *b], needs, strict=True)]
        return dx if need_dx else None, None, None, None, *([None] * weight_count), *dbiases, *dlora


# -- reference ---------------------------------------------------------------------------------------------------


def _slot_of_rows(rows: Tensor | None, count: int) -> Tensor | None:
    """[T, 1] slot of every row of x."""
    return None if rows is None else rows.repeat_interleave(count // max(rows.numel(), 1)).unsqueeze(1)


def _columns(weights: list[Tensor], owner: int) -> slice:
    start = sum(w.shape[0] for w in weights[:owner])
    return slice(start, start + weights[owner].shape[0])


def lora_forward(x, weights, biases, a, b, scales, owners, slots, rows, lora_p, lora_seeds, activation, dropout_p,
                 seed, save):  # fmt: skip
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract."""
    dtype, slot_of = x.dtype, _slot_of_rows(rows, x.shape[0])
    z = torch.cat([F.linear(x, w.to(dtype)) for w in weights], dim=1)
    if any(m is not None for m in biases):
        table = [
            torch.cat([
                z.new_zeros(w.shape[0]) if m is None else m.to(dtype)
                for w, m in zip(weights, biases[i : i + len(weights)], strict=True)
            ])
            for i in range(0, len(biases), len(weights))
        ]  # fmt: skip
        z = z + (table[0] if slot_of is None else torch.stack(table)[slot_of.squeeze(1)])
    offsets, width = lora_offsets([m.shape[0] for m in a], slots)
    s = x.new_zeros(x.shape[0], width if save else 0)
    additions: dict[int, Tensor] = {}
    for i, (m_a, m_b) in enumerate(zip(a, b, strict=True)):
        read = dropout(x, lora_p[i], None if lora_seeds is None else lora_seeds[i])
        low = F.linear(read, m_a.to(dtype)) * scales[i]
        if slot_of is not None:
            low = torch.where(slot_of == slots[i], low, 0.0)
        if save:
            s[:, offsets[i] : offsets[i] + low.shape[1]] += low
        added = F.linear(low, m_b.to(dtype))
        additions[owners[i]] = additions[owners[i]] + added if owners[i] in additions else added
    if additions:
        zero = [additions.get(i, z.new_zeros(x.shape[0], w.shape[0])) for i, w in enumerate(weights)]
        z = z + torch.cat(zero, dim=1)
    y = dropout(activate(activation, z), dropout_p, seed)
    return y, z if save and activation != "none" else x.new_empty(0), s if save else x.new_empty(0)


def lora_backward(dy, x, z, s, weights, slot_count, a, b, scales, owners, slots, rows, lora_p, lora_seeds, activation,
                  dropout_p, seed, need_dx, need_dbias, need_dlora):  # fmt: skip
    """The oracle of every backend's backward."""
    dtype, wide, slot_of = dy.dtype, accumulation_dtype(dy.dtype), _slot_of_rows(rows, dy.shape[0])
    dz = dropout(dy, dropout_p, seed)
    if activation != "none":
        dz = dz * derivative(activation, z)
    dx = dz @ torch.cat([w.to(dtype) for w in weights]) if need_dx else dy.new_empty(0)
    dbias = dy.new_empty(0, dtype=wide)
    if need_dbias:
        of = [
            dz.to(wide) if slot_of is None else torch.where(slot_of == i, dz.to(wide), 0.0) for i in range(slot_count)
        ]
        dbias = torch.stack([d.sum(0) for d in of])
    offsets, _ = lora_offsets([m.shape[0] for m in a], slots)
    da: list[Tensor] = []
    db: list[Tensor] = []
    for i, (m_a, m_b) in enumerate(zip(a, b, strict=True)):
        own = dz[:, _columns(weights, owners[i])]
        if slot_of is not None:
            own = torch.where(slot_of == slots[i], own, 0.0)
        dlow = (own @ m_b.to(dtype)) * scales[i]
        own_seed = None if lora_seeds is None else lora_seeds[i]
        if need_dx:
            dx = dx + dropout(dlow @ m_a.to(dtype), lora_p[i], own_seed)
        if need_dlora:
            da.append((dlow.T @ dropout(x, lora_p[i], own_seed)).to(wide))
            db.append((own.T @ s[:, offsets[i] : offsets[i] + m_a.shape[0]]).to(wide))
    return dx, dbias, da, db
