"""The slots of a model's head: the original class, plus the active adaptation's head in its place, which may read
tensors of the model's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.modules.plain import reads_as


class HeadSlot:
    """Mixin over a head's class. The model's own head stays where it is, under its own keys; another may run."""

    active_head: nn.Module | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.active_head is None:
            return super().forward(*args, **kwargs)
        return self.active_head(*args, **kwargs)

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own head, whatever is active."""
        return super().forward(*args, **kwargs)


class LinearHead(HeadSlot, nn.Linear):
    """``nn.Linear`` as a head."""


reads_as(LinearHead, nn.Linear)

Place = tuple[nn.Module, str, str]  # a parameter: some module, a path from there, a name


class TiedLinear(nn.Linear):
    """``nn.Linear`` whose weight or bias is another module's parameter, looked up whenever it is read.

    transformers puts other parameters in there when it resizes or ties embeddings, and ``functional_call`` for a while.
    """

    ties: dict[str, Place]

    @property
    def weight(self) -> Tensor:
        return self._read("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._read("bias")

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def _read(self, key: str) -> Tensor | None:
        place = self.ties.get(key)
        if place is None:
            return self._parameters[key]
        module, path, name = place
        return getattr(module.get_submodule(path), name)

    def __setattr__(self, key: str, value: Any) -> None:
        if key not in self.ties:
            super().__setattr__(key, value)
        elif value is not self._read(key):  # else transformers ties them anew
            del self.ties[key]
            self._parameters[key] = None
            super().__setattr__(key, value)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if isinstance(bias, nn.Parameter) and bias.shape[0] != weight.shape[0]:
            # The vocabulary has another size now; transformers does the same to the model's own.
            with torch.no_grad():
                bias.data = F.pad(bias.data, (0, weight.shape[0] - bias.shape[0]))
        return F.linear(input, weight, bias)


def tie(module: nn.Module, key: str, place: Place) -> None:
    """Have ``module`` read the parameter at ``place`` for its own of that name, which it no longer has."""
    parameter = module._parameters.pop(key)
    if type(module) is nn.Linear:
        module.__class__ = TiedLinear
        module.__dict__["ties"] = {}
    if isinstance(module, TiedLinear):
        module.__dict__["ties"][key] = place
    else:
        module.__dict__[key] = parameter
