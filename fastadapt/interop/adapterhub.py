"""AdapterHub's folder of a bottleneck adapter, as its library ``adapters`` 1.3.0 writes and reads it.

``adapter_config.json`` with ``adapter.safetensors`` or ``pytorch_adapter.bin``; the head in ``head_config.json`` with
``model_head.safetensors`` or ``pytorch_model_head.bin``. What that format cannot hold, own copies of the pretrained
LayerNorms, lies beside it in ``fastadapt.json`` and ``fastadapt.safetensors``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.config import BottleneckConfig
from fastadapt.interop.files import read_json, read_tensors, write_folder
from fastadapt.models.head import make_head, parts_of
from fastadapt.models.wiring import Wiring
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.state import Adaptation, own_labels
from fastadapt.ops.activations import canonical

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS, PICKLED_HEAD_WEIGHTS = "model_head.safetensors", "pytorch_model_head.bin"
OWN_CONFIG, OWN_WEIGHTS = "fastadapt.json", "fastadapt.safetensors"
_FILES = (WEIGHTS, PICKLED_WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS, PICKLED_HEAD_WEIGHTS, OWN_CONFIG, OWN_WEIGHTS)
_VERSION = "adapters.1.3.0"  # whose format this is; without one a reader takes gelu for gelu_new

# Our name -> the one that AdapterHub resolves to the same function.
_HUB_ACTIVATIONS = {"none": "linear", "leaky_relu": "leakyrelu", "silu": "swish"}
_LEGACY_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_LEGACY_KEYS = re.compile(r"(?:attention|layer)_text_(?:task|lang)_adapters")

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
_NAMED_CONFIGS = {
    "seq_bn": _SEQUENTIAL, "pfeiffer": _SEQUENTIAL, "double_seq_bn": _DOUBLE, "houlsby": _DOUBLE,
    "par_bn": _PARALLEL, "scaled_parallel": _PARALLEL,
}  # fmt: skip


# -- configuration -----------------------------------------------------------------------------------------------


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
        "leave_out": list(config.leave_out),
        "dropout": float(config.dropout),
    }


def _factor(hidden: int, width: int) -> float:
    # AdapterHub computes int(hidden // factor); the quotient may round to just above.
    factor = hidden / width
    while int(hidden // factor) < width:
        factor = math.nextafter(factor, 0.0)
    return factor


def from_hub(hub: Any, *, versioned: bool, train_layer_norm: str, has_invertible: bool) -> BottleneckConfig:
    """The configuration that computes what AdapterHub does with ``hub``; raises ``ValueError`` for what none does."""
    if isinstance(hub, str):
        if hub not in _NAMED_CONFIGS:
            accepted = ", ".join(_NAMED_CONFIGS)
            raise ValueError(f"path: its configuration is {hub!r}; accepted are {accepted} or a mapping")
        hub = _NAMED_CONFIGS[hub]
    if not isinstance(hub, Mapping):
        raise ValueError(f"path: its configuration is {hub!r}; accepted is a bottleneck adapter's")
    if hub.get("architecture") is not None:
        raise ValueError(f"path: holds an adapter of architecture {hub['architecture']!r}; accepted are bottlenecks")
    hub = dict(hub)
    if not has_invertible:  # early task adapters name invertible ones that they never used
        for key in ("inv_adapter", "inv_adapter_reduction_factor", "invertible_adapter"):
            hub.pop(key, None)
    required = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
    missing = [key for key in required if key not in hub]
    if missing:
        raise ValueError(f"path: its configuration lacks {', '.join(missing)}")
    for key, accepted in _HUB_FIXED.items():
        if hub.get(key, accepted) not in (accepted, None):
            raise ValueError(f"path: its configuration sets {key}={hub[key]!r}; accepted is {accepted!r}")
    known = {*required, *_HUB_FIELDS, *_HUB_FIXED, *_HUB_PASSIVE, *_LEGACY_PASSIVE}
    unknown = sorted(key for key in hub if key not in known and hub[key] not in (None, False))
    if unknown:
        raise ValueError(f"path: its configuration sets {', '.join(unknown)}, which is unknown here")

    value = {**_HUB_FIELDS, **{k: v for k, v in hub.items() if v is not None}}
    activation = value["non_linearity"].lower()
    if not versioned:
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
            train_layer_norm=train_layer_norm,
            original_ln_before=before,
            original_ln_after=bool(value["original_ln_after"]),
            residual_before_ln=residual if before else True,
            adapter_residual_before_ln=bool(value["adapter_residual_before_ln"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: its configuration is not accepted: {error}") from error


# -- weights -----------------------------------------------------------------------------------------------------


def _hub_names(site: Site) -> dict[str, list[str]]:
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


def _own_tensors(adaptation: Adaptation) -> dict[str, Tensor]:
    """What AdapterHub's files have no place for: the copies of the pretrained LayerNorms."""
    return {
        f"{path}.LayerNorm.{key}": p
        for path, site in adaptation.sites().items()
        if site.LayerNorm is not None
        for key, p in site.LayerNorm.named_parameters()
    }


