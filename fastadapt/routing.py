"""``route``: a batch whose rows have adaptations of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastadapt.adapt import (
    check_known_name,
    check_owner,
    check_unmerged,
    engage_names,
    layers_to_skip,
)
from fastadapt.config import FusionConfig, LoRAConfig, MAMConfig, MaskedAdapterConfig, PrefixConfig
from fastadapt.models import wiring_of
from fastadapt.modules.active import Active
from fastadapt.modules.labels import labels_of, numbered, remember, show
from fastadapt.modules.linear import engage
from fastadapt.modules.routed import BeginRouted, CountChoices, Fork, Routed, RoutedHead, Table
from fastadapt.modules.state import Adaptation, Adaptations, Labels, container_of
from fastadapt.modules.step import Step, set_hooks

if TYPE_CHECKING:
    from fastadapt.models.wiring import Wiring


class Routing:
    """What :func:`route` put in place; :meth:`assign` gives the rows other names of the same set."""

    def __init__(
        self,
        model: nn.Module,
        wiring: Wiring,
        container: Adaptations,
        by_text: Sequence[tuple[str | None, ...]],
        skipped: tuple[int, ...],
    ) -> None:
        self._model, self._wiring, self._container, self._skipped = model, wiring, container, skipped
        self._outer: Routing | None = container.route
        self._active = tuple(n for n in (container.active, *container.summed) if n is not None)
        self._flags = [(p, p.requires_grad) for name in self._active for p in _parameters(container[name])]
        self._trains = False
        self._counts = [len(names) for names in by_text]
        names = [name for of_text in by_text for name in of_text]
        self.names = tuple(dict.fromkeys(names))  # by slot
        steps: dict[int, Step] = {}
        for adaptation in self._adaptations():
            steps |= {id(part.step): part.step for part in adaptation.parts().values() if part.step is not None}
        device = next(wiring.base_of(model).parameters()).device
        texts = [i for i, count in enumerate(self._counts) for _ in range(count)]
        self.table = Table(
            [self.names.index(name) for name in names],
            device,
            list(steps.values()),
            texts if len(texts) > len(by_text) else None,
        )
        masked = [n for n in self.names if n is not None and isinstance(container[n].config, MaskedAdapterConfig)]
        if masked:
            self.table.inference_only = f"{masked[0]!r} is of a MaskedAdapterConfig, which is routed at inference alone"
        types = {t for name in self.names if (t := _problem_type(container, name)) is not None}
        self._problem_type = next(iter(types), None)

    def assign(self, names: Sequence[str | Sequence[str | None] | None]) -> None:
        """Give the rows other names, as many as before and of the same set, in place.

        A captured graph or compiled code follows without being made anew where no adapter takes the rows apart
        (:func:`route`).

        Raises:
            ValueError: for another number of names, or one that is not in :attr:`names`; nothing is changed.
        """
        by_text = _by_text(names)
        counts = [len(of_text) for of_text in by_text]
        if counts != self._counts:
            given, before = (len(c) if set(c) == {1} else c for c in (counts, self._counts))
            raise ValueError(f"names: got {given}; accepted are {before}, as many as before")
        names = [name for of_text in by_text for name in of_text]
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"names: got {unknown[0]!r}; accepted here are {', '.join(map(repr, self.names))}")
        self.table.assign([self.names.index(name) for name in names])

    def _adaptations(self) -> list[Adaptation]:
        return [self._container[name] for name in self.names if name is not None]

    def _engage(self) -> None:
        """Point every sublayer and slot of the model's head at all that runs there. Nothing here can fail."""
        from fastadapt.models.head import parts_of

        model, wiring, table = self._model, self._wiring, self.table
        base, skipped = wiring.base_of(model), wiring.prefixes_of(self._skipped)
        by_path: dict[str, list[Active]] = {}
        nothing = Active()
        for slot, name in enumerate(self.names):
            for path, active in () if name is None else self._container[name].actives(wiring.owner).items():
                if path.startswith(skipped):
                    continue
                if path not in by_path:
                    by_path[path] = [nothing] * len(self.names)
                by_path[path][slot] = active
        routed = {path: Routed(table, actives) for path, actives in by_path.items()}
        for path, module in wiring.sublayers(base):
            if hasattr(type(module), "active"):
                module.__dict__["active"] = routed.get(path)
            if hasattr(type(module), "first_layer"):
                module.__dict__["first_layer"] = wiring.layers_of(base)[0]
                module.__dict__["adapted"] = bool(by_path)
        for sublayer, child, module in wiring.linears(base):
            engage(module, routed.get(sublayer), child)
        slots = wiring.slots_of(model)
        heads = [None if name is None else self._container[name].own_head() for name in self.names]
        parts = [parts_of(head, slots) for head in heads]
        for name, module in slots.items():
            of_slots = [part[name] for part in parts]
            module.__dict__["active_head"] = RoutedHead(table, of_slots, module)
        set_hooks(model, base, ())
        self._hooks = [base.register_forward_pre_hook(BeginRouted(table, self._let_train), with_kwargs=True)]
        if model is not base:
            self._hooks.append(model.register_forward_pre_hook(CountChoices(table), with_kwargs=True))
        if table.texts is not None:
            fork = Fork(table)
            for module in self._forks(base, by_path):
                self._hooks.append(module.register_forward_pre_hook(fork, with_kwargs=True))
        show(model, self._container, self.names[0], self._labels(), self._problem_type)

    def _labels(self) -> Labels:
        """The names of the labels where all rows agree on them; else they are numbered."""
        first, *others = (labels_of(self._container, None if n is None else self._container[n]) for n in self.names)
        return first if all(each == first for each in others) else numbered(len(first[0]))

    def _let_train(self) -> None:
        """Where gradients are on, let those parameters require one that the rows train, and no other."""
        if self._trains or not torch.is_grad_enabled():
            return
        self._trains = True
        routed = dict.fromkeys((*self.names, *(() if self._outer is None else self._outer.names)))
        own = {name: self._container[name].own_parameters() for name in routed if name is not None}
        self._flags = [(p, p.requires_grad) for found in own.values() for p in found] + self._flags
        trains = {id(p) for name in self.names if name in own and self._container[name].trainable for p in own[name]}
        for p, _ in self._flags:
            if p.requires_grad != (id(p) in trains):
                p.requires_grad_(not p.requires_grad)

    def _forks(self, base: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
        """What is given a row a task instead of a row a text: the layers from the lowest one with something adapted."""
        wiring, layers = self._wiring, self._wiring.layers_of(base)
        inside = [wiring.layer_of(path) for path in paths if path != wiring.pooler]
        return [base] if None in inside else layers[min(inside, default=len(layers) - 1) :]

    def _disengage(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._remember()

    def _remember(self) -> None:
        """Keep the problem type that the model found out in the labels: it is each head's own."""
        self._problem_type = getattr(self._model.config, "problem_type", None)
        for name in self.names:
            owner = None if name is None else self._container[name]
            if owner is None:
                self._container.base_problem_type = self._problem_type
            else:
                owner.problem_type = self._problem_type


@contextmanager
def route(
    model: nn.Module, names: Sequence[str | Sequence[str | None] | None], skip_layers: Iterable[int] = ()
) -> Iterator[Routing]:
    """Run row i of each batch with adaptation ``names[i]``, in inference and training, while the context lasts.

    Every row has the bottlenecks, LoRAs, biases, LayerNorms and head of its own adaptation; None is the bare base with
    its own head. All rows share each sublayer's product, and a sublayer is as many ops as with one adaptation: the
    slots of the rows are read from a table that is made once, here, on the model's device. Adapters of more than one
    form in a batch (one that reads the sublayer's output with one of a ``PfeifferConfig``), and those with gates or new
    LayerNorms, take their rows apart instead.

    Where ``names[i]`` is a tuple, text i has each of these tasks: the outputs (and the labels, where some are given)
    are a row a task, text by text, and the layers below the lowest one that any of the tasks adapts run once for all of
    them (Rücklé et al. 2021, arXiv:2010.11918, section 4). ``AdapterDrop``, ``leave_out`` and ``skip_layers`` make that
    trunk; LayerNorms and biases of the embeddings leave none. Hidden states of the trunk have a row a text.

    In training, each named adaptation that was added for training gets the gradients of its rows. ``backward`` belongs
    inside the context: leaving it gives every parameter its ``requires_grad`` back, and a checkpointed layer is
    computed again with what is active then. Entered with gradients off, the context leaves every ``requires_grad`` as
    it is until a forward with gradients on.

    Compiled code and captured graphs keep the names of the entry; :meth:`Routing.assign` on what the context yields
    changes which row has which. A batch of another length, or another set of names, is a new ``route``.

    Contexts nest, and the inner one's names count. Verbs that change the model (``adapt``, ``activate``, ``remove``,
    ``merge``, ``unload``, ...), copies and pickles are refused inside.

    Args:
        model: with adaptations, none of them merged.
        names: one a row of the batch, of adaptations of this model, or None; or a tuple of such names.
        skip_layers: as in :func:`fastadapt.activate`, for all rows.

    Raises:
        TypeError, ValueError: for unknown names, methods that are not routed (prefixes, fusions, DoRA, and masked
            adapters in training), heads of unequal width or problem type; the model is unchanged. A forward of a batch
            of another length raises too.
    """
    wiring, container = wiring_of(model), container_of(model)
    by_text = _checked(model, wiring, container, names)
    routing = Routing(model, wiring, container, by_text, layers_to_skip(model, wiring, skip_layers))
    before = routing._outer
    problem_type = getattr(model.config, "problem_type", None)
    if before is not None:
        before._disengage()
    container.route = routing
    try:
        routing._let_train()
        routing._engage()
        yield routing
    finally:
        routing._disengage()
        container.route = before
        if before is not None:
            before._engage()
        else:
            if hasattr(model.config, "problem_type"):
                model.config.problem_type = _settled(container, container.active, problem_type)
            engage_names(model, wiring, routing._active, container.skipped)
        for p, flag in routing._flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


def _settled(container: Adaptations, name: str | None, before: str | None) -> str | None:
    """The problem type of the active head, which a routed batch may have found out."""
    found = _problem_type(container, name)
    return before if found is None else found


def _parameters(adaptation: Adaptation) -> list[nn.Parameter]:
    from fastadapt.models.methods.fusion import borrowed_sites

    borrowed = [p for part in adaptation.parts().values() for site in borrowed_sites(part) for p in site.parameters()]
    return [*adaptation.parameters(), *borrowed]


def _problem_type(container: Adaptations, name: str | None) -> str | None:
    return container.base_problem_type if name is None else container[name].problem_type


def _checked(
    model: nn.Module, wiring: Wiring, container: Adaptations | None, names: Any
) -> list[tuple[str | None, ...]]:
    """The names of every text; raises for what cannot be routed."""
    by_text = _by_text(names)
    distinct = list(dict.fromkeys(name for of_text in by_text for name in of_text))
    for name in distinct:
        if name is not None:
            check_known_name(model, name)
    if container is None:
        raise ValueError("model: holds no adaptations; accepted is one after adapt or load")
    check_owner(model, wiring)
    check_unmerged(model)
    if container.route is None:
        remember(model, container)
    else:
        container.route._remember()
    for name in distinct:
        reason = None if name is None else refusal(container[name].config, model.training)
        if reason is not None:
            raise ValueError(
                f"names: {name!r} {reason}; accepted are bottleneck adapters, LoRAs, BitFit, own LayerNorms and heads"
            )
    _check_heads(model, wiring, container, distinct)
    return by_text


def _by_text(names: Any) -> list[tuple[str | None, ...]]:
    """The names of every text, where one alone stands for itself."""
    accepted = "accepted is a list with a name, None, or a tuple of them for each row of the batch"
    if isinstance(names, (str, set, frozenset)) or names is None:
        raise TypeError(f"names: got {names!r}; {accepted}")
    try:
        by_text = [tuple(of_text) if isinstance(of_text, (tuple, list)) else (of_text,) for of_text in names]
    except TypeError:
        raise TypeError(f"names: got {names!r}; {accepted}") from None
    if not by_text or not all(by_text):
        raise ValueError(f"names: got {names!r}; {accepted}, and at least one")
    for of_text in by_text:
        for name in of_text:
            if name is not None and not isinstance(name, str):
                raise TypeError(f"names: got {name!r}; {accepted}")
    return by_text


def refusal(config: Any, training: bool) -> str | None:
    """Why a method cannot be routed, as the rest of a sentence about it, or None."""
    if isinstance(config, (PrefixConfig, MAMConfig, FusionConfig)):
        return f"is of a {type(config).__name__}, which is not routed"
    if isinstance(config, LoRAConfig) and config.dora:
        return "is a DoRA, which is not routed"
    if isinstance(config, MaskedAdapterConfig) and training:
        return "is of a MaskedAdapterConfig, which is routed at inference alone"
    return None


def _check_heads(model: nn.Module, wiring: Wiring, container: Adaptations, names: list[str | None]) -> None:
    from fastadapt.models.head import last_linear, parts_of

    slots = wiring.slots_of(model)
    widths: dict[int | None, str | None] = {}
    for name in names:
        head = None if name is None else container[name].own_head()
        for slot, part in parts_of(head, slots).items():
            last = last_linear(slots[slot] if part is None else part)
            if last is not None:
                widths.setdefault((slot, last[1].out_features), name)
    for slot in slots:
        of_slot = {width: name for (at, width), name in widths.items() if at == slot}
        if len(of_slot) > 1:
            given = ", ".join(f"{name!r} of {width}" for width, name in of_slot.items())
            raise ValueError(f"names: have heads of unequal width ({given}); accepted are heads of one width")
    types = {t: name for name in reversed(names) if (t := _problem_type(container, name)) is not None}
    if len(types) > 1:
        given = ", ".join(f"{name!r} of {kind}" for kind, name in types.items())
        raise ValueError(f"names: have heads of unequal problem types ({given}); accepted are heads of one")
