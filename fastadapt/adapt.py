"""The verbs: they act on a plain Hugging Face model, in place, and return it unless they report.

Each checks everything first and changes the model after, so that one that raises leaves the model as it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from fastadapt import dispatch
from fastadapt.config import LoRAConfig
from fastadapt.models import wiring_of
from fastadapt.modules import folded
from fastadapt.modules.active import Active, Part
from fastadapt.modules.labels import labels_of, remember, show
from fastadapt.modules.state import CONTAINER, Adaptation, Adaptations, base_modules, container_of, own_labels
from fastadapt.modules.step import set_hooks

if TYPE_CHECKING:  # these import transformers, which importing fastadapt does not
    from fastadapt.models.wiring import Wiring

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Put the fused sublayers into a model; nothing else changes. ``restore`` takes them out.

    Plain LoRAs of a model from ``peft.get_peft_model`` run in them, over PEFT's own parameters: which of its adapters
    are active, disabled or merged is read at every forward. What else PEFT puts into a sublayer, or put there after
    this call, runs on as it was, and ``explain`` says why.

    Args:
        model: a Hugging Face model of a wired architecture, bare or with any head, also inside a ``PeftModel``. One
            from AdapterHub's ``adapters.init`` goes on being driven by that library: one active bottleneck adapter,
            LoRA or prefix, a Fuse or a BatchSplit runs fused, anything else as it was, and ``explain`` says why.

    Raises:
        TypeError, ValueError: for what is no such model, listing the wired architectures.
    """
    from fastadapt.interop import live_adapterhub

    wiring = wiring_of(model)
    base = wiring.base_of(model)
    live_adapterhub.prepare(wiring, base)
    wiring.fuse(model, base)
    if peft_layers := _peft_layers():
        peft_layers.fuse(base)
    return model


def _peft_layers() -> ModuleType | None:
    """What knows PEFT's layers, where PEFT is loaded: else no model has any."""
    if "peft.tuners.lora.layer" not in sys.modules:
        return None
    from fastadapt.models import peft

    return peft


def restore(model: Model) -> Model:
    """Give every sublayer its original class; the original code runs again, to the last bit.

    Args:
        model: after ``accelerate``; of any other nothing changes.

    Raises:
        TypeError, ValueError: for a model of no wired architecture, and for a part of an adapted model.
        ValueError: while the model holds adaptations, which the original sublayers cannot run: ``unload`` it.
    """
    wiring = wiring_of(model)
    held = adaptations(model)
    if held:
        raise ValueError(f"model: holds adaptations ({', '.join(held)}); accepted is one without, so call unload first")
    check_owner(model, wiring)
    return unload(model) if container_of(model) is not None else _restored(model, wiring)


def _restored(model: Model, wiring: Wiring) -> Model:
    dispatch.forget(list(model.parameters()))
    wiring.restore(model)
    if peft_layers := _peft_layers():
        peft_layers.restore(model)
    return model


