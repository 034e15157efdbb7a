"""What an architecture has to say about itself, and how its model is walked.

A sublayer is fused by giving the module a class that subclasses its own (``module.__class__ = ...``): parameters,
names, ``isinstance``, copies, pickles and hooks go on as before, and giving the class back undoes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import transformers
from torch import nn
from transformers import activations

from fastadapt import dispatch
from fastadapt.modules.heads import HeadSlot
from fastadapt.modules.linear import FusedLinear
from fastadapt.modules.routed import RoutedHead
from fastadapt.modules.state import CONTAINER
from fastadapt.modules.sublayers import FusedLayer, FusedOutput, name_activation
from fastadapt.modules.unpad import FusedEncoder
from fastadapt.modules.unseen import Forget, HeadReadsFirst, NoteUnseen, is_watched

for _kind, _name in (
    (activations.NewGELUActivation, "gelu_new"),
    (activations.FastGELUActivation, "gelu_new"),
    (activations.AccurateGELUActivation, "gelu_new"),
    (activations.GELUTanh, "gelu_new"),
    (activations.GELUActivation, "gelu"),
    (activations.SiLUActivation, "silu"),
    (activations.LinearActivation, "none"),
):
    name_activation(_kind, _name)

FusedLayer.returns_tuple = int(transformers.__version__.partition(".")[0]) < 5
_READ_ALL = ("qa_outputs",)  # heads whose softmax is over all positions
_READ_FIRST = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")  # ends of class names


@dataclass(frozen=True)
class Wiring:
    """One architecture.

    Args:
        base: class of the bare model.
        fused: original class -> fused class, matched by exact type; every class that may stand at a path below.
        heads: original class -> class of the head's slot.
        slots: attributes of a model that may hold (a part of) its head.
        encoder: path of what holds the layers in the base model; ``layers``: of their list.
        attention, attention_output, intermediate, output: paths in a layer.
        embeddings: path in the base model; its LayerNorm and dropout are the attributes of these names.
        pooler, projection: paths in the base model of linear layers outside of the encoder, where it has them: the
            pooler's, and that between narrow embeddings and the encoder.
        hub_name: prefix of the base model in AdapterHub's keys.
    """

    base: type[nn.Module]
    fused: Mapping[type, type]
    heads: Mapping[type, type]
    slots: tuple[str, ...]
    hub_name: str
    encoder: str = "encoder"
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    attention_output: str = "attention.output"
    intermediate: str = "intermediate"
    output: str = "output"
    embeddings: str = "embeddings"
    pooler: str = "pooler.dense"
    projection: str = "embeddings_project"
    original: Mapping[type, type] = field(init=False)  # fused class -> original class
    _owners: dict[str, tuple[str, str]] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        original = {new: old for old, new in {**self.fused, **self.heads}.items()}
        object.__setattr__(self, "original", {**original, FusedLinear: nn.Linear})

    def base_of(self, model: nn.Module) -> nn.Module:
        """The bare model in ``model``, or itself."""
        base = model if isinstance(model, self.base) else getattr(model, getattr(model, "base_model_prefix", ""), None)
        if not isinstance(base, self.base):
            # Wrapped by another library: there is one somewhere below.
            found = [m for m in model.modules() if isinstance(m, self.base)]
            if len(found) != 1:
                raise ValueError(
                    f"model: {type(model).__name__} holds {len(found)} {self.base.__name__}; accepted is exactly one"
                )
            base = found[0]
        return base

    def layers_of(self, base: nn.Module) -> list[nn.Module]:
        return list(attrgetter(self.layers)(base))

    def sublayers(self, base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of everything that may be fused, from the input up."""
        embeddings = attrgetter(self.embeddings)(base)
        yield self.embeddings, embeddings
        yield f"{self.embeddings}.LayerNorm", embeddings.LayerNorm
        yield f"{self.embeddings}.dropout", embeddings.dropout
        yield self.encoder, attrgetter(self.encoder)(base)
        for i, layer in enumerate(self.layers_of(base)):
            for path in (self.attention, self.attention_output, self.intermediate, self.output):
                yield f"{self.layers}.{i}.{path}", attrgetter(path)(layer)

    def alone(self, base: nn.Module) -> list[str]:
        """Paths of the linear layers in which parts run outside of sublayers: the pooler's and the embeddings'."""
        found = []
        for path in (self.projection, self.pooler):
            module: nn.Module | None = base
            for step in path.split("."):
                module = None if module is None else module._modules.get(step)
            if module is not None:
                found.append(path)
        return found

    def linears(self, base: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """(path of the sublayer, name of the child, the child) of every linear layer in which a part may run."""
        for path, module in self.sublayers(base):
            for child in ("query", "key", "value", "dense"):
                if module._modules.get(child) is not None:
                    yield path, child, module._modules[child]
        for path in self.alone(base):
            yield path, "", base.get_submodule(path)

    def prefixes_of(self, layers: Iterable[int]) -> tuple[str, ...]:
        """How the paths of what lies in these layers begin."""
        return tuple(f"{self.layers}.{i}." for i in layers)

    def layer_of(self, path: str) -> int | None:
        """The layer in which the sublayer at ``path`` lies; None outside of the layers."""
        found = re.match(rf"{re.escape(self.layers)}\.(\d+)\.", path)
        return None if found is None else int(found[1])

    def owner(self, path: str) -> tuple[str, str]:
        """(path of the sublayer in which the part at ``path`` runs, its path there)."""
        found = self._owners.get(path)
        if found is None:
            found = self._owners[path] = self._owner(path)
        return found

    def _owner(self, path: str) -> tuple[str, str]:
        if path == self.embeddings:
            return f"{path}.LayerNorm", ""
        if path == f"{self.embeddings}.LayerNorm":
            return path, "LayerNorm"
        if path in (self.pooler, self.projection):
            return path, ""
        for sublayer in (self.attention, self.attention_output, self.intermediate, self.output):
            found = re.fullmatch(rf"({re.escape(self.layers)}\.\d+\.{re.escape(sublayer)})(?:\.(.+))?", path)
            if found:
                return found[1], found[2] or ""
        raise ValueError(f"no part runs at {path}")

    def fuse(self, model: nn.Module, base: nn.Module) -> None:
        """Give every sublayer its fused class; what is of an unknown class stays as it is."""
        dispatch.prepare()
        for module in (*(module for _, module in self.sublayers(base)), *self.layers_of(base)):
            fused = self.fused.get(type(module))
            if fused is not None:
                module.__class__ = fused
        encoder = attrgetter(self.encoder)(base)
        if isinstance(encoder, FusedEncoder):
            paths = (self.attention, self.attention_output, self.intermediate, self.output)
            encoder.__dict__["sublayers"] = [attrgetter(*paths)(layer) for layer in self.layers_of(base)]
            head = None if model is base else next((m for m in model.modules() if base in m._modules.values()), None)
            if head is not None and head._modules.keys() & set(_READ_ALL):
                encoder.__dict__["head"] = "all"
            elif head is not None and type(head).__name__.endswith(_READ_FIRST) and not _is_users(head):
                encoder.__dict__["head"] = "first"
                _register_once(head, HeadReadsFirst(encoder, base, reads_first), Forget(encoder))
            _register_once(base, NoteUnseen(encoder), Forget(encoder))

    def open_slots(self, model: nn.Module) -> None:
        for module in self.slots_of(model).values():
            slot = self.heads.get(type(module))
            if slot is not None:
                module.__class__ = slot

    def restore(self, model: nn.Module) -> None:
        """Give every module of the model its original class and forget what ran in it."""
        for module in model.modules():
            for hooks, more in (
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                (module._forward_hooks, module._forward_hooks_always_called),
            ):
                for key in [
                    key for key, hook in hooks.items() if isinstance(hook, NoteUnseen | HeadReadsFirst | Forget)
                ]:
                    del hooks[key]
                    more.pop(key, None)
            original = self.original.get(type(module))
            if original is None:
                continue
            module.__class__ = original
            for attribute in (
                "active",
                "child",
                "active_head",
                "first_layer",
                "adapted",
                "sublayers",
                "head",
                "skips_padding",
                "_views",
                "_mixes",
                "_merged",
            ):
                module.__dict__.pop(attribute, None)

    def slots_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The parts of the model's head, by attribute; none for a bare model."""
        if isinstance(model, self.base):
            return {}
        return {name: model._modules[name] for name in self.slots if model._modules.get(name) is not None}

    def is_adapted(self, base: nn.Module) -> bool:
        """Whether some model's container rules over these sublayers."""
        return getattr(attrgetter(self.embeddings)(base), "adapted", None) is not None

    def unwired(self, model: nn.Module) -> list[str]:
        """What an adaptation would need to run in but can't: outputs and parts of the head of unknown classes."""
        base = self.base_of(model)
        needed = {f"{self.layers}.{i}.{p}" for i in range(len(self.layers_of(base)))
                  for p in (self.attention_output, self.output)}  # fmt: skip
        missing = [
            f"{path} ({type(m).__name__})"
            for path, m in self.sublayers(base)
            if path in needed and (_foreign(m) or (type(m) not in self.fused and not isinstance(m, FusedOutput)))
        ]
        known = {id(base)}
        known |= {id(m) for m in self.slots_of(model).values() if type(m) in self.heads or type(m) in self.original}
        return missing + [
            f"{name} ({type(m).__name__})"
            for name, m in (() if model is base else model.named_children())
            if id(m) not in known and name != CONTAINER and any(True for _ in m.parameters())
        ]


def _is_users(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] not in ("transformers", "fastadapt")


def _is_known(forward: Callable[..., Any]) -> bool:
    """Whether a model's forward is transformers', or accelerate's around it."""
    return (getattr(forward, "__module__", None) or "").partition(".")[0] in ("transformers", "accelerate")


def reads_first(model: nn.Module, base: nn.Module) -> bool:
    """Whether position 0 alone is read of what a sequence classifier's base gives, and nobody else looks at it.

    The reader is the base's pooler, or the head's first part where the base has none. What comes behind it is given one
    position, whatever it is.
    """
    if not _is_known(model.forward):  # put into the instance or the class by the user: it may read what it likes
        return False
    pooler, summary = base._modules.get("pooler"), model._modules.get("sequence_summary")
    if pooler is not None:
        reader = pooler
    elif summary is not None:
        if getattr(model.config, "summary_type", "first") != "first":
            return False
        reader = summary
    else:
        reader = model._modules.get("classifier")
    active = reader.active_head if isinstance(reader, HeadSlot) else None
    runs = active.heads if isinstance(active, RoutedHead) else [active]
    if any(_is_users(reader if head is None else head) for head in runs):
        return False
    return not (is_watched(reader) or is_watched(base))


def _register_once(module: nn.Module, before: NoteUnseen | HeadReadsFirst, after: Forget) -> None:
    if not any(isinstance(other, type(before)) for other in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, always_call=True)


def _foreign(module: nn.Module) -> bool:
    """Whether a sublayer belongs to another library, which puts its own adapters there."""
    kind = type(module)
    return getattr(kind, "foreign", False) or kind.__module__.partition(".")[0] == "adapters"
