"""Merging: LoRAs become a part of the base's weights, in place, and are taken out again without losing a bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from fastadapt.adapt import check_owner, check_unrouted, engage_names, names_of
from fastadapt.config import LoRAConfig
from fastadapt.models import wiring_of
from fastadapt.modules.labels import labels_of
from fastadapt.modules.linear import FusedLinear
from fastadapt.modules.lora import LoRA
from fastadapt.modules.merged import Merged
from fastadapt.modules.state import Adaptations, container_of

if TYPE_CHECKING:  # imports transformers, which importing fastadapt does not
    from fastadapt.models.wiring import Wiring

Model = TypeVar("Model", bound=nn.Module)
Layers = dict[str, tuple[nn.Linear, list[LoRA]]]


def merge(model: Model, name: str | Sequence[str] | None = None, exact: bool = True) -> Model:
    """W += s·BA in place for every target (arXiv:2106.09685, section 4.1), in one pass, rounded once.

    Until :func:`unmerge` or :func:`swap` nothing of the LoRA runs: the forward is the bare model's, over the same
    parameter objects, with the adaptation's head and, where it owns some, its biases. Nothing trains meanwhile. A, B
    and the scale are kept as they are now; what happens to them later does not matter. ``state_dict``,
    ``save_pretrained`` and ``copy.deepcopy`` give the merged weights, and a copy unmerges on its own. ``.to`` and
    ``.half`` and the like unmerge first, where they change dtype or device, or raise and convert nothing, where a
    merged weight was written since.

    Args:
        model: with a LoRA.
        name: of the LoRA, which is activated; None is what is active, in the layers in which it runs; a list of names
            is merged as their sum.
        exact: keep about one byte a weight (a DoRA: a copy of the weight), with which :func:`unmerge` gives back every
            bit. False keeps nothing: the way back is then off by what rounding lost.

    Raises:
        TypeError, ValueError: naming what was wrong: a merge of now, an adaptation that is no LoRA, NaN or infinity in
            W, A or B, weights that are on meta, shared between layers, not contiguous, or of another dtype than
            float32, bfloat16 and float16. The model is then unchanged.
    """
    wiring, container = _checked(model)
    if container.merged is not None:
        raise ValueError(f"merge: {_merged_names(container)} is merged already; accepted are unmerge and swap")
    names, skipped = _chosen(model, container, name)
    layers = _layers(model, wiring, container, names, skipped)
    _check(layers, container, names, exact)
    record = Merged(layers, exact=exact)
    if not _runs(container, layers, names, skipped):
        engage_names(model, wiring, names, skipped)
    _rest(model, wiring, container, record)
    return model


def unmerge(model: Model) -> Model:
    """Take out what is merged; the LoRA runs beside the weights again, and trains if it did.

    After an exact merge every bit of the weights is what it was.

    Args:
        model: after :func:`merge` or :func:`swap`.

    Raises:
        TypeError, ValueError: for a model of no wired architecture or without adaptations, where nothing is merged, and
            where a merged weight was written since.
    """
    _, container = _checked(model)
    if container.merged is None:
        raise ValueError("unmerge: nothing is merged; accepted is a model after merge")
    container.merged.undo()
    return model


def swap(model: Model, name: str | Sequence[str]) -> Model:
    """From the LoRA that is merged now to another, which is merged as exactly; one pass over W for equal targets.

    Args:
        model: after :func:`merge`.
        name: of the other LoRA; a list of names is merged as their sum.

    Raises:
        TypeError, ValueError: as :func:`merge`, and where nothing is merged; the model is then unchanged.
    """
    wiring, container = _checked(model)
    before = container.merged
    if before is None:
        raise ValueError("swap: nothing is merged; accepted is a model after merge")
    if name is None:
        raise TypeError("name: got None; accepted is the name of a LoRA; unmerge gives back the bare weights")
    names = names_of(model, name)
    exact = before.residues is not None
    layers = _layers(model, wiring, container, names, ())
    _check(layers, container, names, exact)
    record = Merged(layers, exact=exact, before=before)
    before.wake()
    engage_names(model, wiring, names, ())
    _rest(model, wiring, container, record)
    return model


def merge_for_good(model: nn.Module, wiring: Wiring) -> None:
    """Put the active LoRA into the base as its own: weights, biases, and the head's values. The way back is lost.

    Raises:
        ValueError: as :func:`merge`; for an adaptation whose head the model's own cannot hold.
    """
    from fastadapt.interop.heads import parameters
    from fastadapt.models.head import parts_of

    container = container_of(model)
    active = (container.active, *container.summed)
    _layers(model, wiring, container, active, container.skipped)
    slots = wiring.slots_of(model)
    head = container[container.active].own_head()
    own = {slot: dict(module.named_parameters()) for slot, module in slots.items()}
    writes: list[tuple[torch.Tensor, torch.Tensor]] = []
    if head is not None and parts_of(head, slots):
        for key, parameter in parameters(model, wiring, head):
            slot, _, path = key.partition(".")
            target = own[slot].get(path)
            if target is None or target.shape != parameter.shape:
                raise ValueError(
                    f"merge: got True, but the head of {container.active!r} is of another form than the model's own; "
                    "accepted is False"
                )
            writes.append((target, parameter))
    base, skipped = wiring.base_of(model), wiring.prefixes_of(container.skipped)
    for name in active:
        for path, part in container[name].parts().items():
            bias = getattr(part, "bias", None)
            if bias is not None and not path.startswith(skipped):
                writes.append((base.get_submodule(path).bias, bias))
    if container.merged is None:
        exact = any(container[n].config.dora for n in active)
        merge(model, None, exact=exact)
    with torch.no_grad():
        for target, value in writes:
            target.copy_(value)
    if head is not None:
        container.base_labels = labels_of(container, container[container.active])
    container.merged.wake()


# -- what is merged where ----------------------------------------------------------------------------------------


def _checked(model: nn.Module) -> tuple[Wiring, Adaptations]:
    wiring, container = wiring_of(model), container_of(model)
    check_owner(model, wiring)
    if container is None:
        raise ValueError(f"model: this {type(model).__name__} has no adaptation; accepted is one with a LoRA")
    check_unrouted(model)
    return wiring, container


def _chosen(model: nn.Module, container: Adaptations, name: object) -> tuple[tuple[str, ...], tuple[int, ...]]:
    active = () if container.active is None else (container.active, *container.summed)
    if name is not None:
        names = names_of(model, name)
        return names, container.skipped if names == active else ()
    if not active:
        raise ValueError(f"name: got None, but no adaptation is active; known are {', '.join(container) or 'none'}")
    return active, container.skipped


def _layers(
    model: nn.Module, wiring: Wiring, container: Adaptations, names: tuple[str, ...], skipped: tuple[int, ...]
) -> Layers:
    prefixes, layers = wiring.prefixes_of(skipped), {}
    modules = dict(wiring.base_of(model).named_modules(remove_duplicate=False))
    for name in names:
        config = container[name].config
        if not isinstance(config, LoRAConfig):
            raise ValueError(
                f"name: got {name!r}, a {type(config).__name__}'s, which merges into no weight: what it adds is "
                "no product of its input with a matrix; accepted are LoRAs (others run beside the weights, and "
                "activate switches between them)"
            )
        for path, part in container[name].parts().items():
            if isinstance(part, LoRA) and not path.startswith(prefixes):
                layers.setdefault(path, (modules[path], []))[1].append(part)
    if not layers:
        raise ValueError(f"name: {', '.join(names)} runs in no layer; accepted is a LoRA that does")
    return layers


def _check(layers: Layers, container: Adaptations, names: tuple[str, ...], exact: bool) -> None:
    if exact is not True and exact is not False:
        raise TypeError(f"exact: got {exact!r}; accepted are True and False")
    if not exact and any(container[name].config.dora for name in names):
        raise ValueError(
            "exact: got False, but a DoRA scales whole rows of the weight, which only a copy of it can undo; accepted "
            "is True"
        )
    seen: dict[int, str] = {}
    for path, (module, _) in layers.items():
        if type(module) not in (nn.Linear, FusedLinear):
            raise ValueError(f"{path} is a {type(module).__name__}; accepted is a plain Linear")
        if module.weight.is_inference():
            raise ValueError(f"{path}: its weight was made under inference_mode, and cannot be written in place")
        if id(module.weight) in seen:
            raise ValueError(f"{path}: its weight is that of {seen[id(module.weight)]} too; accepted is one of its own")
        seen[id(module.weight)] = path


def _runs(container: Adaptations, layers: Layers, names: tuple[str, ...], skipped: tuple[int, ...]) -> bool:
    """Whether exactly these run now: engaging them again would take as long as a tenth of the merge."""
    return (
        (container.active, *container.summed) == names
        and container.skipped == skipped
        and all(type(module) is FusedLinear and module.active is not None for module, _ in layers.values())
    )


def _above(model: nn.Module, wiring: Wiring, record: Merged) -> dict[nn.Module, list[nn.Linear]]:
    """Every module that has merged layers below it, with these."""
    base = wiring.base_of(model)
    found = {model: list(record.modules)}
    for path, layer in zip(record.paths, record.modules, strict=True):
        module = base
        for step in path.split("."):
            if module is not model:
                found.setdefault(module, []).append(layer)
            module = module._modules[step]
    return found


def _rest(model: nn.Module, wiring: Wiring, container: Adaptations, record: Merged) -> None:
    """Let nothing of the LoRA run or train. Nothing here can fail."""
    record.frozen = [p for p in container.parameters() if p.requires_grad]
    for parameter in record.frozen:
        parameter.requires_grad_(False)
    record.rest(_above(model, wiring, record))
    container.merge = record


def _merged_names(container: Adaptations) -> str:
    return " + ".join(map(repr, (container.active, *container.summed)))
