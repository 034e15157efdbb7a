"""AdapterHub's folder of an adapter, as its library ``adapters`` 1.3.0 writes and reads it, and our own beside it.

``adapter_config.json`` with ``adapter.safetensors`` or ``pytorch_adapter.bin``; the head in ``head_config.json`` with
``model_head.safetensors`` or ``pytorch_model_head.bin``. What that format cannot hold (own copies of the pretrained
LayerNorms, biases, what only training needs) lies beside it in ``fastadapt.json`` and ``fastadapt.safetensors``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.config import BottleneckConfig, FusionConfig, LoRAConfig, MAMConfig, PrefixConfig
from fastadapt.interop import heads, hub_bottleneck, hub_fusion, hub_lora, hub_prefix, hub_union, own
from fastadapt.interop.files import fitting, read_json, read_tensors, write_folder
from fastadapt.interop.hub_names import Given
from fastadapt.models.wiring import Wiring
from fastadapt.modules.state import Adaptation

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter.safetensors", "pytorch_adapter.bin"
FILES = (CONFIG, WEIGHTS, PICKLED_WEIGHTS, *hub_fusion.FILES, *heads.FILES, *own.FILES)
VERSION = "adapters.1.3.0"  # whose format this is; without one a reader takes gelu for gelu_new

# What writes and reads each architecture: its own word for it, our configuration, the module.
_CODECS: tuple[tuple[str | None, type, ModuleType], ...] = (
    (None, BottleneckConfig, hub_bottleneck),
    ("lora", LoRAConfig, hub_lora),
    ("prefix_tuning", PrefixConfig, hub_prefix),
    ("union", MAMConfig, hub_union),
)
FUSION = hub_fusion.CONFIG  # announces a fusion's folder, whose files have names of their own
ANNOUNCING = (own.CONFIG, CONFIG, FUSION)  # of a folder, ours and PEFT's too; what says more stands first
_PAIRS = ((CONFIG, WEIGHTS, PICKLED_WEIGHTS), hub_fusion.FILES, heads.FILES, own.FILES)


def codec_of(config: Any) -> ModuleType | None:
    """The module that knows AdapterHub's form of a method; None where AdapterHub has no such method."""
    if isinstance(config, FusionConfig):
        return hub_fusion if config.mix == "attention" else None
    return next((codec for _, kind, codec in _CODECS if isinstance(config, kind)), None)


def save(
    model: nn.Module, wiring: Wiring, adaptation: Adaptation, folder: Path, name: str, format: str | None = None
) -> None:
    """Write one adaptation as AdapterHub's ``save_adapter(..., use_safetensors=True)`` does, and what is our own.

    Raises:
        ValueError: where ``format`` is AdapterHub's and that has no such method.
    """
    from fastadapt import __version__

    config = adaptation.config
    method = type(config).__name__
    codec = codec_of(config)
    if codec is None and format == "adapterhub":
        raise ValueError(f"format: got {format!r}, which holds no {method}; accepted is None")
    prefix = "" if isinstance(model, wiring.base) else f"{wiring.hub_name}."
    meta = {
        "model_type": model.config.model_type,
        "model_class": type(model).__name__,
        "model_name": getattr(model.config, "_name_or_path", "") or "",
        "hidden_size": model.config.hidden_size,
        "version": VERSION,
    }
    files: dict[str, dict[str, Any]] = {}
    held: set[str] = set()
    if codec is not None:
        fusion = codec is hub_fusion
        theirs = hub_fusion.hub_name(config) if fusion else name
        tensors, held = codec.export(adaptation, theirs)
        hub = codec.to_hub(config, model.config.hidden_size)
        files[hub_fusion.CONFIG if fusion else CONFIG] = {**meta, "name": theirs, "config": hub}
        if fusion:
            files[hub_fusion.CONFIG]["adapter_names"] = list(config.adapters)
        files[hub_fusion.WEIGHTS if fusion else WEIGHTS] = {prefix + key: tensor for key, tensor in tensors.items()}
    head_files, unsaved_head = heads.files_of(model, wiring, adaptation, name, meta)
    files |= head_files
    rest = {key: t for key, t in _own_state(adaptation).items() if key not in held}
    if rest or unsaved_head or codec is None or not codec.holds(config):
        files[own.CONFIG] = {
            **meta,
            "version": __version__,
            "name": name,
            "config": own.to_json(config),
            "unsaved_head": unsaved_head,
        }
        files[own.WEIGHTS] = rest
    if codec is None:
        warnings.warn(
            f"{name!r} is a {method}'s, of which no other library has a format: AdapterHub and PEFT cannot read this "
            "folder",
            stacklevel=3,
        )
    elif rest:
        kind = "LayerNorms" if all(".LayerNorm." in key for key in rest) else "parameters"
        warnings.warn(
            f"{name!r} owns {kind}, which AdapterHub's format cannot hold: they are saved in {own.WEIGHTS}, and "
            "AdapterHub would compute something else from this folder",
            stacklevel=3,
        )
    elif not codec.holds(config):
        warnings.warn(
            f"{name!r} is a {method}'s, which AdapterHub's format cannot say all of: the rest is in {own.CONFIG}, and "
            "AdapterHub would compute something else from this folder in training",
            stacklevel=3,
        )
    write_folder(folder, files, FILES, ANNOUNCING)


