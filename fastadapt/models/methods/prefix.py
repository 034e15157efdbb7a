"""Prefixes in the self-attentions, alone or with parallel adapters."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fastadapt.config import MAMConfig, PrefixConfig
from fastadapt.models.methods.bottleneck import bottleneck_sites
from fastadapt.models.wiring import Wiring
from fastadapt.modules.prefix import Control, Prefix
from fastadapt.modules.state import Adaptation

CONTROL = "prefix_tuning"  # where an adaptation keeps what all its prefixes are computed from


def prefixes(config: PrefixConfig, wiring: Wiring, base: nn.Module) -> dict[str, nn.Module]:
    """The prefixes, by path in the base model, and what they are computed from; the base is only read."""
    layers = wiring.layers_of(base)
    beyond = [i for i in config.leave_out if i >= len(layers)]
    if beyond:
        raise ValueError(f"leave_out: got layers {beyond}; accepted are 0 to {len(layers) - 1}")
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and config.length > limit:
        raise ValueError(f"length: got {config.length}; accepted are 1 to {limit}, the positions of this model")
    paths = [f"{wiring.layers}.{i}.{wiring.attention}" for i in range(len(layers)) if i not in config.leave_out]
    parts: dict[str, nn.Module] = {}
    hidden, control = base.config.hidden_size, None
    for path in paths:
        weight = base.get_submodule(path).key.weight
        place = {"device": weight.device, "dtype": weight.dtype}
        if control is None and not config.flat:
            control = parts[CONTROL] = Control(config, hidden, **place)
        parts[path] = Prefix(config, hidden, control, **place)
    return parts


def mix_and_match(config: MAMConfig, wiring: Wiring, base: nn.Module) -> dict[str, nn.Module]:
    """The parts of both methods; they share no sublayer."""
    return {**prefixes(config.prefix, wiring, base), **bottleneck_sites(config.parallel, wiring, base)}


def eject_prefixes(adaptation: Adaptation) -> None:
    """Let an adaptation keep its prefixes instead of what they are computed from; its configuration says so after."""
    config = adaptation.config
    if not isinstance(config, (PrefixConfig, MAMConfig)):
        raise ValueError(f"name: is of a {type(config).__name__}, which has no prefix; accepted are PrefixConfig and "
                         "MAMConfig")  # fmt: skip
    for part in adaptation.parts().values():
        if isinstance(part, Prefix):
            part.eject()
    adaptation._modules.pop(CONTROL, None)
    if isinstance(config, MAMConfig):
        adaptation.config = replace(config, prefix=replace(config.prefix, flat=True))
    else:
        adaptation.config = replace(config, flat=True)
