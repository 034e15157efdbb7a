"""AdapterHub's form of LoRA; none lies beside attention.output, and its DoRA is another function than the paper's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastadapt.config import LoRAConfig
from fastadapt.interop.hub_names import Given, refuse_unknown
from fastadapt.modules.lora import LoRA
from fastadapt.modules.state import Adaptation

_FIELDS = {"selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "leave_out": [], "r": 8, "alpha": 8,
           "dropout": 0.0, "attn_matrices": ["q", "v"]}  # fmt: skip
_FIXED = {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
_PASSIVE = {"architecture", "init_weights", "init_weights_seed", "dtype"}
_MATRICES = {"q": "query", "k": "key", "v": "value"}
_SCALED_SINCE = (1, 1, 0)  # earlier versions of the library computed with a scale of 1, whatever they wrote


def to_hub(config: LoRAConfig, hidden: int) -> dict[str, Any]:
    """AdapterHub's form of a configuration, every field written out; ``ValueError`` for what it cannot say."""
    plain = LoRAConfig(config.r, config.alpha, config.targets, config.dropout, config.init)
    known = {*_MATRICES.values(), "intermediate", "output"}
    if config != plain or not set(config.targets) <= known:
        raise ValueError(f"format: got 'adapterhub', whose LoRA has no {_beyond(config, known)}; accepted is 'peft'")
    matrices = [short for short, target in _MATRICES.items() if target in config.targets]
    return {
        "architecture": "lora",
        "selfattn_lora": bool(matrices),
        "intermediate_lora": "intermediate" in config.targets,
        "output_lora": "output" in config.targets,
        "leave_out": [],
        "r": config.r,
        "alpha": config.alpha,
        "dropout": float(config.dropout),
        "attn_matrices": matrices,
        "init_weights": "lora",
        "init_weights_seed": None,
        "dtype": None,
        **_FIXED,
    }


def _beyond(config: LoRAConfig, known: set[str]) -> str:
    for field in ("rslora", "dora", "rank_pattern", "alpha_pattern"):
        if getattr(config, field):
            return field
    if config.bias != "none":
        return "bias"
    return f"target {', '.join(t for t in config.targets if t not in known)}"


def from_hub(hub: Mapping[str, Any], *, version: str | None, has_invertible: bool, keys: Sequence[str]) -> LoRAConfig:
    """The configuration that computes what AdapterHub does with ``hub``; raises ``ValueError`` for what none does."""
    refuse_unknown(hub, {*_FIELDS, *_PASSIVE}, _FIXED)
    value = {**_FIELDS, **{k: v for k, v in hub.items() if v is not None}}
    targets = [_MATRICES.get(m, m) for m in value["attn_matrices"]] if value["selfattn_lora"] else []
    targets += [name for name in ("intermediate", "output") if value[f"{name}_lora"]]
    if value["leave_out"]:
        found = [re.search(r"(encoder\.layer\.\d+\..+)\.loras\.", key) for key in keys]
        targets = list(dict.fromkeys(match[1] for match in found if match))
    numbers = re.match(r"adapters\.(\d+)\.(\d+)\.(\d+)", version or "")
    faulty = numbers is not None and tuple(map(int, numbers.groups())) < _SCALED_SINCE
    try:
        return LoRAConfig(
            r=value["r"],
            alpha=value["r"] if faulty else value["alpha"],
            targets=tuple(targets),
            dropout=float(value["dropout"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: its configuration is not accepted: {error}") from error


def holds(config: LoRAConfig) -> bool:
    """Whether AdapterHub's form says all of it."""
    return True


def _keys(adaptation: Adaptation, name: str) -> dict[str, str]:
    return {
        f"{path}.{matrix}.weight": f"{path}.loras.{name}.{matrix}"
        for path, part in adaptation.parts().items()
        if isinstance(part, LoRA)
        for matrix in ("lora_A", "lora_B")
    }


def export(adaptation: Adaptation, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """(AdapterHub's tensors by its keys in the base model, our keys of what they hold)."""
    keys = _keys(adaptation, name)
    return {theirs: adaptation.get_parameter(ours) for ours, theirs in keys.items()}, set(keys)


def collect(adaptation: Adaptation, name: str, given: Given) -> dict[str, Tensor]:
    """The tensors for our parameters, taken out of what a file has."""
    return {ours: given.take(theirs) for ours, theirs in _keys(adaptation, name).items()}
