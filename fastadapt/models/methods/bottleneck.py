"""Bottleneck adapters after (or beside) the sublayers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastadapt.config import BottleneckConfig, MaskedAdapterConfig
from fastadapt.models.wiring import Wiring
from fastadapt.modules.active import Part
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.masked import MaskedSite
from fastadapt.modules.state import Adaptation
from fastadapt.modules.step import Step


def norm_site(norm: nn.LayerNorm) -> Site:
    """A site without an adapter: a copy of ``norm``."""
    place = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    return Site(BottleneckConfig(bottleneck=1), norm.normalized_shape[0], None, norm, **place)


def bottleneck_sites(config: BottleneckConfig, wiring: Wiring, base: nn.Module) -> dict[str, Part]:
    """The sites of a bottleneck adaptation, by path in the base model; the base is only read."""
    layers = wiring.layers_of(base)
    beyond = [i for i in config.leave_out if i >= len(layers)]
    if beyond:
        raise ValueError(f"leave_out: got layers {beyond}; accepted are 0 to {len(layers) - 1}")
    modules = dict(wiring.sublayers(base))
    hidden = base.config.hidden_size
    sites: dict[str, Part] = {}
    kind = MaskedSite if isinstance(config, MaskedAdapterConfig) else Site
    lowest = config.drop.n if config.drop is not None and config.drop.mode == "specialised" else 0
    if lowest >= len(layers):
        raise ValueError(f"drop: got n={lowest}; accepted are 0 to {len(layers) - 1}, of {len(layers)} layers")
    draws = config.drop is not None and config.drop.mode != "specialised"
    step = Step(len(layers), config.drop) if draws or kind is MaskedSite else None

    def add(path: str, layer: int, width: int | None, norm: nn.LayerNorm, owns_norm: bool) -> None:
        if width is not None or owns_norm:
            # Parameters of the base's own dtype, on its device.
            place = {"device": norm.weight.device, "dtype": norm.weight.dtype}
            features = norm.normalized_shape[0]
            sites[path] = kind(config, features, width, norm if owns_norm else None, **place)
            if step is not None:
                sites[path].follow(step, layer)

    if config.train_layer_norm == "all" and lowest == 0:
        add(wiring.embeddings, -1, None, modules[f"{wiring.embeddings}.LayerNorm"], True)
    for i in range(lowest, len(layers)):
        for placement, part in (("attention_output", wiring.attention_output), ("output", wiring.output)):
            path = f"{wiring.layers}.{i}.{part}"
            placed = placement in config.placements and i not in config.leave_out
            width = config.width(i, hidden) if placed else None
            add(path, i, width, modules[path].LayerNorm, config.train_layer_norm != "none")
    return sites


def keep_neurons(adaptation: Adaptation, masks: Tensor | Mapping[str, Tensor]) -> None:
    """Set the fixed masks of a masked adaptation; raises before any is set."""
    sites = {p: m for p, m in adaptation.parts().items() if isinstance(m, MaskedSite) and m.mask_head is not None}
    if not sites:
        kind = type(adaptation.config).__name__
        raise ValueError(f"name: is of a {kind}, which has no masks; accepted is a MaskedAdapterConfig's")
    given = dict(masks) if isinstance(masks, Mapping) else dict.fromkeys(sites, masks)
    unknown = sorted(path for path in given if path not in sites)
    if unknown:
        raise ValueError(f"masks: got {', '.join(unknown)}; accepted are {', '.join(sites)}")
    for path, mask in given.items():
        width = sites[path].down.out_features
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (width,):
            shape = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"masks: got {shape} for {path}; accepted is a bool tensor of shape ({width},)")
    with torch.no_grad():
        for path, mask in given.items():
            sites[path].neurons.copy_(mask)
