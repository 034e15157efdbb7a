"""LoRA beside the linear layers of the encoder."""

from __future__ import annotations

from torch import nn

from fastadapt.config import BitFitConfig
from fastadapt.config.lora import TARGETS, LoRAConfig, fits
from fastadapt.models.methods.bitfit import biases
from fastadapt.models.wiring import Wiring
from fastadapt.modules.active import Part
from fastadapt.modules.linear import FusedLinear
from fastadapt.modules.lora import LoRA


def target_paths(wiring: Wiring, base: nn.Module) -> dict[str, str]:
    """Path of every linear layer that a LoRA may stand beside -> the target that names it ("" for none of the six)."""
    names = {
        f"{wiring.attention}.query": "query",
        f"{wiring.attention}.key": "key",
        f"{wiring.attention}.value": "value",
        f"{wiring.attention_output}.dense": "attention_output",
        f"{wiring.intermediate}.dense": "intermediate",
        f"{wiring.output}.dense": "output",
    }
    paths = {
        f"{wiring.layers}.{i}.{path}": name for i in range(len(wiring.layers_of(base))) for path, name in names.items()
    }
    return paths | {path: "" for path in wiring.alone(base)}


def lora_parts(config: LoRAConfig, wiring: Wiring, base: nn.Module) -> dict[str, Part]:
    """The parts of a LoRA, by path in the base model; the base is only read."""
    known = target_paths(wiring, base)
    missing = [t for t in config.targets if t not in TARGETS and t not in known]
    if missing:
        raise ValueError(
            f"targets: got {', '.join(missing)}, no linear layer of this {type(base).__name__}; accepted are "
            f"{', '.join(TARGETS)}, and paths such as {next(iter(known))}"
        )
    targets = {path: name for path, name in known.items() if name in config.targets or path in config.targets}
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(fits(key, name, path) for path, name in targets.items()):
                accepted = ", ".join(dict.fromkeys(name or path for path, name in targets.items()))
                raise ValueError(f"{field}: got {key!r}, which fits no target; targets are {accepted}")
    linears = {path: base.get_submodule(path) for path in known}
    for path, name in targets.items():
        linear = linears[path]
        if type(linear) not in (nn.Linear, FusedLinear):
            raise ValueError(f"targets: {path} is a {type(linear).__name__}; accepted is a plain Linear")
        if "forward" in linear.__dict__:
            raise ValueError(f"targets: the forward of {path} is patched; accepted is a plain Linear")
        if not linear.weight.is_floating_point():
            raise ValueError(f"targets: {path} has weights of {linear.weight.dtype}; accepted are floating ones")
        rank, least = config.rank(name, path), min(linear.weight.shape)
        if rank > least:
            given = "r" if rank == config.r else "rank_pattern"
            raise ValueError(f"{given}: got {rank} for {path} of shape {tuple(linear.weight.shape)}; accepted is up to "
                             f"{least}")  # fmt: skip
    parts: dict[str, Part] = biases(BitFitConfig(), wiring, base) if config.bias == "all" else {}
    for path, name in targets.items():
        parts[path] = LoRA(
            linears[path],
            config.rank(name, path),
            config.scale(name, path),
            dropout=config.dropout,
            init=config.init,
            dora=config.dora,
            bias=config.bias != "none",
        )
    return parts
