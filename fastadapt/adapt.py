"""The verbs: they act on a plain Hugging Face model, in place, and return it unless they report.

Each checks everything first and changes the model after, so that one that raises leaves the model as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fastadapt import dispatch
from fastadapt.models import wiring_of
from fastadapt.modules.state import CONTAINER, Adaptation, Adaptations, container_of, own_labels

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Put the fused sublayers into a model; nothing else changes. ``restore`` takes them out.

    Args:
        model: a Hugging Face model of a wired architecture, bare or with any head.

    Raises:
        TypeError, ValueError: for what is no such model, listing the wired architectures.
    """
    wiring = wiring_of(model)
    wiring.fuse(wiring.base_of(model))
    return model


def restore(model: Model) -> Model:
    """Give every sublayer its original class; the original code runs again, to the last bit.

    Raises:
        ValueError: while the model holds adaptations, which the original sublayers cannot run: ``unload`` it.
    """
    wiring = wiring_of(model)
    held = adaptations(model)
    if held:
        raise ValueError(f"model: holds adaptations ({', '.join(held)}); accepted is one without, so call unload first")
    return unload(model) if container_of(model) is not None else _restored(model, wiring)


def _restored(model: Model, wiring: Any) -> Model:
    wiring.restore(model)
    return model


def adapt(model: Model, config: Any, name: str = "default", head: int | nn.Module | None = None) -> Model:
    """Add a named adaptation, activate it, and make trainable what its method trains; the base is frozen.

    Args:
        model: a Hugging Face model of a wired architecture, bare or with any head.
        config: ``HoulsbyConfig``, ``PfeifferConfig``, ``ParallelConfig`` or another ``BottleneckConfig``.
        name: of the adaptation; not in use yet, without dots (it is a part of parameters' names).
        head: None gives the adaptation a copy of the model's own head, an int a new one of that many labels, a
            module is used as it is.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; the model is unchanged.
    """
    install(model, config, name, head, trainable=True)
    return model


def install(
    model: nn.Module,
    config: Any,
    name: str,
    head: int | nn.Module | None,
    *,
    trainable: bool,
    prepare: Any = None,
) -> None:
    """:func:`adapt` for adaptations made or read; ``prepare`` sees the new one before the model does."""
    from fastadapt.models.head import make_head
    from fastadapt.models.methods import sites_for

    wiring = wiring_of(model)
    base = wiring.base_of(model)
    check_new_name(model, name)
    if base is not model and wiring.slots_of(model) == {} and getattr(model, model.base_model_prefix, None) is not base:
        raise ValueError(
            f"model: got {type(model).__name__}, which wraps the model it adapts; accepted is that model itself"
        )
    missing = wiring.unwired(model)
    if missing:
        raise ValueError(
            f"model: no fused class for {', '.join(missing)}; accepted are the classes of {wiring.base.__name__}"
        )
    if container_of(model) is None and any(getattr(m, "active_site", None) is not None for m in base.modules()):
        raise ValueError(
            "model: its sublayers run an adaptation of another model around or inside it; accepted is one without, so "
            "call unload on that one first"
        )
    sites = sites_for(config, wiring, base)
    own_head, num_labels = make_head(model, wiring, head)
    # A head of another width has to find its own problem type; the model does that at the first labels.
    base_labels, base_problem_type = own_labels(model)
    adaptation = Adaptation(
        config,
        sites,
        own_head,
        trainable=trainable,
        num_labels=num_labels,
        problem_type=base_problem_type if num_labels in (None, base_labels) else None,
    )
    if prepare is not None:
        prepare(adaptation)
    adaptation.train(model.training)

    container = container_of(model)
    if container is None:
        container = Adaptations()
        container.base_num_labels, container.base_problem_type = base_labels, base_problem_type
        container.train(model.training)
        model.add_module(CONTAINER, container)
    for key, parameter in base_parameters(model):
        container.base_requires_grad.setdefault(key, parameter.requires_grad)
        parameter.requires_grad_(False)
    wiring.fuse(base)
    wiring.open_slots(model)
    container.add(name, adaptation)
    _engage(model, wiring, name, ())