def _own_state(adaptation: Adaptation) -> dict[str, Tensor]:
    return {key: t for key, t in adaptation.state_dict().items() if not key.startswith("head.")}


class Folder:
    """An adaptation read from disk and checked as far as that goes without a model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for config, *weights in _PAIRS:
            lone = next((name for name in weights if (folder / name).is_file()), None)
            if lone is not None and not (folder / config).is_file():
                raise ValueError(f"path: {folder} has {lone} but lacks {config}; accepted is a folder with both")
        self.own_config = read_json(folder / own.CONFIG) if (folder / own.CONFIG).is_file() else {}
        self.own_weights: dict[str, Tensor] = {}
        if self.own_config:
            weights = read_tensors(folder, own.WEIGHTS)
            if weights is None:
                raise ValueError(f"path: {folder} has {own.CONFIG} but lacks {own.WEIGHTS}")
            self.own_weights = weights
        self.hub: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}
        self.fusion = (folder / hub_fusion.CONFIG).is_file() and not (folder / CONFIG).is_file()
        if self.fusion or (folder / CONFIG).is_file() or not self.own_config:
            self._read_hub()
        self.config = own.from_json(self.own_config.get("config")) if self.own_config else self._hub_config()
        self.hub_name: str = self.hub.get("name", "")
        self.name: str = str(self.own_config.get("name", self.hub_name))
        self.head = heads.StoredHead(folder, self.name, self.own_config.get("unsaved_head"))

    def _read_hub(self) -> None:
        config, safe, pickled = hub_fusion.FILES if self.fusion else (CONFIG, WEIGHTS, PICKLED_WEIGHTS)
        self.hub = read_json(self.folder / config)
        if "config" not in self.hub or not isinstance(self.hub.get("name"), str):
            raise ValueError(f"path: {self.folder / config} is not AdapterHub's: it lacks 'config' or 'name'")
        weights = read_tensors(self.folder, safe, pickled)
        if weights is None:
            raise ValueError(f"path: {self.folder} has neither {safe} nor {pickled}")
        self.weights = {hub_bottleneck.LEGACY_KEYS.sub("adapters", key): tensor for key, tensor in weights.items()}

    def _hub_config(self) -> Any:
        hub = self.hub["config"]
        if self.fusion:
            return hub_fusion.from_hub(hub, self.hub["name"])
        if isinstance(hub, str):
            if hub not in hub_bottleneck.NAMED_CONFIGS:
                accepted = ", ".join(hub_bottleneck.NAMED_CONFIGS)
                raise ValueError(f"path: its configuration is {hub!r}; accepted are {accepted} or a mapping")
            hub = hub_bottleneck.NAMED_CONFIGS[hub]
        if not isinstance(hub, Mapping):
            raise ValueError(f"path: its configuration is {hub!r}; accepted is a mapping")
        used = self.hub.get("type") != "text_task" and bool(hub.get("inv_adapter") or hub.get("invertible_adapter"))
        invertible = used or any("invertible" in key for key in self.weights)
        return from_hub(hub, version=self.hub.get("version"), has_invertible=invertible, keys=list(self.weights))

    def read_head(self, model: nn.Module, wiring: Wiring) -> int | None:
        """Read the head where it fits the model; its number of labels where that differs from the model's own."""
        return self.head.read(model, wiring)

    def check(self, model: nn.Module) -> None:
        for key, mine in (("hidden_size", model.config.hidden_size), ("model_type", model.config.model_type)):
            theirs = (self.hub or self.own_config).get(key)
            if theirs is not None and theirs != mine:
                raise ValueError(f"path: {self.folder} was made for {key} {theirs!r}, but the model's is {mine!r}")

    def fill(self, model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> None:
        """Copy the weights into a new adaptation; raises before the model has seen it."""
        found: dict[str, Tensor] = {}
        if self.hub:
            prefix = f"{wiring.hub_name}."
            given = Given(self.folder, {key.removeprefix(prefix): tensor for key, tensor in self.weights.items()})
            found = codec_of(self.config).collect(adaptation, self.hub_name, given)
            given.finish()
        state = _own_state(adaptation)
        rest = Given(self.folder, self.own_weights)
        for key in state:
            if key not in found:
                found[key] = rest.take(key)
        rest.finish()
        pending = [(target, fitting(self.folder, key, found[key], target)) for key, target in state.items()]
        pending += self.head.pending(model, wiring, adaptation)
        with torch.no_grad():
            for target, tensor in pending:
                target.copy_(tensor)


def from_hub(hub: Mapping[str, Any], *, version: str | None, has_invertible: bool, keys: Sequence[str]) -> Any:
    """Our configuration for AdapterHub's of any architecture; ``ValueError`` names one that is unknown here."""
    architecture = hub.get("architecture")
    codecs = {word: codec for word, _, codec in _CODECS}
    if architecture == "bottleneck":
        architecture = None
    if architecture not in codecs:
        accepted = ", ".join(word or "bottleneck" for word in codecs)
        raise ValueError(f"path: holds an adapter of architecture {architecture!r}; accepted are {accepted}")
    return codecs[architecture].from_hub(hub, version=version, has_invertible=has_invertible, keys=keys)
