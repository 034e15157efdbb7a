"""A bottleneck adapter whose neurons are masked, with the head that predicts the mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.config import MaskedAdapterConfig
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.folded import Folded
from fastadapt.modules.plain import replaced
from fastadapt.ops.activations import activate


class MaskedSite(Site):
    """A :class:`Site` with ``mask_head`` (W_m [b, H], b_m), used in training alone, and a fixed mask of neurons [b]."""

    averaged = True

    def __init__(
        self,
        config: MaskedAdapterConfig,
        hidden: int,
        width: int | None,
        norm: nn.LayerNorm | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, hidden, width, norm, device=device, dtype=dtype)
        self.mask_head = None
        self._folded_up, self._folded_all = Folded(), Folded()
        if width is not None:
            self.mask_head = nn.Linear(hidden, width, device=device, dtype=dtype)
            nn.init.normal_(self.mask_head.weight, std=0.02)
            nn.init.zeros_(self.mask_head.bias)
            self.register_buffer("neurons", torch.ones(width, device=device, dtype=torch.bool))

    @property
    def has_loss(self) -> bool:
        return self.mask_head is not None and self.config.mask_loss_weight > 0.0

    def training_only(self) -> list[nn.Parameter]:
        return [] if self.mask_head is None else list(self.mask_head.parameters())

    def take_loss(self) -> Tensor | None:
        return self.step.turn.take(self)

    def up_weight(self) -> Tensor:
        """W_up, its columns of neurons that the fixed mask leaves out zero."""
        up = self.up.weight
        if torch.compiler.is_compiling():  # compiled code does not look at the mask's values
            return up * self.neurons
        if self._folded_all.get([self.neurons], lambda: bool(self.neurons.all())):
            return up
        if torch.is_grad_enabled() and up.requires_grad:
            return up * self.neurons
        return self._folded_up.get([up, self.neurons], lambda: up * self.neurons)

    def _adapter(
        self, read: Tensor, *, skip: bool = False, joined: Tensor | None = None, norm: nn.Module | None = None
    ) -> Tensor:
        if not self.training:
            return super()._adapter(read, skip=skip, joined=joined, norm=norm)
        z = activate(self.activation, self.down(read))
        # Ones that survive the counter's dropout: the same mask in every backend and in a recomputation.
        kept = ops.drop(torch.ones_like(z), self.config.mask_prob) != 0
        o = F.linear(z * (kept & self.neurons), self.up.weight, self.up.bias)
        if self.has_loss:
            o = self.step.turn.bring(self, o, self._loss(o, kept))
        y = ops.drop(o * self.scale, self.config.dropout)
        if skip:
            y = y + read
        if norm is not None and replaced(norm, nn.LayerNorm) is None:
            return ops.add_norm(y, joined, norm.weight, norm.bias, eps=norm.eps)
        y = y if joined is None else y + joined
        return y if norm is None else norm(y)

    def _loss(self, o: Tensor, kept: Tensor) -> Tensor:
        """λ times the mean cross-entropy of the predicted 1 - m over unpadded tokens and neurons."""
        logits = self.mask_head(o).float()
        each = F.binary_cross_entropy_with_logits(logits, (~kept).float(), reduction="none").mean(-1)
        unpadded = self.step.turn.unpadded
        if unpadded is None or unpadded.shape != each.shape:
            mean = each.mean()
        else:
            mean = (each * unpadded).sum() / unpadded.sum().clamp(min=1)
        return self.config.mask_loss_weight * mean