def activate(model: Model, name: str | None, skip_layers: Iterable[int] = ()) -> Model:
    """Choose which adaptation runs and, if it was added for training, which trains.

    Args:
        name: of an adaptation of this model; None is the bare base with its own head.
        skip_layers: layers, counted from 0, in which the bare base runs (with its own LayerNorms).

    Raises:
        TypeError, ValueError: naming the argument and the known names or layers; the model is unchanged.
    """
    wiring = wiring_of(model)
    container = container_of(model)
    if isinstance(name, (list, tuple, set)):
        raise TypeError(
            f"name: got {name!r}; accepted is one name or None: bottleneck adaptations have no sum, mixing them takes "
            "a FusionConfig"
        )
    if name is not None:
        check_known_name(model, name)
    count = len(wiring.layers_of(wiring.base_of(model)))
    try:
        skipped = tuple(sorted(set(skip_layers)))
    except TypeError:
        raise TypeError(f"skip_layers: got {skip_layers!r}; accepted are layer numbers") from None
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in skipped):
        raise ValueError(f"skip_layers: got {skip_layers!r}; accepted are layers 0 to {count - 1}")
    if container is not None:
        _engage(model, wiring, name, skipped)
    return model


def _engage(model: nn.Module, wiring: Any, name: str | None, skipped: tuple[int, ...]) -> None:
    """Point every sublayer and slot at what runs there. Nothing here can fail."""
    from fastadapt.models.head import parts_of

    container = container_of(model)
    base = wiring.base_of(model)
    _remember_problem_type(model, container)
    adaptation = None if name is None else container[name]
    sites = {} if adaptation is None else adaptation.sites()
    prefixes = tuple(f"{wiring.layers}.{i}." for i in skipped)
    running = {path: site for path, site in sites.items() if not path.startswith(prefixes or ("\0",))}
    for path, module in wiring.sublayers(base):
        key = path.removesuffix(".LayerNorm") if path.startswith(wiring.embeddings) else path
        if hasattr(type(module), "active_site"):
            module.__dict__["active_site"] = running.get(key)
        if hasattr(type(module), "first_layer"):
            module.__dict__["first_layer"] = wiring.layers_of(base)[0]
            module.__dict__["adapted"] = adaptation is not None
    slots = wiring.slots_of(model)
    own_head = None if adaptation is None else adaptation.own_head()
    for slot, part in parts_of(own_head, slots).items():
        slots[slot].__dict__["active_head"] = part

    for other in container:
        container[other].requires_grad_(False)
    if adaptation is not None and adaptation.trainable:
        adaptation.requires_grad_(True)
        for path, site in sites.items():
            site.requires_grad_(path in running)
    container.active, container.skipped = name, skipped
    if "num_labels" in model.__dict__:
        own = container.base_num_labels if adaptation is None else adaptation.num_labels
        model.num_labels = container.base_num_labels if own is None else own
    if hasattr(model.config, "problem_type"):
        model.config.problem_type = container.base_problem_type if adaptation is None else adaptation.problem_type


def _remember_problem_type(model: nn.Module, container: Adaptations) -> None:
    # A model finds its problem type in the first labels it sees, and keeps it; each head has its own.
    problem_type = getattr(model.config, "problem_type", None)
    if container.active is None:
        container.base_problem_type = problem_type
    elif container.active in container:
        container[container.active].problem_type = problem_type


def adaptations(model: nn.Module) -> list[str]:
    """Names of the model's adaptations, in the order in which they were added."""
    container = container_of(model)
    return [] if container is None else list(container)


