"""Adapters with masked neurons, and a head that predicts the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastadapt.config.bottleneck import BottleneckConfig
from fastadapt.config.checks import finite, is_number


@dataclass(frozen=True)
class MaskedAdapterConfig(BottleneckConfig):
    """A bottleneck adapter whose neurons are masked in training: z = m ⊙ σ(W_down u + b_down), m ~ Bernoulli(1 - p).

    Every token and neuron draws its own m, and nothing is divided by 1 - p. A head at each site, used in training
    alone, predicts 1 - m from W_up z + b_up; its binary cross-entropy, averaged over unpadded tokens, neurons and
    sites, joins the model's loss with weight λ. At inference there is no mask, or a fixed one of neurons
    (``fa.keep_neurons``).

    ``bottleneck`` is 64 where neither it nor ``reduction_factor`` is given, and the rest is as in
    :class:`HoulsbyConfig`; ``placements=("output",), original_ln_before=True, train_layer_norm="none"`` is Pfeiffer's
    form. Other fields: :class:`BottleneckConfig`.

    Args:
        mask_prob: p.
        mask_loss_weight: λ.
    """

    activation: str = "gelu"
    train_layer_norm: Literal["none", "encoder", "all"] = "encoder"
    mask_prob: float = 0.15
    mask_loss_weight: float = 0.1

    def __post_init__(self) -> None:
        self._default_width(bottleneck=64)
        super().__post_init__()
        if not is_number(self.mask_prob) or not 0.0 <= self.mask_prob <= 1.0:
            raise ValueError(f"mask_prob: got {self.mask_prob!r}; accepted is a probability from 0 to 1")
        finite("mask_loss_weight", self.mask_loss_weight, 0)
