"""The files of an adaptation's head, as AdapterHub writes and reads them beside an adapter of any method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.interop.files import fitting, read_json, read_tensors
from fastadapt.models.head import make_head, parts_of
from fastadapt.models.wiring import Wiring
from fastadapt.modules.labels import labels_of
from fastadapt.modules.state import Adaptation, container_of, own_labels

CONFIG = "head_config.json"
WEIGHTS, PICKLED_WEIGHTS = "model_head.safetensors", "pytorch_model_head.bin"
FILES = (CONFIG, WEIGHTS, PICKLED_WEIGHTS)


def files_of(
    model: nn.Module, wiring: Wiring, adaptation: Adaptation, name: str, meta: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """(the files to write, the class of a head that no file can rebuild, of which a warning tells)."""
    head = adaptation.own_head()
    if not rebuildable(model, wiring, adaptation, name):
        return {}, None if head is None else type(head).__name__
    ids, _ = labels_of(container_of(model), adaptation)
    names = {name: i for i, name in ids.items()}
    config = {**meta, "name": None, "config": None, "num_labels": len(ids), "label2id": names}
    return {CONFIG: config, WEIGHTS: dict(parameters(model, wiring, head))}, None


def rebuildable(model: nn.Module, wiring: Wiring, adaptation: Adaptation, name: str) -> bool:
    """Whether there is a head that a file can hold; a warning tells of one that none can."""
    head = adaptation.own_head()
    if head is None or _fits(model, wiring, adaptation):
        return head is not None
    warnings.warn(
        f"the head of {name!r} is a {type(head).__name__} of the user's own, which no file can rebuild: it is not "
        "saved",
        stacklevel=6,
    )
    return False


class StoredHead:
    """A head in a folder.

    Args:
        folder: that may hold one.
        name: of the adaptation, for messages.
        unsaved: the class of a head that was left out of the folder, or None.
    """

    def __init__(self, folder: Path, name: str, unsaved: str | None) -> None:
        self.folder, self.name, self.unsaved = folder, name, unsaved
        self.config: dict[str, Any] = {}
        self.weights: dict[str, Tensor] | None = None
        if (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, PICKLED_WEIGHTS)):
            raise ValueError(f"path: {folder} has {CONFIG} but neither {WEIGHTS} nor {PICKLED_WEIGHTS}")

    def read(self, model: nn.Module, wiring: Wiring) -> int | None:
        """Read it where it fits the model; its number of labels where that differs from the model's own."""
        if self.unsaved:
            warnings.warn(
                f"the head of {self.name!r}, a {self.unsaved}, was not saved; a copy of the model's own is used",
                stacklevel=4,
            )
        weights = read_tensors(self.folder, WEIGHTS, PICKLED_WEIGHTS)
        if weights is None or not wiring.slots_of(model):
            return None
        if (self.folder / CONFIG).is_file():
            self.config = read_json(self.folder / CONFIG)
            theirs = self.config.get("model_class")
            if theirs != type(model).__name__:
                warnings.warn(
                    f"the head in {self.folder} is a {theirs}'s; a copy of this {type(model).__name__}'s own is used",
                    stacklevel=4,
                )
                return None
        self.weights = weights
        own, _ = own_labels(model)
        labels = self.config.get("num_labels", own)
        return labels if own is not None and labels != own else None

    def pending(self, model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> list[tuple[nn.Parameter, Tensor]]:
        """What is to be copied where; raises ``ValueError`` for what does not fit."""
        if self.weights is None:
            return []
        head = adaptation.own_head()
        names = self.config.get("label2id")
        if isinstance(names, dict) and all(isinstance(i, int) for i in names.values()):
            adaptation.label2id = names
        given = dict(self.weights)
        pending = []
        for key, parameter in parameters(model, wiring, head):
            pending.append((parameter, fitting(self.folder, key, given.pop(key, None), parameter)))
        check_tied(self.folder, model, parts_of(head, wiring.slots_of(model)), given, pending)
        return pending


def check_tied(
    folder: Path,
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    given: Mapping[str, Tensor],
    pending: list[tuple[nn.Parameter, Tensor]],
) -> None:
    """Raise unless what is left of a file's head are second names of what was taken, or is tied to an equal base."""
    for key, tensor in given.items():
        slot, _, path = key.partition(".")
        there: Any = parts.get(slot)
        for step in path.split("."):
            there = getattr(there, step, None)
        target = next((t for p, t in pending if p is there), there)
        if not isinstance(target, Tensor):
            raise ValueError(f"path: {folder} has {key}, which the head of {type(model).__name__} has not")
        same = target.shape == tensor.shape and torch.equal(target.detach().cpu().to(tensor.dtype), tensor)
        if not same:
            raise ValueError(f"path: {key} in {folder} is tied to a base that differs from this model's")


def parameters(model: nn.Module, wiring: Wiring, head: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The head's parameters, by the names that the model's own have."""
    parts = parts_of(head, wiring.slots_of(model))
    return [(f"{slot}.{key}", p) for slot, part in parts.items() for key, p in part.named_parameters()]


def _fits(model: nn.Module, wiring: Wiring, adaptation: Adaptation) -> bool:
    """Whether the head has the form of the model's own, up to the number of labels, so that it can be rebuilt."""
    kind = None if adaptation.num_labels == own_labels(model)[0] else adaptation.num_labels
    with torch.random.fork_rng(devices=[]):
        try:
            ours, _ = make_head(model, wiring, kind)
        except ValueError:
            return False

    def form(head: nn.Module) -> dict[str, torch.Size]:
        return {key: p.shape for key, p in parameters(model, wiring, head)}

    return _classes(ours) == _classes(adaptation.own_head()) and form(ours) == form(adaptation.own_head())


def _classes(head: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(m).__name__) for name, m in head.named_modules()]
