"""PEFT's folder of a LoRA, as its version 0.21 writes and reads it.

``adapter_config.json`` with ``adapter_model.safetensors`` or ``adapter_model.bin``. A head is a module to save; an
adapter that is not called ``default`` lies in a folder of its name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.config import LoRAConfig
from fastadapt.interop import adapterhub, heads
from fastadapt.interop.files import fitting, read_json, read_tensors, write_folder
from fastadapt.interop.peft_config import PeftConfig, to_peft
from fastadapt.models.head import last_linear, parts_of
from fastadapt.models.methods.lora import target_paths
from fastadapt.models.wiring import Wiring
from fastadapt.modules.lora import LoRA
from fastadapt.modules.state import Adaptation, base_modules, own_labels

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, WEIGHTS, PICKLED_WEIGHTS)
DEFAULT = "default"
_ROOT = "base_model.model."


def _keys(path: str, part: nn.Module) -> dict[str, list[str]]:
    """Our name of each parameter of a part -> PEFT's, the one it writes first."""
    names = {}
    for key, _ in part.named_parameters():
        if key == "bias" and isinstance(part, LoRA):
            names[key] = [f"{path}.base_layer.bias", f"{path}.bias"]
        elif key == "lora_magnitude_vector":
            names[key] = [f"{path}.{key}", f"{path}.{key}.weight"]
        else:
            names[key] = [f"{path}.{key}"]
    return names


# -- writing -----------------------------------------------------------------------------------------------------


def save(model: nn.Module, wiring: Wiring, adaptation: Adaptation, folder: Path, name: str) -> None:
    """Write one LoRA as PEFT's ``save_pretrained`` does.

    Raises:
        ValueError: for an adaptation of another method, which PEFT's format does not hold.
    """
    config = adaptation.config
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"format: got 'peft', which holds no {type(config).__name__}; accepted is None")
    base = wiring.base_of(model)
    prefix = _ROOT if base is model else f"{_ROOT}{wiring.hub_name}."
    parts = adaptation.parts()
    weights = {}
    for path, part in parts.items():
        parameters = dict(part.named_parameters())
        weights |= {prefix + theirs[0]: parameters[key] for key, theirs in _keys(path, part).items()}
    saved: list[str] = []
    if heads.rebuildable(model, wiring, adaptation, name):
        for slot, head in parts_of(adaptation.own_head(), wiring.slots_of(model)).items():
            saved.append(slot)
            # PEFT stores a module with what is tied to the rest of the model.
            for key in wiring.slots_of(model)[slot].state_dict():
                weights[f"{_ROOT}{slot}.{key}"] = _tensor_at(head, key)
    known = target_paths(wiring, base)
    loras = [path for path, part in parts.items() if isinstance(part, LoRA)]
    targets = {path: (config.rank(known[path], path), config.alpha_of(known[path], path)) for path in loras}
    content = to_peft(
        config,
        targets,
        known,
        model_class=type(model).__name__,
        base=getattr(model.config, "_name_or_path", None) or None,
        saved=saved,
    )
    write_folder(folder, {CONFIG: content, WEIGHTS: weights}, (*FILES, *adapterhub.FILES), adapterhub.ANNOUNCING)


def _tensor_at(module: nn.Module, key: str) -> Tensor:
    there: Any = module
    for step in key.split("."):
        there = getattr(there, step)
    return there


# -- reading -----------------------------------------------------------------------------------------------------


def folder_of(path: Path, name: str | None) -> Path | None:
    """Where the adapter lies: the folder itself, or the one of its name in it; None where there is none."""
    if (path / CONFIG).is_file():
        return path
    found = sorted(f for f in path.iterdir() if (f / CONFIG).is_file() and "peft_type" in read_json(f / CONFIG))
    named = [f for f in found if f.name == name]
    if len(named or found) > 1:
        raise ValueError(f"path: {path} holds several adapters ({', '.join(f.name for f in found)}); accepted is one, "
                         "so give its folder, or its name")  # fmt: skip
    return next(iter(named or found), None)


