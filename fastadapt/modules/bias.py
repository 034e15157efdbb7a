"""What BitFit owns at one place: a bias."""

from __future__ import annotations

import torch
from torch import nn

from fastadapt.modules.active import Active, Part


class Bias(Part):
    """The bias that runs instead of a linear layer's or a LayerNorm's own.

    Args:
        own: the pretrained one, which is copied.
    """

    def __init__(self, own: nn.Parameter) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty_like(own))
        with torch.no_grad():
            self.bias.copy_(own)

    def join(self, active: Active, child: str) -> None:
        if child == "LayerNorm":
            active.norm = self
        else:
            active.biases[child] = self