def save(model: nn.Module, wiring: Wiring, adaptation: Adaptation, folder: Path, name: str) -> None:
    """Write one adaptation as AdapterHub's ``save_adapter(..., use_safetensors=True)`` does."""
    from fastadapt import __version__

    config = adaptation.config
    hidden = model.config.hidden_size
    prefix = "" if isinstance(model, wiring.base) else f"{wiring.hub_name}."
    meta = {
        "model_type": model.config.model_type,
        "model_class": type(model).__name__,
        "model_name": getattr(model.config, "_name_or_path", "") or "",
        "hidden_size": hidden,
        "version": _VERSION,
    }
    weights = {}
    for path, site in adaptation.sites().items():
        if site.down is not None:
            parameters = dict(site.named_parameters())
            for key, theirs in _hub_names(site).items():
                for hub_key in theirs:
                    weights[f"{prefix}{path}.adapters.{name}.{hub_key}"] = parameters[key]
    files: dict[str, dict[str, Any]] = {
        CONFIG: {**meta, "name": name, "config": to_hub(config, hidden)},
        WEIGHTS: weights,
    }

    head = adaptation.own_head()
    foreign_head = head is not None and not _head_fits(model, wiring, adaptation)
    if head is not None and not foreign_head:
        labels = model.config.label2id
        if adaptation.num_labels is not None and adaptation.num_labels != len(labels):
            labels = {f"LABEL_{i}": i for i in range(adaptation.num_labels)}
        files[HEAD_CONFIG] = {
            **meta,
            "name": None,
            "config": None,
            "num_labels": len(labels) if adaptation.num_labels is None else adaptation.num_labels,
            "label2id": labels,
        }
        files[HEAD_WEIGHTS] = dict(_head_parameters(model, wiring, head))
    if foreign_head:
        warnings.warn(
            f"the head of {name!r} is a {type(head).__name__} of the user's own, which no file can rebuild: it is not "
            "saved",
            stacklevel=3,
        )
    own = _own_tensors(adaptation)
    if own or foreign_head:
        files[OWN_CONFIG] = {
            "version": __version__,
            "train_layer_norm": config.train_layer_norm,
            "unsaved_head": type(head).__name__ if foreign_head else None,
        }
        files[OWN_WEIGHTS] = own
    if own:
        warnings.warn(
            f"{name!r} owns LayerNorms, which AdapterHub's format cannot hold: they are saved in {OWN_WEIGHTS}, and "
            "AdapterHub would compute something else from this folder",
            stacklevel=3,
        )
    write_folder(folder, files, _FILES)


def _head_parameters(model: nn.Module, wiring: Wiring, head: nn.Module) -> list[tuple[str, nn.Parameter]]:
    parts = parts_of(head, wiring.slots_of(model))
    return [(f"{slot}.{key}", p) for slot, part in parts.items() for key, p in part.named_parameters()]


def _head_fits(model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> bool:
    """Whether the head has the form of the model's own, up to the number of labels, so that it can be rebuilt."""
    kind = None if adaptation.num_labels == own_labels(model)[0] else adaptation.num_labels
    with torch.random.fork_rng(devices=[]):
        try:
            ours, _ = make_head(model, wiring, kind)
        except ValueError:
            return False

    def form(head: nn.Module) -> dict[str, torch.Size]:
        return {key: p.shape for key, p in _head_parameters(model, wiring, head)}

    return _classes(ours) == _classes(adaptation.own_head()) and form(ours) == form(adaptation.own_head())


def _classes(head: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(m).__name__) for name, m in head.named_modules()]


