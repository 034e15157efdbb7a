"""Parameter groups for an optimizer: what trains, with a learning rate of its own for the head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastadapt.config.checks import is_number
from fastadapt.models import wiring_of
from fastadapt.modules.state import CONTAINER, container_of

# As Hugging Face's Trainer: no decay of biases and of what normalises.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")


def param_groups(
    model: nn.Module,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    names: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer: encoder and head, each with and without weight decay.

    Biases and LayerNorms do not decay, as in Hugging Face's ``Trainer``. Groups without a parameter are left out; the
    order of groups and parameters is that of the model, so that an optimizer's saved state fits again.

    Args:
        model: adapted, or a plain model whose own parameters train.
        lr: learning rate of all but the head.
        head_lr: of the head; None is ``lr``.
        weight_decay: of matrices.
        names: adaptations to be trained together, as with :func:`fastadapt.route`; None takes what requires a gradient
            now.

    Returns:
        Mappings with ``params`` (a list of parameters), ``lr`` and ``weight_decay``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted; also where nothing trains.
    """
    for argument, value in (("lr", lr), ("head_lr", head_lr), ("weight_decay", weight_decay)):
        if value is None and argument == "head_lr":
            continue
        if not is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{argument}: got {value!r}; accepted is a number of at least 0")
    wiring, container = wiring_of(model), container_of(model)
    chosen = None if names is None else _prefixes(container, names)
    own_heads = {id(p) for slot in wiring.slots_of(model).values() for p in slot.parameters()}
    no_decay = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        trains = parameter.requires_grad if chosen is None else key.startswith(chosen)
        if not trains:
            continue
        path, is_head = key, id(parameter) in own_heads
        if key.startswith(f"{CONTAINER}."):
            path = key.split(".", 2)[2]  # a task may be called "norm"
            is_head = path.startswith("head.")
        decays = id(parameter) not in no_decay and _NO_DECAY.search(path.lower()) is None
        groups.setdefault((is_head, decays), []).append(parameter)
    if not groups:
        raise ValueError("model: has nothing that trains; accepted is one after adapt, or with parameters to train")
    rates = {False: lr, True: lr if head_lr is None else head_lr}
    return [
        {"params": groups[key], "lr": float(rates[key[0]]), "weight_decay": float(weight_decay) if key[1] else 0.0}
        for key in sorted(groups, key=lambda k: (k[0], not k[1]))
    ]


def _prefixes(container: Any, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"names: got {names!r}; accepted is a list of names")
    listed = list(names)
    known = [] if container is None else list(container)
    unknown = [name for name in listed if name not in known]
    if unknown or not listed:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"names: got {got}; known are {', '.join(map(repr, known)) or 'none'}")
    frozen = [name for name in listed if not container[name].trainable]
    if frozen:
        raise ValueError(f"names: got {frozen[0]!r}, which was not added for training; accepted are those that were")
    return tuple(f"{CONTAINER}.{name}." for name in listed)
