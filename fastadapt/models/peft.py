"""PEFT's layers in a model. This module imports PEFT: only where PEFT is loaded already."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from torch import nn

from fastadapt.modules.peer import PeerLoRA
from fastadapt.modules.plain import reads_as


class FusedLoraLinear(PeerLoRA, Linear):
    """PEFT's ``lora.Linear``, which the fused sublayers can read."""


reads_as(FusedLoraLinear, nn.Linear)


def fuse(base: nn.Module) -> None:
    for module in base.modules():
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear


def restore(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = Linear
