"""AdapterHub's form of AdapterFusion: the mix alone, in a folder of its own; its adapters lie in theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastadapt.config import FusionConfig
from fastadapt.interop.hub_names import Given, refuse_unknown
from fastadapt.modules.state import Adaptation

CONFIG = "adapter_fusion_config.json"
WEIGHTS, PICKLED_WEIGHTS = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
FILES = (CONFIG, WEIGHTS, PICKLED_WEIGHTS)

_FIXED = {"key": True, "query": True, "query_before_ln": False, "residual_before": False, "temperature": False}
_PASSIVE = {"value_before_softmax", "value_initialized"}  # the same function either way, or of no effect once read
_REGULARIZATION = 0.01
_NAMED_CONFIGS = {
    "static": {"value": False, "regularization": False},
    "dynamic": {"value": True, "regularization": True},
}


def hub_name(config: FusionConfig) -> str:
    """AdapterHub's name of a fusion."""
    return ",".join(config.adapters)


def to_hub(config: FusionConfig, hidden: int) -> dict[str, Any]:
    """AdapterHub's form of a configuration, every field written out."""
    return {
        **_FIXED,
        "value": config.value,
        "regularization": config.regularization > 0.0,
        "value_before_softmax": True,
        "value_initialized": config.value,
        "dropout_prob": config.dropout,
    }


def from_hub(hub: Mapping[str, Any] | str, name: str) -> FusionConfig:
    """The configuration that computes what AdapterHub does with ``hub``; raises ``ValueError`` for what none does."""
    if isinstance(hub, str):
        if hub not in _NAMED_CONFIGS:
            raise ValueError(f"path: its configuration is {hub!r}; accepted are {', '.join(_NAMED_CONFIGS)}")
        hub = _NAMED_CONFIGS[hub]
    refuse_unknown(hub, {"value", "regularization", "dropout_prob", *_PASSIVE}, _FIXED)
    try:
        return FusionConfig(
            name.split(","),
            value=bool(hub.get("value", True)),
            # AdapterHub reads 0 as unset, too.
            dropout=hub.get("dropout_prob") or None,
            regularization=_REGULARIZATION if hub.get("regularization", True) else 0.0,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: its configuration is not accepted: {error}") from error


def holds(config: FusionConfig) -> bool:
    """Whether AdapterHub's form says all of it."""
    return config.dropout != 0.0 and config.regularization in (0.0, _REGULARIZATION) and not config.train_adapters


def _keys(adaptation: Adaptation, name: str) -> dict[str, str]:
    return {
        f"{path}.{key}": f"{path}.adapter_fusion_layer.{name}.{key}"
        for path, part in adaptation.parts().items()
        for key, _ in part.named_parameters()
    }


def export(adaptation: Adaptation, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """(AdapterHub's tensors by its keys in the base model, our keys of what they hold)."""
    keys = _keys(adaptation, name)
    return {theirs: adaptation.get_parameter(ours) for ours, theirs in keys.items()}, set(keys)


def collect(adaptation: Adaptation, name: str, given: Given) -> dict[str, Tensor]:
    """The tensors for our parameters, taken out of what a file has."""
    return {ours: given.take(theirs) for ours, theirs in _keys(adaptation, name).items()}