def adapt(model: Model, config: Any, name: str = "default", head: int | nn.Module | None = None) -> Model:
    """Add a named adaptation, activate it, and make trainable what its method trains; the base is frozen.

    Args:
        model: a Hugging Face model of a wired architecture, bare or with any head.
        config: the method: ``HoulsbyConfig``, ``PfeifferConfig``, ``ParallelConfig``, ``MaskedAdapterConfig`` or
            another ``BottleneckConfig``; ``LoRAConfig``; ``PrefixConfig`` or ``MAMConfig``; ``FusionConfig``, of
            adaptations that the model has; ``BitFitConfig``, ``LayerNormConfig`` or ``HeadConfig``.
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
    prepare: Callable[[Adaptation], None] | None = None,
) -> None:
    """:func:`adapt` for adaptations made or read; ``prepare`` sees the new one before the model does."""
    from fastadapt.models.head import make_head
    from fastadapt.models.methods import parts_for

    wiring = wiring_of(model)
    base = wiring.base_of(model)
    check_new_name(model, name)
    if base is not model and model._modules.get(getattr(model, "base_model_prefix", "")) is not base:
        raise ValueError(
            f"model: got {type(model).__name__}, which wraps the model it adapts; accepted is that model itself"
        )
    missing = wiring.unwired(model)
    if missing:
        raise ValueError(
            f"model: no fused class for {', '.join(missing)}; accepted are the classes of {wiring.base.__name__}"
        )
    check_owner(model, wiring)
    check_unmerged(model)
    check_unrouted(model)
    held = container_of(model)
    parts = parts_for(config, wiring, base, {} if held is None else {n: held[n] for n in held})
    own_head, num_labels = make_head(model, wiring, head)
    if not parts and own_head is None:
        raise ValueError(f"config: got a {type(config).__name__}, but {type(model).__name__} has no head to train")
    # A head of another width has to find its own problem type; the model does that at the first labels.
    base_labels, base_problem_type = own_labels(model)
    adaptation = Adaptation(
        config,
        parts,
        own_head,
        trainable=trainable,
        num_labels=num_labels,
        problem_type=base_problem_type if num_labels in (None, base_labels) else None,
    )
    if prepare is not None:
        prepare(adaptation)
    adaptation.train(model.training)
    adaptation.requires_grad_(trainable)

    container = container_of(model)
    if container is None:
        container = Adaptations()
        container.base_num_labels, container.base_problem_type = base_labels, base_problem_type
        container.train(model.training)
        model.add_module(CONTAINER, container)
    for key, parameter in base_parameters(model):
        container.base_requires_grad.setdefault(key, parameter.requires_grad)
        parameter.requires_grad_(False)
    wiring.fuse(model, base)
    wiring.open_slots(model)
    container.add(name, adaptation)
    engage_names(model, wiring, (name,), ())


def activate(model: Model, name: str | Sequence[str] | None, skip_layers: Iterable[int] = ()) -> Model:
    """Choose which adaptation runs and, if it was added for training, which trains.

    Args:
        model: of a wired architecture.
        name: of an adaptation of this model; None is the bare base with its own head. A list of LoRAs runs their sum,
            with the head of the first.
        skip_layers: layers, counted from 0, in which the bare base runs (with its own LayerNorms).

    Raises:
        TypeError, ValueError: naming the argument and the known names or layers; the model is unchanged.
    """
    wiring = wiring_of(model)
    container = container_of(model)
    names = names_of(model, name)
    check_unrouted(model)
    skipped = layers_to_skip(model, wiring, skip_layers)
    if container is not None:
        if container.merged is not None and (names, skipped) == (
            (container.active, *container.summed),
            container.skipped,
        ):
            return model
        check_unmerged(model)
        engage_names(model, wiring, names, skipped)
    return model


def layers_to_skip(model: nn.Module, wiring: Wiring, skip_layers: Iterable[int]) -> tuple[int, ...]:
    """``skip_layers``, checked and in order."""
    count = len(wiring.layers_of(wiring.base_of(model)))
    try:
        skipped = tuple(sorted(set(skip_layers)))
    except TypeError:
        raise TypeError(f"skip_layers: got {skip_layers!r}; accepted are layer numbers") from None
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in skipped):
        raise ValueError(f"skip_layers: got {skip_layers!r}; accepted are layers 0 to {count - 1}")
    return skipped


def names_of(model: nn.Module, name: Any) -> tuple[str, ...]:
    """What to activate, checked: no name, one, or several LoRAs that have a sum."""
    if name is None:
        return ()
    if isinstance(name, (set, frozenset)):
        raise TypeError(f"name: got {name!r}; accepted is a list, whose first one's head runs")
    several = isinstance(name, (list, tuple))
    names = tuple(name) if several else (name,)
    if not names or any(each in names[:i] for i, each in enumerate(names)):
        raise ValueError(f"name: got {name!r}; accepted are names of different adaptations")
    for each in names:
        check_known_name(model, each)
    if not several:
        return names
    configs = {each: container_of(model)[each].config for each in names}
    for each, config in configs.items():
        if not isinstance(config, LoRAConfig):
            raise TypeError(
                f"name: got {name!r}, but {each!r} is a {type(config).__name__}'s, which has no sum with others; "
                "accepted are LoRAs, and mixing others takes a FusionConfig"
            )
        if config.dora and len(names) > 1:
            raise ValueError(f"name: got {name!r}, but {each!r} is a DoRA, which has no sum with others")
    biased = [each for each, config in configs.items() if config.bias != "none"]
    if len(biased) > 1:
        raise ValueError(f"name: got {name!r}, of which {', '.join(biased)} own biases; accepted is one that does")
    return names


def engage_names(model: nn.Module, wiring: Wiring, names: tuple[str, ...], skipped: tuple[int, ...]) -> None:
    """Point every sublayer and slot at what runs there, the head of the first name's. Nothing here can fail."""
    from fastadapt.models.head import parts_of
    from fastadapt.models.methods.fusion import borrowed_sites
    from fastadapt.modules.linear import engage

    container = container_of(model)
    base = wiring.base_of(model)
    remember(model, container)
    chosen = [container[name] for name in names]
    adaptation = chosen[0] if chosen else None
    prefixes = wiring.prefixes_of(skipped)
    actives: dict[str, Active] = {}
    running: list[Part] = []
    for each in chosen:
        for path, part in each.parts().items():
            if not path.startswith(prefixes):
                sublayer, child = wiring.owner(path)
                part.join(actives.setdefault(sublayer, Active()), child)
                running.append(part)
    for path, module in wiring.sublayers(base):
        if hasattr(type(module), "active"):
            module.__dict__["active"] = actives.get(path)
        if hasattr(type(module), "first_layer"):
            module.__dict__["first_layer"] = wiring.layers_of(base)[0]
            module.__dict__["adapted"] = adaptation is not None
    for sublayer, child, module in wiring.linears(base):
        engage(module, actives.get(sublayer), child)
    set_hooks(model, base, running)
    slots = wiring.slots_of(model)
    own_head = None if adaptation is None else adaptation.own_head()
    for slot, part in parts_of(own_head, slots).items():
        slots[slot].__dict__["active_head"] = part

    for before in [container[n] for n in (container.active, *container.summed) if n in container]:
        if before.trainable:  # all others require nothing already, and walking through them costs more than the rest
            before.requires_grad_(False)
            for part in before.parts().values():
                for site in borrowed_sites(part):
                    site.requires_grad_(False)
    for each in chosen:
        if each.trainable:
            each.requires_grad_(True)
            for path, part in each.parts().items():
                runs = not path.startswith(prefixes)
                if not runs:
                    part.requires_grad_(False)
                for site in borrowed_sites(part):
                    site.requires_grad_(runs and each.config.train_adapters)
            if each is not adaptation and each.own_head() is not None:
                each.own_head().requires_grad_(False)
    container.active, container.summed, container.skipped = next(iter(names), None), names[1:], skipped
    problem_type = container.base_problem_type if adaptation is None else adaptation.problem_type
    show(model, container, container.active, labels_of(container, adaptation), problem_type)


