"""AdapterHub's form of prefix tuning: one pool for all layers, whose last layer's rows are the layers' in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.config import PrefixConfig
from fastadapt.interop.hub_names import Given, refuse_unknown
from fastadapt.models.methods.prefix import CONTROL
from fastadapt.modules.prefix import Prefix
from fastadapt.modules.state import Adaptation
from fastadapt.ops.activations import canonical

_FIELDS = {"flat": False, "prefix_length": 30, "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0,
           "leave_out": []}  # fmt: skip
_FIXED = {"encoder_prefix": True, "use_gating": False}
_PASSIVE = {"architecture", "cross_prefix", "shared_gating", "init_weights_seed"}
_CONTROL_NAMES = {"wte.weight": "wte.weight", "down.weight": "control_trans.0.weight",
                  "down.bias": "control_trans.0.bias"}  # fmt: skip


def to_hub(config: PrefixConfig, hidden: int) -> dict[str, Any]:
    """AdapterHub's form of a configuration, every field written out."""
    return {
        "architecture": "prefix_tuning",
        "encoder_prefix": True,
        "cross_prefix": True,
        "leave_out": list(config.leave_out),
        "flat": config.flat,
        "prefix_length": config.length,
        "bottleneck_size": config.bottleneck,
        "non_linearity": canonical(config.activation),
        "dropout": float(config.dropout),
        "use_gating": False,
        "shared_gating": True,
        "init_weights_seed": None,
    }


def from_hub(hub: Mapping[str, Any], *, version: str | None, has_invertible: bool, keys: Sequence[str]) -> PrefixConfig:
    """The configuration that computes what AdapterHub does with ``hub``; raises ``ValueError`` for what none does."""
    refuse_unknown(hub, {*_FIELDS, *_PASSIVE}, _FIXED)
    value = {**_FIELDS, **{k: v for k, v in hub.items() if v is not None}}
    try:
        return PrefixConfig(
            length=value["prefix_length"],
            bottleneck=value["bottleneck_size"],
            flat=bool(value["flat"]),
            activation=value["non_linearity"],
            dropout=float(value["dropout"]),
            leave_out=tuple(value["leave_out"] or ()),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: its configuration is not accepted: {error}") from error


def holds(config: PrefixConfig) -> bool:
    """Whether AdapterHub's form says all of it."""
    return True


def _prefixes(adaptation: Adaptation) -> dict[str, Prefix]:
    return {path: part for path, part in adaptation.parts().items() if isinstance(part, Prefix)}


def export(adaptation: Adaptation, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """(AdapterHub's tensors by its keys in the base model, our keys of what they hold)."""
    pool = f"prefix_tuning.prefix_tunings.{name}.self_prefix"
    parts = _prefixes(adaptation)
    held = {f"{path}.{key}" for path, part in parts.items() for key, _ in part.named_parameters()}
    if all(part.prefix is not None for part in parts.values()):
        # [layers · 2, P, H] each -> [P, layers · 2, H], flat
        stacked = torch.cat([part.prefix for part in parts.values()]).transpose(0, 1)
        return {f"{pool}.control_trans": stacked.reshape(-1)}, held
    tensors = {
        f"{pool}.{theirs}": adaptation.get_parameter(f"{CONTROL}.{key}") for key, theirs in _CONTROL_NAMES.items()
    }
    for kind in ("weight", "bias"):
        rows = [getattr(part.up, kind) for part in parts.values()]
        tensors[f"{pool}.control_trans.2.{kind}"] = torch.cat(rows)
    return tensors, held | {f"{CONTROL}.{key}" for key in _CONTROL_NAMES}


def collect(adaptation: Adaptation, name: str, given: Given) -> dict[str, Tensor]:
    """The tensors for our parameters, taken out of what a file has; a pickle repeats the pool in every layer."""
    parts = _prefixes(adaptation)

    def take(theirs: str) -> Tensor:
        end = f"prefix_tunings.{name}.self_prefix.{theirs}"
        keys = [key for key in given.tensors if key.endswith(end)]
        return given.take(*(keys or [f"prefix_tuning.{end}"]))

    if all(part.prefix is not None for part in parts.values()):
        tensor = take("control_trans")
        first = next(iter(parts.values()))
        shape = (first.length, len(parts) * 2, first.hidden)
        if tensor.numel() != first.length * len(parts) * 2 * first.hidden:
            raise ValueError(f"path: control_trans in {given.folder} has shape {tuple(tensor.shape)}; accepted is "
                             f"{shape}, flat")  # fmt: skip
        rows = tensor.view(shape).transpose(0, 1).split(2)
        return {f"{path}.prefix": row for path, row in zip(parts, rows, strict=True)}
    found = {f"{CONTROL}.{key}": take(theirs) for key, theirs in _CONTROL_NAMES.items()}
    for kind in ("weight", "bias"):
        tensor = take(f"control_trans.2.{kind}")
        if tensor.shape[0] % len(parts):
            raise ValueError(
                f"path: control_trans.2.{kind} in {given.folder} has shape {tuple(tensor.shape)}; accepted are rows "
                f"for {len(parts)} layers"
            )
        for path, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[f"{path}.up.{kind}"] = rows
    return found
