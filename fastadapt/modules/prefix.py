"""What prefix tuning owns: a prefix in every self-attention, and what they are all computed from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.config import PrefixConfig
from fastadapt.modules.active import Active, Part
from fastadapt.modules.folded import Folded
from fastadapt.ops.activations import activate, canonical


class Control(nn.Module):
    """e and W₁ of P = W₂ σ(W₁ e + b₁) + b₂, of all layers."""

    def __init__(self, config: PrefixConfig, hidden: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.length, hidden, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, config.bottleneck, device=device, dtype=dtype)
        self.activation = canonical(config.activation)

    def forward(self) -> Tensor:
        """[P, b]."""
        return activate(self.activation, self.down(self.wte.weight))


class Prefix(Part):
    """Keys and values of one layer.

    Args:
        config: the adaptation's configuration.
        hidden: H.
        control: what it is computed from, a part of the same adaptation; None where the prefix itself is learned.
        device, dtype: of the new parameters.
    """

    def __init__(
        self, config: PrefixConfig, hidden: int, control: Control | None, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.length, self.hidden, self.dropout = config.length, hidden, config.dropout
        self.__dict__["control"] = control  # owned, and registered, once for all layers
        self.prefix = self.up = None
        if control is None:
            self.prefix = nn.Parameter(torch.randn(2, config.length, hidden, device=device, dtype=dtype))
        else:
            self.up = nn.Linear(config.bottleneck, 2 * hidden, device=device, dtype=dtype)
        self._folded = Folded()

    def join(self, active: Active, child: str) -> None:
        active.prefix = self

    def forward(self, batch: int) -> Tensor:
        """[2, P, H], keys and values; [B, 2, P, H] where a dropout gives every row of the batch its own."""
        if self.prefix is not None:
            value = self.prefix
        else:
            parameters = [*self.control.parameters(), *self.up.parameters()]
            if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
                value = self._computed()
            else:
                value = self._folded.get(parameters, self._computed)
        if self.training and self.dropout > 0.0:
            value = F.dropout(value.expand(batch, *value.shape), self.dropout)
        return value

    def _computed(self) -> Tensor:
        return self.up(self.control()).view(self.length, 2, self.hidden).transpose(0, 1).contiguous()

    @torch.no_grad()
    def eject(self) -> None:
        """Keep the prefix itself instead of what it is computed from."""
        if self.up is not None:
            value = self._computed().to(self.up.weight.dtype)
            self.prefix = nn.Parameter(value, requires_grad=self.up.weight.requires_grad)
            self.up = None
            self.__dict__["control"] = None
