"""Where biases and LayerNorms of an adaptation's own lie."""

from __future__ import annotations

from torch import nn

from fastadapt.config import BitFitConfig, HeadConfig, LayerNormConfig
from fastadapt.models.methods.bottleneck import norm_site
from fastadapt.models.wiring import Wiring
from fastadapt.modules.active import Part
from fastadapt.modules.bias import Bias
from fastadapt.modules.state import base_modules


def biases(config: BitFitConfig, wiring: Wiring, base: nn.Module) -> dict[str, Part]:
    """The biases that a BitFit adaptation owns, by path in the base model."""
    everywhere = {
        "embeddings_layer_norm": f"{wiring.embeddings}.LayerNorm",
        "embeddings_project": wiring.projection,
        "pooler": wiring.pooler,
    }
    in_a_layer = {
        "query": f"{wiring.attention}.query",
        "key": f"{wiring.attention}.key",
        "value": f"{wiring.attention}.value",
        "attention_output": f"{wiring.attention_output}.dense",
        "attention_layer_norm": f"{wiring.attention_output}.LayerNorm",
        "intermediate": f"{wiring.intermediate}.dense",
        "output": f"{wiring.output}.dense",
        "output_layer_norm": f"{wiring.output}.LayerNorm",
    }
    paths = {term: [path] for term, path in everywhere.items()}
    for term, path in in_a_layer.items():
        paths[term] = [f"{wiring.layers}.{i}.{path}" for i in range(len(wiring.layers_of(base)))]
    modules = dict(base_modules(base))

    def bias_at(path: str) -> nn.Parameter | None:
        return getattr(modules.get(path), "bias", None)

    terms = paths if config.terms == "all" else config.terms
    missing = [p for t in terms for p in paths[t] if bias_at(p) is None and config.terms != "all"]
    if missing:
        raise ValueError(f"terms: got {config.terms!r}, but {type(base).__name__} has no bias at {missing[0]}")
    return {path: Bias(bias_at(path)) for term in terms for path in paths[term] if bias_at(path) is not None}


def layer_norms(config: LayerNormConfig, wiring: Wiring, base: nn.Module) -> dict[str, Part]:
    """Copies of the base's LayerNorms, by path in the base model."""
    modules = dict(wiring.sublayers(base))
    paths = [wiring.embeddings] if config.layer_norms == "all" else []
    for i in range(len(wiring.layers_of(base))):
        paths += [f"{wiring.layers}.{i}.{part}" for part in (wiring.attention_output, wiring.output)]
    return {path: norm_site(modules[path].LayerNorm) for path in paths}


def nothing(config: HeadConfig, wiring: Wiring, base: nn.Module) -> dict[str, Part]:
    """A head-only adaptation has no part in the base."""
    return {}