class Folder:
    """A LoRA read from disk; what it means is known once there is a model."""

    config: LoRAConfig

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.peft = PeftConfig(read_json(folder / CONFIG))
        weights = read_tensors(folder, WEIGHTS, PICKLED_WEIGHTS)
        if weights is None:
            raise ValueError(f"path: {folder} has neither {WEIGHTS} nor {PICKLED_WEIGHTS}")
        strange = [key for key in weights if not key.startswith(_ROOT)]
        if strange:
            raise ValueError(f"path: {folder} has {strange[0]}; accepted are keys that begin with {_ROOT}")
        self.weights = {key.removeprefix(_ROOT): tensor for key, tensor in weights.items()}
        self.head: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        """Find out which layers of this model are meant; raises where one of them takes no LoRA."""
        from fastadapt.models import wiring_of

        wiring = wiring_of(model)
        base = wiring.base_of(model)
        known = target_paths(wiring, base)
        # The names that PEFT's patterns speak of are those in the model that the adapter was trained on.
        hub = f"{wiring.hub_name}."
        prefix = hub if any(key.startswith(hub) for key in self.weights) else ""
        names = {path: prefix + path for path in known}
        targets = {path: name for path, name in names.items() if self.peft.targeted(name)}
        others = {prefix + path: m for path, m in base_modules(base) if path and path not in known}
        if prefix and base is not model:
            others |= {f"{slot}.{path}".rstrip("."): m for slot, head in wiring.slots_of(model).items()
                       for path, m in head.named_modules()}  # fmt: skip
        for name, module in others.items():
            if next(module.parameters(recurse=False), None) is not None and self.peft.targeted(name):
                raise ValueError(
                    f"path: {self.folder} has a LoRA on {name}; accepted are the linear layers of the encoder, and the "
                    "pooler's"
                )
        if not targets:
            raise ValueError(f"path: {self.folder} has target_modules={self.peft.targets!r}, which are none in this "
                             f"{type(model).__name__}")  # fmt: skip
        for module in self.peft.modules_to_save:
            inside = [path for path, _ in base_modules(base) if re.match(rf"(^|.*\.){module}$", prefix + path)]
            if inside:
                raise ValueError(
                    f"path: {self.folder} has modules_to_save={self.peft.modules_to_save!r}, of which {module} is a "
                    "part of the base; accepted are heads"
                )
        own_biases = any(key.endswith(".bias") and self._target_of(key) in names.values() for key in self.weights)
        if self.peft.bias == "lora_only" and not own_biases:
            self.peft.bias = "none"  # early versions left them out: the base's own run
        self.prefix = prefix
        self.config = self.peft.to_ours(targets, known)

    @staticmethod
    def _target_of(key: str) -> str:
        return key.removesuffix(".bias").removesuffix(".base_layer")

    def read_head(self, model: nn.Module, wiring: Wiring) -> int | None:
        """Take the head where it fits the model; its number of labels where that differs from the model's own."""
        slots = wiring.slots_of(model)
        inside = f"{wiring.hub_name}."
        rest = {} if not self.prefix else {k: t for k, t in self.weights.items() if not k.startswith(inside)}
        self.weights = {key: tensor for key, tensor in self.weights.items() if key not in rest}
        # With all biases PEFT also stores those of the original head, and a second name of the trained one's.
        rest = {k: t for k, t in rest.items() if not re.search(r"\.(original_module|modules_to_save)\.", k)}
        self.head = {key: t for key, t in rest.items() if key.split(".")[0] in slots}
        left_out = sorted({key.split(".")[0] for key in rest} - set(slots))
        if left_out and slots:
            warnings.warn(
                f"the head in {self.folder} is of {', '.join(left_out)}; a copy of this {type(model).__name__}'s own "
                "is used",
                stacklevel=3,
            )
        own, _ = own_labels(model)
        last = last_linear(slots["classifier"]) if own is not None and list(slots) == ["classifier"] else None
        weight = None if last is None else self.head.get(".".join(filter(None, ("classifier", last[0], "weight"))))
        return int(weight.shape[0]) if weight is not None and weight.shape[0] != own else None

    def fill(self, model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> None:
        """Copy the weights into a new adaptation; raises before the model has seen it."""
        given, pending = dict(self.weights), []
        for path, part in adaptation.parts().items():
            parameters = dict(part.named_parameters())
            for key, theirs in _keys(path, part).items():
                names = [self.prefix + each for each in theirs]
                name = next((each for each in names if each in given), names[0])
                pending.append((parameters[key], fitting(self.folder, name, given.pop(name, None), parameters[key])))
        if given:
            some = ", ".join(sorted(given)[:3])
            raise ValueError(f"path: {self.folder} has {len(given)} tensors without a place in this model: {some}")
        pending += self._head(model, wiring, adaptation)
        with torch.no_grad():
            for parameter, tensor in pending:
                parameter.copy_(tensor)

    def _head(self, model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> list[tuple[nn.Parameter, Tensor]]:
        if not self.head:
            return []
        own, given = heads.parameters(model, wiring, adaptation.own_head()), dict(self.head)
        whole = {slot for slot in wiring.slots_of(model) if self.peft.saves(slot)}
        pending = []
        for key, parameter in own:
            if key in given or key.split(".")[0] in whole:
                pending.append((parameter, fitting(self.folder, key, given.pop(key, None), parameter)))
        heads.check_tied(self.folder, model, parts_of(adaptation.own_head(), wiring.slots_of(model)), given, pending)
        return pending


def is_peft(content: Mapping[str, Any]) -> bool:
    """Whether this is the content of PEFT's configuration file."""
    return "peft_type" in content
