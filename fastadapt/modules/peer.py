"""A LoRA layer of PEFT's, read instead of called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastadapt import dispatch
from fastadapt.modules.plain import replaced
from fastadapt.ops import LowRank


class PeerLoRA:
    """Mixin over PEFT's ``lora.Linear``: what a fused sublayer reads of it, at every forward.

    PEFT keeps its adapters in dictionaries by name (``lora_A``, ``lora_B``, ``lora_dropout``, ``scaling``), the names
    that run in ``active_adapters``, and merges through ``weight.data``, which moves neither the version nor (unless
    asked to be safe) the address of the weight: so that is where packed copies are dropped.
    """

    def refusal(self) -> str | None:
        """Why it cannot be read; None where it can."""
        if reason := replaced(self.base_layer, nn.Linear):
            return reason
        if self.merged:
            return "PEFT unmerges it first, because its adapters are disabled" if self.disable_adapters else None
        for name in self._running():
            if name in self.lora_variant:
                return f"PEFT's adapter {name!r} is of another kind ({type(self.lora_variant[name]).__name__})"
            if self.lora_bias.get(name):
                return f"PEFT's adapter {name!r} has a bias of its own"
            dropout = self.lora_dropout[name]
            reason = replaced(self.lora_A[name], nn.Linear) or replaced(self.lora_B[name], nn.Linear)
            if type(dropout) is not nn.Identity:
                reason = reason or replaced(dropout, nn.Dropout)
            if reason:
                return f"in PEFT's adapter {name!r}, {reason}"
        return None

    def terms(self, weight: int) -> list[LowRank]:
        """What its active adapters add to weight number ``weight`` of a linear op."""
        if self.merged:
            return []
        found = []
        for name in self._running():
            dropout = self.lora_dropout[name]
            p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            found.append(LowRank(a, b, self.scaling[name], weight, dropout_p=p))
        return found

    def _running(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().merge(*args, **kwargs)
        finally:
            self._forget()

    def unmerge(self) -> None:
        try:
            super().unmerge()
        finally:
            self._forget()

    def _forget(self) -> None:
        dispatch.forget(list(self.base_layer.parameters()))


def terms_of(linears: Iterable[nn.Module]) -> list[LowRank]:
    """What the layers of PEFT's among the linears of one op add to it."""
    return [term for i, m in enumerate(linears) if isinstance(m, PeerLoRA) for term in m.terms(i)]
