"""The linear layers of a sublayer that read one input, as one product, with what the active adaptations add to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.modules.active import Active
from fastadapt.modules.peer import terms_of
from fastadapt.modules.plain import parameter
from fastadapt.modules.routed import Routed
from fastadapt.ops.activations import activate

if TYPE_CHECKING:
    from fastadapt.modules.lora import LoRA


def project(
    x: Tensor,
    linears: Mapping[str, nn.Linear],
    active: Active | Routed | None,
    *,
    activation: str = "none",
    dropout_p: float = 0.0,
) -> Tensor:
    """``drop(σ(x [W_0; W_1; ...]ᵀ + [b_0; b_1; ...]))``, [..., ΣN_i].

    Args:
        x: [..., K].
        linears: the layers, by their names in the sublayer.
        active: what runs in the sublayer beside its own weights.
        activation, dropout_p: as in :func:`fastadapt.ops.linear`.
    """
    if isinstance(active, Routed):
        if any(active.touches(name) for name in linears):
            return active.project(x, linears, activation, dropout_p)
        active = None
    weights = [parameter(m, "weight") for m in linears.values()]
    biases = [parameter(m, "bias") for m in linears.values()]
    loras: ops.LowRanks | tuple[()] = ()
    if active is not None:
        if active.biases:
            biases = [active.bias(name, own) for name, own in zip(linears, biases, strict=True)]
        if active.loras:
            parts = [(i, part) for i, name in enumerate(linears) for part in active.loras.get(name, ())]
            if any(part.lora_magnitude_vector is not None for _, part in parts):
                y = _with_magnitudes(x, weights, biases, parts)
                return ops.drop(activate(activation, y), dropout_p)
            loras = _terms(parts)
    theirs = terms_of(linears.values())
    if theirs:
        loras = (loras or ops.LowRanks()).extend(theirs)
    return ops.linear(x, weights, biases, activation=activation, dropout_p=dropout_p, loras=loras)


def _terms(parts: Iterable[tuple[int, LoRA]]) -> ops.LowRanks:
    """What every part adds to the weight of its number."""
    loras = ops.LowRanks()
    for i, part in parts:
        a, b = part.matrices()
        loras.add(a, b, part.scale, i, dropout_p=part.dropout_p())
    return loras


def _with_magnitudes(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], parts: list[tuple[int, LoRA]]
) -> Tensor:
    """DoRA: m/‖W + s·BA‖ times the product, the bias after it; a weight has one DoRA at most.

    Under dropout W itself reads all of x for the part that stays, and the dropped x for what m changes, as PEFT has it:
    y = Wx + b + (g - 1)·W drop(x) + g·s·BA drop(x), g = m/‖W + s·BA‖.
    """
    doras = {i: part for i, part in parts if part.lora_magnitude_vector is not None}
    steady = {i for i, part in doras.items() if part.dropout_p() == 0.0}
    terms = _terms((i, part) for i, part in parts if i not in doras or i in steady)
    product = ops.linear(x, weights, [None if i in steady else b for i, b in enumerate(biases)], loras=terms)
    columns = list(product.split([w.shape[0] for w in weights], dim=-1))
    for i, part in doras.items():
        g = part.ratio(weights[i])
        if i in steady:
            y = columns[i] * g
            columns[i] = (y if biases[i] is None else y + biases[i]).to(product.dtype)
        else:
            read = ops.drop(x, part.dropout_p())
            stays = ops.linear(read, weights[i])
            low = F.linear(F.linear(read, part.lora_A.weight), part.lora_B.weight) * part.scale
            columns[i] = (columns[i] + (g - 1) * stays + g * low).to(product.dtype)
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
