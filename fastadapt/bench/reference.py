"""The methods as plain PyTorch, read off their equations: in float64 the oracle, in the case's dtype the yardstick.

    Houlsby    y = LN(A1(f) + f + x)          after the attention output and after the FFN output
    Pfeiffer   y = LN(f + A1(LN(f + x)) + x)  after the FFN output
    Parallel   y = LN(f + s·A1(x) + x)        beside the FFN

with f the sublayer's output after its dropout, x its input and A1(u) = W_up σ(W_down u + b_down) + b_up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.activations import get_activation

from fastadapt.bench.case import Case

ATTENTION, FFN = "attention", "ffn"
SITES: dict[str, tuple[str, ...]] = {"houlsby": (ATTENTION, FFN), "pfeiffer": (FFN,), "parallel": (FFN,)}
ACTIVATION = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}
SCALE = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0}
TENSORS = ("down.weight", "down.bias", "up.weight", "up.bias")
NORM_TENSORS = ("LayerNorm.weight", "LayerNorm.bias")  # Houlsby trains them too; AdapterHub leaves them frozen

Site = tuple[int, str]
Weights = dict[Site, dict[str, Tensor]]


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The encoder's layers of a BERT, RoBERTa or ELECTRA, with or without a head."""
    return model.base_model.encoder.layer


def adapter_weights(case: Case, model: nn.Module) -> Weights:
    """Float32 weights for every adapter of ``case``, large enough that leaving one out shows in the output."""
    generator = torch.Generator().manual_seed(case.seed + 3)
    hidden, b = model.config.hidden_size, case.bottleneck

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    return {
        (i, site): {
            "down.weight": normal(b, hidden, std=hidden**-0.5),
            "down.bias": normal(b, std=0.1),
            "up.weight": normal(hidden, b, std=0.5 * b**-0.5 / SCALE[case.method]),
            "up.bias": normal(hidden, std=0.05),
        }
        for i in range(len(encoder_layers(model)))
        for site in SITES[case.method]
    }


class _Sublayer(nn.Module):
    """Takes the place of BertSelfOutput or BertOutput and keeps its dense, dropout and LayerNorm."""

    def __init__(self, original: nn.Module, method: str, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = original.dense, original.dropout, original.LayerNorm
        b, hidden = weights["down.weight"].shape
        self.method, self.scale = method, SCALE[method]
        self.down, self.up = nn.Linear(hidden, b), nn.Linear(b, hidden)
        self.activation: Callable[[Tensor], Tensor] = get_activation(ACTIVATION[method])
        with torch.no_grad():
            for name in TENSORS:
                self.get_parameter(name).copy_(weights[name])

    def adapter(self, u: Tensor) -> Tensor:
        return self.up(self.activation(self.down(u)))

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        f, x = self.dropout(self.dense(hidden_states)), input_tensor
        if self.method == "houlsby":
            return self.LayerNorm(self.adapter(f) + f + x)
        if self.method == "pfeiffer":
            return self.LayerNorm(f + self.adapter(self.LayerNorm(f + x)) + x)
        return self.LayerNorm(f + self.scale * self.adapter(x) + x)


def install(model: nn.Module, case: Case, weights: Weights) -> nn.Module:
    """Put ``case.method`` into a stock model, in place: adapters (and a head) train, the base is frozen."""
    model.requires_grad_(False)
    for (i, site), tensors in weights.items():
        layer = encoder_layers(model)[i]
        owner = layer.attention if site == ATTENTION else layer
        owner.output = _Sublayer(owner.output, case.method, tensors)
    for module in adapters(model).values():
        for name in (*TENSORS, *(NORM_TENSORS if case.method == "houlsby" else ())):
            module.get_parameter(name).requires_grad_(True)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    return model.train(model.training)


def adapters(model: nn.Module) -> dict[Site, nn.Module]:
    """The sublayers :func:`install` put in."""

    def found() -> Iterator[tuple[Site, nn.Module]]:
        for i, layer in enumerate(encoder_layers(model)):
            for site, module in ((ATTENTION, layer.attention.output), (FFN, layer.output)):
                if isinstance(module, _Sublayer):
                    yield (i, site), module

    return dict(found())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """{"0.attention.down.weight": gradient, ...} of an installed model after a backward."""
    return {
        f"{i}.{site}.{name}": module.get_parameter(name).grad
        for (i, site), module in adapters(model).items()
        for name in (*TENSORS, *NORM_TENSORS)
        if module.get_parameter(name).grad is not None
    }
