"""A linear layer of the base in which something of an adaptation runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastadapt.modules.active import Active
from fastadapt.modules.merged import Merged
from fastadapt.modules.plain import reads_as
from fastadapt.modules.project import project
from fastadapt.modules.routed import Routed


class FusedLinear(nn.Linear):
    """``nn.Linear`` with what the active adaptation adds to it.

    A fused sublayer reads its linears together and never calls them. This is what runs where it does not: in the
    original forward of a sublayer (hooks, requested attentions, a base that trains), and outside of sublayers.
    """

    active: Active | Routed | None = None  # what runs in the sublayer
    child: str = ""  # this layer's name in it

    merge: Merged | None = None  # while a LoRA is merged into the weight

    def forward(self, input: Tensor) -> Tensor:
        return project(input, {self.child: self}, self.active)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinear:
        if self.merge is not None:
            self.merge.before_conversion([self], fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merge is not None:
            args[-1].append(f"{prefix}weight: an adaptation is merged into it; call unmerge before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


reads_as(FusedLinear, nn.Linear)


def engage(module: nn.Module, active: Active | Routed | None, child: str) -> None:
    """Let ``module`` run what ``active`` has for it, or be the plain layer that it was where that is nothing."""
    if active is not None and active.touches(child):
        if type(module) is nn.Linear:
            module.__class__ = FusedLinear
        module.__dict__["active"], module.__dict__["child"] = active, child
    elif type(module) is FusedLinear:
        module.__class__ = nn.Linear
        for attribute in ("active", "child"):
            module.__dict__.pop(attribute, None)


def lost(children: dict[str, nn.Module], active: Active | Routed | None) -> str | None:
    """Why calling these children would leave out what is active in them; None where it would not."""
    if active is None:
        return None
    for name, child in children.items():
        if active.touches(name):
            if type(child) is not FusedLinear:
                return f"{name} has become a {type(child).__name__}"
            if "forward" in child.__dict__:
                return f"the forward of {name} is patched"
    return None
