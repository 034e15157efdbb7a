"""What a LoRA owns at one linear layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastadapt.modules.active import Active, Part
from fastadapt.modules.plain import parameter
from fastadapt.ops.schemas import accumulation_dtype


class LoRA(Part):
    """The two matrices of one target, DoRA's magnitude, and a copy of the layer's bias where that trains with them.

    Args:
        linear: the layer; it is only read.
        rank: r.
        scale: s, what B A is multiplied with.
        dropout: of what A reads, in training.
        init: ``"kaiming"`` or ``"gaussian"``, of A; B is zero.
        dora: own a magnitude m, [out], which starts at the norms of the weight's rows.
        bias: own a copy of the layer's bias, which runs instead of it.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        init: str = "kaiming",
        dora: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, **place)
        self.scale, self.dropout = float(scale), float(dropout)
        with torch.no_grad():
            draw(self.lora_A.weight, self.lora_B.weight, init)
        self.lora_magnitude_vector = self.bias = None
        if dora:
            norm = row_norms(linear.weight.detach(), None, None, 0.0)
            self.lora_magnitude_vector = nn.Parameter(norm.to(linear.weight.dtype))
        if bias and linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone())

    @property
    def rank(self) -> int:
        return self.lora_A.out_features

    def join(self, active: Active, child: str) -> None:
        active.loras.setdefault(child, []).append(self)
        if self.bias is not None:
            active.biases[child] = self

    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        own = self._modules
        return parameter(own["lora_A"], "weight"), parameter(own["lora_B"], "weight")

    def ratio(self, weight: Tensor) -> Tensor:
        """DoRA's m/‖W + s·BA‖, [out]; a gradient flows into m alone (arXiv:2402.09353, section 4.3)."""
        norm = row_norms(weight.detach(), self.lora_A.weight.detach(), self.lora_B.weight.detach(), self.scale)
        return self.lora_magnitude_vector / norm.to(self.lora_magnitude_vector.dtype)


def draw(a: Tensor, b: Tensor, init: str) -> None:
    """Initialise A [r, in] and B [out, r] from PyTorch's generator."""
    if init == "gaussian":
        nn.init.normal_(a, std=1 / a.shape[0])
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def row_norms(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """‖W + scale·BA‖ of every row, [out], float32 or wider; without ``a`` and ``b`` of W alone."""
    wide = weight.to(accumulation_dtype(weight.dtype))
    if a is not None:
        wide = torch.addmm(wide, b.to(wide.dtype), a.to(wide.dtype), alpha=scale)
    return torch.linalg.vector_norm(wide, dim=1)
