"""An adaptation's own head: a copy of the model's, a new one of another width, or a module given by the user."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastadapt.models.wiring import Wiring
from fastadapt.modules.heads import Place, tie
from fastadapt.modules.state import base_modules, own_labels


def make_head(model: nn.Module, wiring: Wiring, head: int | nn.Module | None) -> tuple[nn.Module | None, int | None]:
    """(the head, how many labels it has where the model counts them); the model is only read.

    Raises:
        TypeError, ValueError: where ``head`` does not fit the model.
    """
    slots = wiring.slots_of(model)
    if isinstance(head, bool) or not (head is None or isinstance(head, (int, nn.Module))):
        raise TypeError(f"head: got {head!r}; accepted are None, a number of labels and an nn.Module")
    if not slots:
        if head is not None:
            raise ValueError(f"head: got {head!r}, but {type(model).__name__} has no head; accepted is None")
        return None, None
    num_labels, _ = own_labels(model)
    if isinstance(head, nn.Module):
        if len(slots) > 1:
            raise ValueError(f"head: got a module, but the model's is made of {', '.join(slots)}; accepted is None")
        theirs = {id(p) for p in model.parameters()}
        if any(m is head for m in model.modules()) or any(id(p) in theirs for p in head.parameters()):
            raise ValueError("head: got a module of this very model; accepted is one with parameters of its own")
        return head, _width(head) if num_labels is not None else None
    if isinstance(head, int):
        return _new_head(model, wiring, slots, head), head
    parts = copy_head(model, wiring, slots)
    return (next(iter(parts.values())) if len(parts) == 1 else nn.ModuleDict(parts)), num_labels


def parts_of(head: nn.Module | None, slots: dict[str, nn.Module]) -> dict[str, nn.Module | None]:
    """Slot -> the part of ``head`` that runs there."""
    if head is None or len(slots) == 1:
        return dict.fromkeys(slots, head)
    return {name: head[name] for name in slots}


def copy_head(model: nn.Module, wiring: Wiring, slots: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the model's own head, of the original classes.

    What is tied to the rest of the model (a language-model head's matrix is the word embeddings) stays tied, and is no
    parameter of the copy: it is neither trained nor stored with it. The copy reads it where the model's own head does,
    and a second name for a tensor where the first one is.
    """
    inside = {id(m) for slot in slots.values() for m in slot.modules()}
    others = [m for _, m in base_modules(model) if id(m) not in inside]
    outside = {id(p) for m in others for p in m._parameters.values() if p is not None}
    memo: dict[int, object] = {id(p): p for slot in slots.values() for p in slot.parameters() if id(p) in outside}
    for slot in slots.values():
        active = slot.__dict__.get("active_head")
        if active is not None:
            memo[id(active)] = None  # another adaptation's head is not copied along
    first: dict[int, Place] = {}
    copies = {}
    for name, slot in slots.items():
        part = copy.deepcopy(slot, memo)
        part.__class__ = wiring.original.get(type(part), type(part))
        part.__dict__.pop("active_head", None)
        for path, module in part.named_modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                own = (module, "", key)
                place = (slot, path, key) if id(parameter) in outside else first.setdefault(id(parameter), own)
                if place is not own:
                    tie(module, key, place)
        copies[name] = part
    return copies


def _new_head(model: nn.Module, wiring: Wiring, slots: dict[str, nn.Module], labels: int) -> nn.Module:
    if labels < 1:
        raise ValueError(f"head: got {labels}; accepted is a number of labels of at least 1")
    own, _ = own_labels(model)
    slot = next(iter(slots.values()))
    last = last_linear(slot)
    if own is None or len(slots) > 1 or "classifier" not in slots or last is None or last[1].out_features != own:
        raise ValueError(
            f"head: got {labels}, but the head of {type(model).__name__} has no free number of labels; "
            "accepted are None and a module"
        )
    head = next(iter(copy_head(model, wiring, slots).values()))
    name, old = last
    kind = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = nn.Linear(old.in_features, labels, bias=old.bias is not None, **kind)
    if name:
        head.set_submodule(name, new)
    else:
        head = new
    std = model.config.initializer_range
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return head


def last_linear(head: nn.Module) -> tuple[str, nn.Linear] | None:
    """(path, module) of the head's last linear layer."""
    linears = [(name, m) for name, m in head.named_modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears else None


def _width(head: nn.Module) -> int | None:
    last = last_linear(head)
    return None if last is None else last[1].out_features
