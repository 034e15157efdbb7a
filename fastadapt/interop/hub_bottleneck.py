"""AdapterHub's form of bottleneck adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastadapt.config import BottleneckConfig, MaskedAdapterConfig
from fastadapt.interop.hub_names import Given, refuse_unknown
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.state import Adaptation
from fastadapt.ops.activations import canonical

# Our name -> the one that AdapterHub resolves to the same function.
_HUB_ACTIVATIONS = {"none": "linear", "leaky_relu": "leakyrelu", "silu": "swish"}
_LEGACY_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
LEGACY_KEYS = re.compile(r"(?:attention|layer)_text_(?:task|lang)_adapters")

# Fields of AdapterHub's bottleneck configuration with its defaults. The first group has counterparts here.
_HUB_FIELDS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "leave_out": [],
    "dropout": 0.0,
}
_HUB_FIXED: dict[str, Any] = {
    "phm_layer": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "stochastic_depth": 0.0,
}
# Without effect once phm_layer is off, on weights that are read, or in any version.
_HUB_PASSIVE: dict[str, Any] = {
    "init_weights_seed": None,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}
_LEGACY_PASSIVE = {"attention_type", "new_attention_norm", "invertible_adapter", "architecture"}

_SEQUENTIAL = {"original_ln_before": True, "mh_adapter": False, "output_adapter": True, "non_linearity": "relu",
               "reduction_factor": 16}  # fmt: skip
_DOUBLE = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 16}
_PARALLEL = {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 2,
             "init_weights": "mam_adapter", "is_parallel": True, "scaling": 4.0}  # fmt: skip
NAMED_CONFIGS = {
    "seq_bn": _SEQUENTIAL, "pfeiffer": _SEQUENTIAL, "double_seq_bn": _DOUBLE, "houlsby": _DOUBLE,
    "par_bn": _PARALLEL, "scaled_parallel": _PARALLEL,
}  # fmt: skip


def to_hub(config: BottleneckConfig, hidden: int) -> dict[str, Any]:
    """AdapterHub's form of a configuration, every field written out."""
    activation = canonical(config.activation)
    factor = config.reduction_factor if config.bottleneck is None else _factor(hidden, config.bottleneck)
    return {
        **_HUB_FIXED,
        **_HUB_PASSIVE,
        "mh_adapter": "attention_output" in config.placements,
        "output_adapter": "output" in config.placements,
        "reduction_factor": factor,
        "non_linearity": _HUB_ACTIVATIONS.get(activation, activation),
        "original_ln_before": config.original_ln_before,
        "original_ln_after": config.original_ln_after,
        "ln_before": config.ln_before,
        "ln_after": config.ln_after,
        "init_weights": "mam_adapter" if config.init == "lora" else config.init,
        "is_parallel": config.parallel,
        "scaling": config.scale if isinstance(config.scale, str) else float(config.scale),
        "use_gating": config.gate,
        "residual_before_ln": config.residual_before_ln,
        "adapter_residual_before_ln": config.adapter_residual_before_ln,
        "leave_out": sorted({*config.leave_out, *range(_dropped(config))}),
        "dropout": float(config.dropout),
    }


def _dropped(config: BottleneckConfig) -> int:
    return config.drop.n if config.drop is not None and config.drop.mode == "specialised" else 0


