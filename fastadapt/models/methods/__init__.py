"""Which parts a method puts where in a model: one file a method, one row in the table below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastadapt.config import (
    BitFitConfig,
    BottleneckConfig,
    FusionConfig,
    HeadConfig,
    LayerNormConfig,
    LoRAConfig,
    MAMConfig,
    PrefixConfig,
)
from fastadapt.models.methods.bitfit import biases, layer_norms, nothing
from fastadapt.models.methods.bottleneck import bottleneck_sites
from fastadapt.models.methods.fusion import fusions
from fastadapt.models.methods.lora import lora_parts
from fastadapt.models.methods.prefix import mix_and_match, prefixes
from fastadapt.models.wiring import Wiring
from fastadapt.modules.state import Adaptation

_METHODS: dict[type, Callable[[Any, Wiring, nn.Module], dict[str, nn.Module]]] = {
    BitFitConfig: biases,
    BottleneckConfig: bottleneck_sites,
    HeadConfig: nothing,
    LayerNormConfig: layer_norms,
    LoRAConfig: lora_parts,
    MAMConfig: mix_and_match,
    PrefixConfig: prefixes,
}


def parts_for(config: Any, wiring: Wiring, base: nn.Module, held: Mapping[str, Adaptation]) -> dict[str, nn.Module]:
    """The new parts that ``config`` asks for, by path in the base; ``TypeError`` names the accepted configurations.

    ``held`` are the adaptations that the model has, some of which a mix is made of.
    """
    if isinstance(config, FusionConfig):
        return fusions(config, wiring, base, held)
    for kind, build in _METHODS.items():
        if isinstance(config, kind):
            return build(config, wiring, base)
    accepted = sorted({c.__name__ for kind in (*_METHODS, FusionConfig) for c in (kind, *kind.__subclasses__())})
    raise TypeError(f"config: got {type(config).__name__}; accepted are {', '.join(accepted)}")
