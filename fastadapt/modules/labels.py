"""What a model and its configuration say of the head that runs: how many labels, their names, its kind of loss."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastadapt.modules.state import Adaptation, Adaptations, Labels


class Shown(dict):
    """One of an adaptation's ``Labels`` in the configuration of a model.

    What writes a configuration takes a copy of its attributes (``to_dict``), and gets the base's instead: the weights
    that ``save_pretrained`` puts beside it are the base's. In a copy or pickle of the model it stays what it is.
    """

    def __init__(self, names: Mapping[Any, Any], base: dict[Any, Any] | None, config: Any) -> None:
        super().__init__(names)
        self.base, self._config = base, weakref.ref(config)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any] | None:
        config = memo.get(id(self._config()))  # its copy, where that is being made
        return copy.copy(self.base) if config is None else Shown(self, copy.deepcopy(self.base, memo), config)

    def __reduce__(self) -> tuple[Any, ...]:
        config = self._config()
        return (dict, (dict(self),)) if config is None else (Shown, (dict(self), self.base, config))


def labels_of(container: Adaptations, adaptation: Adaptation | None) -> Labels:
    """The names of a head's labels: its own; the base's, where they are as many; else transformers' LABEL_0 and so on.

    The base's themselves are not a copy.
    """
    if adaptation is None:
        return container.base_labels
    names, count = adaptation.label2id, adaptation.num_labels
    if names and sorted(names.values()) == list(range(len(names) if count is None else count)):
        return {i: name for name, i in sorted(names.items(), key=lambda item: item[1])}, dict(names)
    if count in (None, len(container.base_labels[0])):
        return container.base_labels
    return numbered(count)


def numbered(count: int) -> Labels:
    ids = {i: f"LABEL_{i}" for i in range(count)}
    return ids, {name: i for i, name in ids.items()}


def show(model: nn.Module, container: Adaptations, name: str | None, labels: Labels, problem_type: str | None) -> None:
    """Let the model count the labels of this adaptation's head, and its configuration say the rest."""
    config = model.config
    if "num_labels" in model.__dict__:
        own = None if name is None else container[name].num_labels
        model.num_labels = container.base_num_labels if own is None else own
        container.shown = (copy.copy(labels[0]), copy.copy(labels[1]))
        if labels is not container.base_labels:
            labels = tuple(Shown(*each, config) for each in zip(labels, container.base_labels, strict=True))
        config.id2label, config.label2id = labels
    if hasattr(config, "problem_type"):
        config.problem_type = problem_type


def remember(model: nn.Module, container: Adaptations) -> None:
    """Keep what the configuration says of the active head: the model takes the problem type from the first labels it
    sees, and the user may have named the labels."""
    config = model.config
    problem_type, labels = getattr(config, "problem_type", None), (config.id2label, config.label2id)
    renamed = labels != container.shown
    if container.active is None:
        container.base_problem_type = problem_type
        if renamed:
            container.base_labels = labels
    elif container.active in container:
        adaptation = container[container.active]
        adaptation.problem_type = problem_type
        if renamed and container.shown is not None:
            adaptation.label2id = {name: i for i, name in config.id2label.items()}