def eject(model: Model, name: str | None = None) -> Model:
    """Fold the reparametrisation of an adaptation's prefixes: they are kept themselves, as after ``flat=True``.

    What is computed stays the same; a prefix of 30 positions on BERT-base shrinks from 9,872,384 parameters to 552,960.

    Args:
        model: with such an adaptation.
        name: of an adaptation with prefixes; None is the active one.

    Raises:
        ValueError: for an unknown name, or an adaptation without prefixes; the model is unchanged.
    """
    from fastadapt.models.methods.prefix import eject_prefixes

    container = container_of(model)
    if name is None and container is not None:
        name = container.active
    check_known_name(model, name)
    eject_prefixes(container[name])
    return model


def keep_neurons(model: Model, name: str, masks: Tensor | Mapping[str, Tensor]) -> Model:
    """Fix which neurons of a masked adaptation run (``MaskedAdapterConfig``); saved with it.

    Args:
        model: with such an adaptation.
        name: of the adaptation.
        masks: bool [b], True for a neuron that runs, for all sites; or a mapping from some sites' paths in the base
            model to such masks.

    Raises:
        ValueError: for an unknown name or path, an adaptation without masks, or a mask of another dtype or width; the
            model is unchanged.
    """
    from fastadapt.models.methods import bottleneck

    check_known_name(model, name)
    bottleneck.keep_neurons(container_of(model)[name], masks)
    return model


