"""What can be computed from parameters once and used until one of them changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastadapt import dispatch

Value = TypeVar("Value")

_generation = 0  # of everything folded; moved by writes that no version counter shows


def refresh(*_: Any) -> None:
    """Let everything be folded anew at its next use."""
    global _generation
    _generation += 1


@functools.cache
def _watch_optimizers() -> None:
    """Fused optimizers write parameters without moving their version counters. Not at import, which stays lean."""
    register_optimizer_step_post_hook(torch.compiler.disable(refresh))


def generation() -> int:
    """A number that moves at every :func:`refresh`."""
    return _generation


class Folded:
    """One value and the state of the parameters that it was made of; copies and pickles begin empty."""

    def __init__(self) -> None:
        _watch_optimizers()
        self._key: tuple[Any, ...] | None = None
        self._value: Any = None

    def get(self, parameters: Sequence[Tensor], make: Callable[[], Value], *facts: Any) -> Value:
        """``make()``, without gradients and autocast, or what it gave while ``parameters`` and ``facts`` were the same.

        Compiled code and parameters without a version counter are never served from memory. Under forward-mode AD and
        transforms of ``torch.func``, which parameters can't tell of, it is made with what they carry.
        """
        if dispatch.transformed():
            return make()
        keyless = torch.compiler.is_compiling() or any(p.is_inference() for p in parameters)
        key = None if keyless else (_generation, facts, *((id(p), p._version, p.data_ptr()) for p in parameters))
        if key is None or key != self._key:
            with torch.no_grad(), torch.autocast(parameters[0].device.type, enabled=False):
                value = make()
            if key is None:
                return value
            self._key, self._value = key, value
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded:
        return Folded()

    def __reduce__(self) -> tuple[type[Folded], tuple[()]]:
        return Folded, ()
