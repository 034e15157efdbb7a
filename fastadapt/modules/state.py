"""Where the adaptations of a model live: one container, a registered child of the top-level model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastadapt.modules.active import Active, Part
from fastadapt.modules.merged import Merged

Labels = tuple[dict[int, str], dict[str, int] | None]  # a configuration's id2label and label2id
CONTAINER = "fastadapt"  # the one child that a model gains, and the prefix of its keys


class Branch(nn.Module):
    """A step on the path to a part; it computes nothing."""


class Adaptation(Branch):
    """One named adaptation: its parts under the base's own paths, and its head.

    Args:
        config: what it was made from.
        parts: path in the base model -> what the adaptation owns there; what is no ``Part`` belongs to several.
        head: its head, or None for a model without one.
        trainable: whether activating it makes it train.
        num_labels: width of the head, where the model has such a thing.
        problem_type: what the model's configuration says, or will find out, about this head's loss.
    """

    def __init__(
        self,
        config: Any,
        parts: dict[str, nn.Module],
        head: nn.Module | None,
        *,
        trainable: bool,
        num_labels: int | None,
        problem_type: str | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.trainable = trainable
        self.num_labels = num_labels
        self.problem_type = problem_type
        self.label2id: dict[str, int] | None = None  # the labels' names, where a file gave them
        self._parts: dict[str, Part] | None = None
        self._actives: dict[str, Active] | None = None
        self._in_parts: list[nn.Module] = []
        for path, part in parts.items():
            attach(self, path, part)
        if head is not None:
            self.add_module("head", head)

    def parts(self) -> dict[str, Part]:
        # Walking the tree costs more than all else that switching to a task does, and its parts never change.
        if self._parts is None:
            self._parts = {path: m for path, m in self.named_modules() if isinstance(m, Part)}
        return self._parts

    def actives(self, owner: Callable[[str], tuple[str, str]]) -> dict[str, Active]:
        """What runs in each sublayer, by its path, where this adaptation runs alone; shared, and only read.

        Args:
            owner: path of a part -> (path of the sublayer in which it runs, its path there).
        """
        if self._actives is None:
            self._actives = {}
            for path, part in self.parts().items():
                sublayer, child = owner(path)
                part.join(self._actives.setdefault(sublayer, Active()), child)
        return self._actives

    def own_parameters(self) -> list[nn.Parameter]:
        """Of its parts and its head; as ``parameters()``, without walking the tree."""
        if not self._in_parts:
            self._in_parts = [m for part in self.parts().values() for m in part.modules()]
        head = self.own_head()
        modules = self._in_parts if head is None else [*self._in_parts, *head.modules()]
        return [p for m in modules for p in m._parameters.values() if p is not None]

    def own_head(self) -> nn.Module | None:
        return self._modules.get("head")


def attach(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register ``module`` under a dotted path, making the branches on the way."""
    *way, last = path.split(".")
    for step in way:
        if step not in root._modules:
            root.add_module(step, Branch())
        root = root._modules[step]
    root.add_module(last, module)


class Adaptations(nn.Module):
    """The container. Its children are the adaptations, by name, so that keys read ``fastadapt.<name>.<path>``."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None  # the one whose head runs
        self.summed: tuple[str, ...] = ()  # LoRAs that run with it, in a sum
        self.skipped: tuple[int, ...] = ()
        self.merge: Merged | None = None  # the last one
        self.base_requires_grad: dict[str, bool] = {}  # before the first adaptation froze them
        self.base_problem_type: str | None = None
        self.base_num_labels: int | None = None
        self.base_labels: Labels | None = None  # the configuration's names of them
        self.shown: Labels | None = None  # what it was last made to say
        self.loss_waits = False  # whether a forward made an auxiliary loss that nobody has taken

    route: Any = None  # the Routing in place, while fa.route lasts

    # Children go into _modules directly, and attributes past them: a task may be called "training" or "active".
    def __setattr__(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    @property
    def merged(self) -> Merged | None:
        """What is merged into the base's weights now; a conversion of the model may have taken it out."""
        return self.merge if self.merge is not None and self.merge.live else None

    def add(self, name: str, adaptation: Adaptation) -> None:
        self._modules[name] = adaptation

    def drop(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Adaptation:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all of a model but its adaptations, of which there may be a thousand."""
    yield "", model
    for name, child in model._modules.items():
        if name != CONTAINER and child is not None:
            yield from child.named_modules(prefix=name)


def container_of(model: nn.Module) -> Adaptations | None:
    """The model's container, if it was ever adapted."""
    container = getattr(model, "_modules", {}).get(CONTAINER)
    return container if isinstance(container, Adaptations) else None


def own_labels(model: nn.Module) -> tuple[int | None, str | None]:
    """(number of labels, problem type) of the model's own head, whichever adaptation is active."""
    container = container_of(model)
    if container is not None and container.active is not None:
        return container.base_num_labels, container.base_problem_type
    return model.__dict__.get("num_labels"), getattr(model.config, "problem_type", None)