def adaptations(model: nn.Module) -> list[str]:
    """Names of the model's adaptations, in the order in which they were added.

    Args:
        model: any; one that was never adapted has none.

    Raises:
        TypeError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is an nn.Module")
    container = container_of(model)
    return [] if container is None else list(container)


def remove(model: Model, name: str) -> Model:
    """Drop one adaptation; where it is the active one, the bare base runs. The base stays frozen until ``unload``.

    Args:
        model: with that adaptation.
        name: of it.

    Raises:
        ValueError: for an unknown name, listing the known ones, for an adapter that a fusion mixes, for what is merged
            into the weights, and inside :func:`fastadapt.route`; the model is unchanged.
    """
    from fastadapt.models.methods.fusion import users_of

    check_known_name(model, name)
    check_unrouted(model)
    wiring, container = wiring_of(model), container_of(model)
    users = users_of(name, {n: container[n] for n in container})
    if users:
        raise ValueError(
            f"name: got {name!r}, which {', '.join(map(repr, users))} mixes; accepted is to remove that first"
        )
    if name in (container.active, *container.summed):
        check_unmerged(model)
        engage_names(model, wiring, (), ())
    container.drop(name)
    return model


def unload(model: Model, merge: bool = False) -> Model:
    """Give back a plain model: original classes, no adaptation, every ``requires_grad`` as before the first.

    Args:
        model: of a wired architecture, adapted or accelerated.
        merge: leave the active LoRA in the base, for good: in the weights, the biases, and the values of the head.
            Without it a merged LoRA is taken out, and the base is what it was.

    Raises:
        TypeError, ValueError: for a model of no wired architecture, a part of an adapted model, and inside
            :func:`fastadapt.route`; with ``merge=True`` as :func:`fastadapt.merge`, also for a head that the model's
            own cannot hold; the model is then unchanged. Without it also where a merged weight was written since.
    """
    wiring, container = wiring_of(model), container_of(model)
    check_owner(model, wiring)
    check_unrouted(model)
    if merge and container is not None and container.active is not None:
        from fastadapt.merging import merge_for_good

        remember(model, container)
        merge_for_good(model, wiring)
    elif container is not None and container.merged is not None:
        container.merged.undo()
    if container is not None:
        engage_names(model, wiring, (), ())
        for key, parameter in base_parameters(model):
            if key in container.base_requires_grad:
                parameter.requires_grad_(container.base_requires_grad[key])
        delattr(model, CONTAINER)
    return _restored(model, wiring)


def save(model: Model, path: str | os.PathLike[str], name: str | None = None, format: str | None = None) -> Model:
    """Write one adaptation into a folder, in the format of the library that has its method; all or nothing.

    LoRA is written in PEFT's format; bottlenecks, prefixes, MAM and fusions with ``mix="attention"`` in AdapterHub's;
    the weights as safetensors. What AdapterHub's cannot hold of them (Houlsby's LayerNorms, masks, AdapterDrop) goes
    to ``fastadapt.json`` and ``fastadapt.safetensors`` in the same folder, and a warning says that AdapterHub would
    compute something else. BitFit, LayerNorms, heads alone and other fusions, of which neither has a format, are in
    these two files alone, and a warning says so. The head lies beside all of these as AdapterHub writes heads; in
    PEFT's format it is a module to save. A head of the user's own, which no file can rebuild, is left out with a
    warning.

    Args:
        model: with the adaptation.
        path: of the folder; made where it does not exist.
        name: of the adaptation; None is the active one.
        format: ``"peft"`` (for LoRA), ``"adapterhub"`` (also for LoRA), or None for the one said above.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; nothing is written.
    """
    from fastadapt.interop import adapterhub, peft
    from fastadapt.interop.files import as_path
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
    folder = as_path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path: got {str(path)!r}, which is a file; accepted is a folder")
    adaptation = container[name]
    if container.route is None:
        remember(model, container)
    if format == "peft" or (format is None and isinstance(adaptation.config, LoRAConfig)):
        peft.save(model, wiring, adaptation, folder, name)
    else:
        adapterhub.save(model, wiring, adaptation, folder, name, format)
    return model


def load(model: Model, path: str | os.PathLike[str], name: str | None = None, trainable: bool = False) -> Model:
    """Read an adaptation from a folder, of a format told by its content, and activate it; the base is frozen.

    Args:
        model: as in ``adapt``.
        path: of a folder that this library's ``save``, AdapterHub's ``save_adapter`` or PEFT's ``save_pretrained``
            wrote.
        name: for the adaptation here; None is the one in the file, and "default" where PEFT wrote none.
        trainable: whether it trains while it is active.

    Raises:
        TypeError, ValueError: for files that are missing, truncated or corrupted, hold NaN, or do not fit the model
            (hidden size, layers, architecture), and for names as in ``adapt``; the model is unchanged.
    """
    from fastadapt.interop.formats import open_folder

    wiring = wiring_of(model)
    if name is not None:
        check_new_name(model, name)
    if not isinstance(trainable, bool):
        raise TypeError(f"trainable: got {trainable!r}; accepted are True and False")
    folder = open_folder(path, name)
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
    """Drop every packed copy of a weight; needed after writes that PyTorch's version counter does not see.

    Args:
        model: whose weights were written.

    Raises:
        TypeError: for what is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is an nn.Module")
    dispatch.forget(list(model.parameters()))
    folded.refresh()
    return model