def remove(model: Model, name: str) -> Model:
    """Drop one adaptation; where it is the active one, the bare base runs. The base stays frozen until ``unload``.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    check_known_name(model, name)
    wiring, container = wiring_of(model), container_of(model)
    if container.active == name:
        _engage(model, wiring, None, ())
    container.drop(name)
    return model


def unload(model: Model, merge: bool = False) -> Model:
    """Give back a plain model: original classes, no adaptation, every ``requires_grad`` as before the first.

    Raises:
        ValueError: with ``merge=True`` while an adaptation with a nonlinearity is active: it is no change of a weight.
    """
    wiring, container = wiring_of(model), container_of(model)
    if merge and container is not None and container.active is not None:
        kind = type(container[container.active].config).__name__
        raise ValueError(f"merge: got True, but a {kind} merges into no weight; accepted is False")
    if container is not None:
        _engage(model, wiring, None, ())
        for key, parameter in base_parameters(model):
            if key in container.base_requires_grad:
                parameter.requires_grad_(container.base_requires_grad[key])
        delattr(model, CONTAINER)
    return _restored(model, wiring)


def save(model: Model, path: str | os.PathLike[str], name: str | None = None, format: str | None = None) -> Model:
    """Write one adaptation into a folder: in AdapterHub's format, safetensors, whole or not at all.

    What that format cannot hold (Houlsby's LayerNorms) goes to ``fastadapt.json`` and ``fastadapt.safetensors`` in the
    same folder, and a warning says that AdapterHub would compute something else.

    Args:
        path: of the folder; made where it does not exist.
        name: of the adaptation; None is the active one.
        format: ``"adapterhub"``, or None for the one that fits.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; nothing is written.
    """
    from fastadapt.interop import adapterhub
    from fastadapt.interop.formats import FORMATS

    wiring = wiring_of(model)
    container = container_of(model)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: got {format!r}; accepted are None and {', '.join(map(repr, FORMATS))}")
    if name is None and (container is None or container.active is None):
        known = ", ".join(adaptations(model)) or "none"
        raise ValueError(f"name: got None, but no adaptation is active; known are {known}")
    name = container.active if name is None else name
    check_known_name(model, name)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path: got {str(path)!r}, which is a file; accepted is a folder")
    adapterhub.save(model, wiring, container[name], folder, name)
    return model


def load(
    model: Model, path: str | os.PathLike[str], name: str | None = None, trainable: bool = False
) -> Model:
    """Read an adaptation from a folder, of a format told by its content, and activate it; the base is frozen.

    Args:
        path: of a folder that this library's ``save`` or AdapterHub's ``save_adapter`` wrote.
        name: for the adaptation here; None is the one in the file.
        trainable: whether it trains while it is active.

    Raises:
        TypeError, ValueError: for files that are missing, truncated or corrupted, hold NaN, or do not fit the model
            (hidden size, layers, architecture), and for names as in ``adapt``; the model is unchanged.
    """
    from fastadapt.interop.formats import open_folder

    wiring = wiring_of(model)
    if name is not None:
        check_new_name(model, name)
    folder = open_folder(path)
    folder.check(model)
    head = folder.read_head(model, wiring)
    install(
        model,
        folder.config,
        folder.name if name is None else name,
        head,
        trainable=trainable,
        prepare=lambda adaptation: folder.fill(model, wiring, adaptation),
    )
    return model


def refresh(model: Model) -> Model:
    """Drop every packed copy of a weight; needed after writes that PyTorch's version counter does not see."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is an nn.Module")
    dispatch.forget(list(model.parameters()))
    return model


# -- shared by the verbs -----------------------------------------------------------------------------------------


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, p) for key, p in model.named_parameters() if not key.startswith(f"{CONTAINER}.")]


def check_new_name(model: nn.Module, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}; accepted is a string")
    if not name or "." in name:
        raise ValueError(f"name: got {name!r}; accepted is a string that is not empty and has no dots")
    if name in adaptations(model):
        raise ValueError(f"name: got {name!r}, which is in use; known are {', '.join(adaptations(model))}")


def check_known_name(model: nn.Module, name: Any) -> None:
    known = adaptations(model)
    if name not in known:
        raise ValueError(f"name: got {name!r}; known are {', '.join(map(repr, known)) or 'none'}")
