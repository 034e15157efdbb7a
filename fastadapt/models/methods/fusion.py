"""Mixes of adapters that a model already has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastadapt.config import BottleneckConfig, FusionConfig, MaskedAdapterConfig
from fastadapt.models.wiring import Wiring
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.fusion import Fusion
from fastadapt.modules.state import Adaptation


def fusions(
    config: FusionConfig, wiring: Wiring, base: nn.Module, held: Mapping[str, Adaptation]
) -> dict[str, nn.Module]:
    """The mixes, by path in the base model; ``held`` are the model's adaptations."""
    unknown = [name for name in config.adapters if name not in held]
    if unknown:
        known = ", ".join(map(repr, held)) or "none"
        raise ValueError(f"adapters: got {', '.join(map(repr, unknown))}; known are {known}")
    first, *others = config.adapters
    sites = {name: held[name].parts() for name in config.adapters}
    paths = list(sites[first])
    for path in paths or [""]:
        reason = mixable({name: (held[name].config, sites[name].get(path)) for name in config.adapters}, path)
        if reason is not None:
            raise ValueError(f"adapters: {reason}")
    for name in others:
        if list(sites[name]) != paths:
            raise ValueError(f"adapters: {name!r} lies in other layers than {first!r}; accepted are the same")
    dropout = getattr(base.config, "attention_probs_dropout_prob", 0.0) if config.dropout is None else config.dropout
    parts: dict[str, nn.Module] = {}
    for path, site in sites[first].items():
        place = {"device": site.down.weight.device, "dtype": site.down.weight.dtype}
        mixed = [sites[name][path] for name in config.adapters]
        parts[path] = Fusion(config, site.down.in_features, float(dropout), mixed, **place)
    return parts


def mixable(adapters: Mapping[str, tuple[Any, Any]], path: str) -> str | None:
    """Why these adapters, each a configuration and its site, cannot be mixed; None where they can."""
    for name, (config, _) in adapters.items():
        reason = _refusal(config)
        if reason is not None:
            return f"{name!r} {reason}; accepted are adapters of a PfeifferConfig's form"
    (first, (config, site)), *others = adapters.items()
    for name, (other, its) in others:
        if its is None:
            return f"{name!r} lies in other layers than {first!r}; accepted are the same"
        mine, theirs = site.down.out_features, its.down.out_features
        if mine != theirs:
            return f"{first!r} has width {mine} at {path}, but {name!r} has {theirs}; accepted is one width"
        if site.activation != its.activation:
            return (
                f"{first!r} is of activation {config.activation!r}, but {name!r} of {other.activation!r}; accepted is "
                "one"
            )
    return None


def _refusal(config: object) -> str | None:
    """Why adapters of this configuration cannot be mixed; None where they can."""
    if not isinstance(config, BottleneckConfig) or isinstance(config, MaskedAdapterConfig):
        return f"is of a {type(config).__name__}"
    wanted = {
        "placements": ("output",),
        "parallel": False,
        "gate": False,
        "ln_before": False,
        "ln_after": False,
        "train_layer_norm": "none",
        "original_ln_before": True,
        "original_ln_after": True,
        "residual_before_ln": True,
        "dropout": 0.0,
    }
    for field, value in wanted.items():
        if getattr(config, field) != value:
            return f"has {field}={getattr(config, field)!r}"
    return None


def users_of(name: str, held: Mapping[str, Adaptation]) -> list[str]:
    """The adaptations that mix the one of this name."""
    found = []
    for other in held:
        config = held[other].config
        if isinstance(config, FusionConfig) and name in config.adapters:
            found.append(other)
    return found


def borrowed_sites(part: nn.Module) -> list[Site]:
    """The adapters of other adaptations that a part runs."""
    return part.borrowed() if isinstance(part, Fusion) else []
