"""AdapterHub's union of configurations, as mix-and-match is one: prefix tuning and a bottleneck adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastadapt.config import MAMConfig
from fastadapt.interop import hub_bottleneck, hub_prefix
from fastadapt.interop.hub_names import Given
from fastadapt.modules.state import Adaptation


def to_hub(config: MAMConfig, hidden: int) -> dict[str, Any]:
    """AdapterHub's form of a configuration, every field written out."""
    return {
        "architecture": "union",
        "configs": [hub_prefix.to_hub(config.prefix, hidden), hub_bottleneck.to_hub(config.parallel, hidden)],
    }


def from_hub(hub: Mapping[str, Any], *, version: str | None, has_invertible: bool, keys: Sequence[str]) -> MAMConfig:
    """The configuration that computes what AdapterHub does with ``hub``; raises ``ValueError`` for what none does."""
    configs = hub.get("configs")
    if not isinstance(configs, list) or not all(isinstance(c, Mapping) for c in configs):
        raise ValueError("path: its union has no list of configurations")
    architectures = sorted(str(c.get("architecture") or "bottleneck") for c in configs)
    if architectures != ["bottleneck", "prefix_tuning"]:
        raise ValueError(
            f"path: holds a union of {', '.join(architectures)}; accepted is one of prefix_tuning and bottleneck"
        )
    prefix, bottleneck = sorted(configs, key=lambda c: c.get("architecture") != "prefix_tuning")
    options = {"version": version, "has_invertible": has_invertible, "keys": keys}
    return MAMConfig(hub_prefix.from_hub(prefix, **options), hub_bottleneck.from_hub(bottleneck, **options))


def holds(config: MAMConfig) -> bool:
    """Whether AdapterHub's form says all of it."""
    return hub_bottleneck.holds(config.parallel)


def export(adaptation: Adaptation, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """(AdapterHub's tensors by its keys in the base model, our keys of what they hold)."""
    prefixes, held = hub_prefix.export(adaptation, name)
    adapters, also = hub_bottleneck.export(adaptation, name)
    return {**prefixes, **adapters}, held | also


def collect(adaptation: Adaptation, name: str, given: Given) -> dict[str, Tensor]:
    """The tensors for our parameters, taken out of what a file has."""
    return {**hub_prefix.collect(adaptation, name, given), **hub_bottleneck.collect(adaptation, name, given)}
