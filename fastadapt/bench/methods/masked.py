"""The masked adapter: Houlsby's, whose neurons are masked in training, with heads that predict the masks.

z = m ⊙ σ(W_down u + b_down), o = W_up z + b_up, loss = the task's + λ · mean BCE(W_m o + b_m, 1 - m)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Method, Tensors, encoder_layers
from fastadapt.bench.methods.bottleneck import METHODS as BOTTLENECKS

HOULSBY = BOTTLENECKS["houlsby"]
LAMBDA = 0.1


def _probability(case: Case) -> float:
    """p; where dropout is off, as in the check of gradients, no neuron is masked either."""
    return 0.15 if case.dropout else 0.0


class _MaskedUp(nn.Linear):
    """W_up over what a mask leaves, in training, with the head that predicts the mask."""

    def __init__(self, up: nn.Linear, p: float) -> None:
        super().__init__(up.in_features, up.out_features)
        self.mask_head, self.p = nn.Linear(up.out_features, up.in_features), p
        self.loss: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        kept = torch.rand_like(input) >= self.p
        o = super().forward(input * kept)
        self.loss = F.binary_cross_entropy_with_logits(self.mask_head(o).float(), (~kept).float())
        return o


class Masked(Method):
    name, trains = "masked", "adapters, LayerNorms, mask heads"
    inference_peers = training_peers = ("plain",)

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        generator = torch.Generator().manual_seed(case.seed + 7)
        found, hidden = HOULSBY.weights(case, model), model.config.hidden_size
        for path in [name.removesuffix(".up.bias") for name in found if name.endswith(".up.bias")]:
            found[f"{path}.mask_head.weight"] = torch.randn(case.bottleneck, hidden, generator=generator) * hidden**-0.5
            found[f"{path}.mask_head.bias"] = torch.randn(case.bottleneck, generator=generator) * 0.1
        return found

    def install(self, model: nn.Module, case: Case) -> Tensors:
        found, ups = HOULSBY.install(model, case), []
        for i, layer in enumerate(encoder_layers(model)):
            for path in HOULSBY.sites:
                site = layer.get_submodule(path)
                site.up = _MaskedUp(site.up, _probability(case))
                ups.append(site.up)
                at = f"encoder.layer.{i}.{path}"
                found |= {f"{at}.up.{name}": site.up.get_parameter(name) for name in ("weight", "bias")}
                found |= {f"{at}.mask_head.{name}": p for name, p in site.up.mask_head.named_parameters()}

        def add_losses(model: nn.Module, _: Any, output: Any) -> Any:
            if model.training and getattr(output, "loss", None) is not None:
                output["loss"] = output["loss"] + LAMBDA * sum(up.loss for up in ups) / len(ups)
            return output

        model.register_forward_hook(add_losses)
        return found

    def config(self, case: Case) -> Any:
        return fa.MaskedAdapterConfig(bottleneck=case.bottleneck, mask_prob=_probability(case), mask_loss_weight=LAMBDA)


METHODS = {"masked": Masked()}