def _factor(hidden: int, width: int) -> float:
    # AdapterHub computes int(hidden // factor); the quotient may round to just above.
    factor = hidden / width
    while int(hidden // factor) < width:
        factor = math.nextafter(factor, 0.0)
    return factor


def from_hub(
    hub: Mapping[str, Any], *, version: str | None, has_invertible: bool, keys: Sequence[str]
) -> BottleneckConfig:
    """The configuration that computes what AdapterHub does with ``hub``; raises ``ValueError`` for what none does.

    Args:
        hub: AdapterHub's form of the configuration.
        version: of the library that wrote it; None for the first releases.
        has_invertible: whether its invertible adapter was ever used.
        keys: of the tensors that lie with it.
    """
    hub = dict(hub)
    if not has_invertible:  # early task adapters name invertible ones that they never used
        for key in ("inv_adapter", "inv_adapter_reduction_factor", "invertible_adapter"):
            hub.pop(key, None)
    required = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
    missing = [key for key in required if key not in hub]
    if missing:
        raise ValueError(f"path: its configuration lacks {', '.join(missing)}")
    refuse_unknown(hub, {*required, *_HUB_FIELDS, *_HUB_PASSIVE, *_LEGACY_PASSIVE}, _HUB_FIXED)

    value = {**_HUB_FIELDS, **{k: v for k, v in hub.items() if v is not None}}
    activation = value["non_linearity"].lower()
    if version is None:
        activation = _LEGACY_ACTIVATIONS.get(activation, activation)
    placements = [p for p, key in (("attention_output", "mh_adapter"), ("output", "output_adapter")) if value[key]]
    scale = value["scaling"]
    residual = value["residual_before_ln"]
    parallel = bool(value["is_parallel"])
    # What AdapterHub does not look at in these forms is not carried over.
    before = bool(value["original_ln_before"]) and not parallel
    try:
        return BottleneckConfig(
            reduction_factor=value["reduction_factor"],
            activation=activation,
            placements=tuple(placements),
            parallel=parallel,
            scale=scale if isinstance(scale, str) else float(scale),
            dropout=float(value["dropout"]),
            init=value["init_weights"],
            leave_out=tuple(value["leave_out"] or ()),
            gate=bool(value["use_gating"]),
            ln_before=bool(value["ln_before"]),
            ln_after=bool(value["ln_after"]),
            original_ln_before=before,
            original_ln_after=bool(value["original_ln_after"]),
            residual_before_ln=residual if before else True,
            adapter_residual_before_ln=bool(value["adapter_residual_before_ln"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: its configuration is not accepted: {error}") from error


# -- weights -----------------------------------------------------------------------------------------------------


def holds(config: BottleneckConfig) -> bool:
    """Whether AdapterHub's form says all of it."""
    return not isinstance(config, MaskedAdapterConfig) and config.drop is None


def names_of(site: Site) -> dict[str, list[str]]:
    """Our name of each parameter of an adapter -> AdapterHub's, several where it stores one tensor twice."""
    names: dict[str, list[str]] = {}
    shift = 0 if site.norm_before is None else 1  # with ln_before, that LayerNorm is the first of adapter_down
    for kind in ("weight", "bias"):
        names[f"down.{kind}"] = [f"adapter_down.{shift}.{kind}"]
        names[f"up.{kind}"] = [f"adapter_up.{kind}"]
        if site.gate is not None:
            names[f"gate.{kind}"] = [f"gate.{kind}"]
        if site.norm_before is not None:
            names[f"norm_before.{kind}"] = [f"adapter_norm_before.{kind}", f"adapter_down.0.{kind}"]
        if site.norm_after is not None:
            names[f"norm_after.{kind}"] = [f"adapter_norm_after.{kind}"]
    if isinstance(site.scale, nn.Parameter):
        names["scale"] = ["scaling"]
    return names


def _keys(adaptation: Adaptation, name: str) -> dict[str, list[str]]:
    return {
        f"{path}.{ours}": [f"{path}.adapters.{name}.{key}" for key in theirs]
        for path, site in adaptation.parts().items()
        if isinstance(site, Site) and site.down is not None
        for ours, theirs in names_of(site).items()
    }


def export(adaptation: Adaptation, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """(AdapterHub's tensors by its keys in the base model, our keys of what they hold)."""
    keys = _keys(adaptation, name)
    tensors = {key: adaptation.get_parameter(ours) for ours, theirs in keys.items() for key in theirs}
    return tensors, set(keys)


def collect(adaptation: Adaptation, name: str, given: Given) -> dict[str, Tensor]:
    """The tensors for our parameters, taken out of what a file has."""
    return {ours: given.take(*theirs) for ours, theirs in _keys(adaptation, name).items()}