def skip_padding(model: Model, skip: bool = True) -> Model:
    """Leave padding out of the layers also where its hidden states are outputs: they are zeros then.

    Where a head reads the first position alone (sequence classification), padding is left out without asking, because
    nobody sees the difference. A bare encoder, a token classifier or a language model gives what the layers make of
    padding, as the stock model does, until this is called.

    Args:
        model: with fused sublayers, after ``accelerate``, ``adapt`` or ``load``.
        skip: False takes it back.

    Raises:
        TypeError, ValueError: for a ``skip`` that is no bool, a model of no wired architecture or without fused
            sublayers, and one for question answering, whose head reads all positions.
    """
    from fastadapt.modules.unpad import FusedEncoder

    if not isinstance(skip, bool):
        raise TypeError(f"skip: got {skip!r}; accepted are True and False")
    wiring = wiring_of(model)
    encoder = wiring.base_of(model).get_submodule(wiring.encoder)
    if not isinstance(encoder, FusedEncoder):
        raise ValueError("model: has no fused sublayers; accepted is one after accelerate, adapt or load")
    if skip and encoder.head == "all":
        raise ValueError(f"model: the head of {type(model).__name__} reads padding too; accepted is another model")
    encoder.__dict__["skips_padding"] = skip
    return model


# -- shared by the verbs -----------------------------------------------------------------------------------------


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(key, parameter) of all that is no adaptation's, each parameter once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in base_modules(model):
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), (f"{path}.{name}" if path else name, p))
    return list(found.values())


def check_owner(model: nn.Module, wiring: Wiring) -> None:
    """Refuse a part of an adapted model, or what is wrapped around one: its sublayers run that one's adaptations."""
    if container_of(model) is None and wiring.is_adapted(wiring.base_of(model)):
        raise ValueError(
            f"model: the sublayers of this {type(model).__name__} belong to an adapted model around or inside it; "
            "accepted is that model, or this one after unload of that"
        )


def check_unmerged(model: nn.Module) -> None:
    """Refuse what would run beside weights that a LoRA is merged into."""
    container = container_of(model)
    if container is not None and container.merged is not None:
        names = " + ".join(map(repr, (container.active, *container.summed)))
        raise ValueError(
            f"model: {names} is merged into its weights; accepted is one after unmerge, and swap merges another LoRA"
        )


def check_unrouted(model: nn.Module) -> None:
    """Refuse what would change what runs while a batch is routed."""
    container = container_of(model)
    if container is not None and container.route is not None:
        raise ValueError("model: is inside fa.route; accepted is one outside of it")


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