class Folder:
    """An adaptation read from disk and checked as far as that goes without a model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = read_json(folder / CONFIG)
        if "config" not in self.hub or not isinstance(self.hub.get("name"), str):
            raise ValueError(f"path: {folder / CONFIG} is not AdapterHub's: it lacks 'config' or 'name'")
        self.name: str = self.hub["name"]
        weights = read_tensors(folder, WEIGHTS, PICKLED_WEIGHTS)
        if weights is None:
            raise ValueError(f"path: {folder} has neither {WEIGHTS} nor {PICKLED_WEIGHTS}")
        self.weights = {_LEGACY_KEYS.sub("adapters", key): tensor for key, tensor in weights.items()}
        self.own_config = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).is_file() else {}
        self.own_weights = {}
        if self.own_config:
            own = read_tensors(folder, OWN_WEIGHTS)
            if own is None:
                raise ValueError(f"path: {folder} has {OWN_CONFIG} but lacks {OWN_WEIGHTS}")
            self.own_weights = own
        self.config = from_hub(
            self.hub["config"],
            versioned="version" in self.hub,
            train_layer_norm=self.own_config.get("train_layer_norm", "none"),
            has_invertible=any("invertible" in key for key in self.weights)
            or (self.hub.get("type") != "text_task" and _invertible(self.hub["config"])),
        )
        self.head_config: dict[str, Any] = {}
        self.head_weights: dict[str, Tensor] | None = None

    def read_head(self, model: nn.Module, wiring: Wiring) -> int | None:
        """Read the head where it fits the model; its number of labels where that differs from the model's own."""
        unsaved = self.own_config.get("unsaved_head")
        if unsaved:
            warnings.warn(
                f"the head of {self.name!r}, a {unsaved}, was not saved; a copy of the model's own is used",
                stacklevel=3,
            )
        weights = read_tensors(self.folder, HEAD_WEIGHTS, PICKLED_HEAD_WEIGHTS)
        if weights is None or not wiring.slots_of(model):
            return None
        if (self.folder / HEAD_CONFIG).is_file():
            self.head_config = read_json(self.folder / HEAD_CONFIG)
            theirs = self.head_config.get("model_class")
            if theirs != type(model).__name__:
                warnings.warn(
                    f"the head in {self.folder} is a {theirs}'s; a copy of this {type(model).__name__}'s own is used",
                    stacklevel=3,
                )
                return None
        self.head_weights = weights
        own, _ = own_labels(model)
        labels = self.head_config.get("num_labels", own)
        return labels if own is not None and labels != own else None

    def check(self, model: nn.Module) -> None:
        for key, own in (("hidden_size", model.config.hidden_size), ("model_type", model.config.model_type)):
            theirs = self.hub.get(key)
            if theirs is not None and theirs != own:
                raise ValueError(f"path: {self.folder} was made for {key} {theirs!r}, but the model's is {own!r}")

    def fill(self, model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> None:
        """Copy the weights into a new adaptation; raises before the model has seen it."""
        pending: list[tuple[nn.Parameter, Tensor]] = []
        given = dict(self.weights)
        prefix = f"{wiring.hub_name}."
        given = {key.removeprefix(prefix): tensor for key, tensor in given.items()}
        for path, site in adaptation.sites().items():
            if site.down is None:
                continue
            parameters = dict(site.named_parameters())
            for key, theirs in _hub_names(site).items():
                names = [f"{path}.adapters.{self.name}.{hub_key}" for hub_key in theirs]
                found = [given.pop(n) for n in names if n in given]
                pending.append((parameters[key], self._fitting(names[0], found, parameters[key])))
        self._nothing_left(given)

        own = dict(self.own_weights)
        for name, parameter in _own_tensors(adaptation).items():
            found = [own.pop(name)] if name in own else []
            pending.append((parameter, self._fitting(name, found, parameter)))
        self._nothing_left(own)

        if self.head_weights is not None:
            pending += self._head(model, wiring, adaptation.own_head())
        with torch.no_grad():
            for parameter, tensor in pending:
                parameter.copy_(tensor)

    def _head(self, model: nn.Module, wiring: Wiring, head: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        given = dict(self.head_weights)
        pending = []
        for key, parameter in _head_parameters(model, wiring, head):
            found = [given.pop(key)] if key in given else []
            pending.append((parameter, self._fitting(key, found, parameter)))
        # Second names of the same tensors, and what is tied to the base: they must say the same.
        parts = parts_of(head, wiring.slots_of(model))
        for key, tensor in given.items():
            slot, _, path = key.partition(".")
            there = parts.get(slot)
            for step in path.split("."):
                there = getattr(there, step, None)
            target = next((t for p, t in pending if p is there), there)
            if not isinstance(target, Tensor):
                raise ValueError(f"path: {self.folder} has {key}, which the head of {type(model).__name__} has not")
            same = target.shape == tensor.shape and torch.equal(target.detach().cpu().to(tensor.dtype), tensor)
            if not same:
                raise ValueError(f"path: {key} in {self.folder} is tied to a base that differs from this model's")
        return pending

    def _fitting(self, name: str, found: list[Tensor], parameter: nn.Parameter) -> Tensor:
        if not found:
            raise ValueError(f"path: {self.folder} lacks {name}")
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(f"path: {self.folder} holds {name} twice, with different values")
        if found[0].shape != parameter.shape or not found[0].is_floating_point():
            raise ValueError(
                f"path: {name} in {self.folder} has shape {tuple(found[0].shape)} and dtype {found[0].dtype}; accepted "
                f"is {tuple(parameter.shape)}, floating"
            )
        return found[0]

    def _nothing_left(self, left: Mapping[str, Tensor]) -> None:
        if left:
            some = ", ".join(sorted(left)[:3])
            raise ValueError(f"path: {self.folder} has {len(left)} tensors without a place in this model: {some}")


def _invertible(hub: Any) -> bool:
    return isinstance(hub, Mapping) and bool(hub.get("inv_adapter") or hub.get("invertible_adapter"))
