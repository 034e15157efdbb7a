"""Which modules a method puts where in a model: one function a method, one row in the table below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastadapt.config import BottleneckConfig
from fastadapt.models.wiring import Wiring
from fastadapt.modules.bottleneck import Site


def bottleneck_sites(config: BottleneckConfig, wiring: Wiring, base: nn.Module) -> dict[str, nn.Module]:
    """The sites of a bottleneck adaptation, by path in the base model; the base is only read."""
    layers = wiring.layers_of(base)
    beyond = [i for i in config.leave_out if i >= len(layers)]
    if beyond:
        raise ValueError(f"leave_out: got layers {beyond}; accepted are 0 to {len(layers) - 1}")
    modules = dict(wiring.sublayers(base))
    hidden = base.config.hidden_size
    sites: dict[str, nn.Module] = {}

    def add(path: str, width: int | None, norm: nn.LayerNorm, owns_norm: bool) -> None:
        if width is not None or owns_norm:
            # Parameters of the base's own dtype, on its device.
            place = {"device": norm.weight.device, "dtype": norm.weight.dtype}
            features = norm.normalized_shape[0]
            sites[path] = Site(config, features, width, norm if owns_norm else None, **place)

    if config.train_layer_norm == "all":
        add(wiring.embeddings, None, modules[f"{wiring.embeddings}.LayerNorm"], True)
    for i in range(len(layers)):
        for placement, part in (("attention_output", wiring.attention_output), ("output", wiring.output)):
            path = f"{wiring.layers}.{i}.{part}"
            placed = placement in config.placements and i not in config.leave_out
            width = config.width(i, hidden) if placed else None
            add(path, width, modules[path].LayerNorm, config.train_layer_norm != "none")
    return sites


_METHODS: dict[type, Callable[[Any, Wiring, nn.Module], dict[str, nn.Module]]] = {
    BottleneckConfig: bottleneck_sites,
}


def sites_for(config: Any, wiring: Wiring, base: nn.Module) -> dict[str, nn.Module]:
    """The new modules that ``config`` asks for; raises ``TypeError`` naming the accepted configurations."""
    for kind, build in _METHODS.items():
        if isinstance(config, kind):
            return build(config, wiring, base)
    accepted = sorted({c.__name__ for kind in _METHODS for c in (kind, *kind.__subclasses__())})
    raise TypeError(f"config: got {type(config).__name__}; accepted are {', '.join(accepted)}")
