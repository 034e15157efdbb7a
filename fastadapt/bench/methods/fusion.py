"""AdapterFusion: attention over frozen Pfeiffer adapters after the FFN, of which the mix alone trains.

u = LN(f + x), a_n = A1_n(u), q = W_q u + b_q, k_n = W_k a_n + b_k, p = softmax_n(drop(q·k_n))
y = LN(Σ p_n W_v a_n + f + x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Method, Tensors, encoder_layers, own_tensors
from fastadapt.bench.methods.bottleneck import METHODS as BOTTLENECKS

SITE = "output"
TENSORS = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
PFEIFFER = BOTTLENECKS["pfeiffer"]


def _names(case: Case) -> list[str]:
    return [f"a{n}" for n in range(case.adapters)]


class _Sublayer(nn.Module):
    """Takes the place of BertOutput and keeps its dense, dropout and LayerNorm."""

    def __init__(self, original: nn.Module, case: Case, dropout: float) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = original.dense, original.dropout, original.LayerNorm
        hidden, names = self.dense.out_features, _names(case)
        self.down = nn.ModuleDict({name: nn.Linear(hidden, case.bottleneck) for name in names})
        self.up = nn.ModuleDict({name: nn.Linear(case.bottleneck, hidden) for name in names})
        self.query, self.key = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.value, self.drop = nn.Linear(hidden, hidden, bias=False), nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        total = self.dropout(self.dense(hidden_states)) + input_tensor
        u = self.LayerNorm(total)
        a = torch.stack([self.up[name](torch.relu(self.down[name](u))) for name in self.down], dim=-2)
        p = torch.softmax(self.drop((self.key(a) * self.query(u)[..., None, :]).sum(-1)), -1)
        return self.LayerNorm((p[..., None] * self.value(a)).sum(-2) + total)


class Fusion(Method):
    name, trains = "fusion", "the mix of frozen adapters"
    inference_peers = ("adapterhub",)
    judged_batch = 32  # the highest layer's gradients share the factors of as many logits' gradients

    def extra(self, case: Case) -> dict[str, Any]:
        return {"adapters": case.adapters}

    def describe(self, record: dict[str, Any]) -> str:
        return f"fusion of {record['adapters']}, b={record['rank_or_bottleneck']}"

    def frozen(self, name: str) -> bool:
        return "/" in name

    def silent(self, name: str) -> bool:
        return name.endswith("key.bias")  # all scores of a token move alike with it, and softmax takes no notice

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        generator = torch.Generator().manual_seed(case.seed + 5)
        hidden, found = model.config.hidden_size, {}
        one = PFEIFFER.weights(case, model)
        for n, name in enumerate(_names(case)):
            for path, value in one.items():
                found[f"{name}/{path}"] = value.roll(n, dims=0)
        for i in range(len(encoder_layers(model))):
            for part in TENSORS:
                shape = (hidden, hidden) if part.endswith("weight") else (hidden,)
                std = 0.4 * hidden**-0.5 if part.endswith("weight") else 0.1
                value = torch.randn(*shape, generator=generator) * std
                found[f"encoder.layer.{i}.{SITE}.{part}"] = (
                    value + torch.eye(hidden) if part == "value.weight" else value
                )
        return found

    def install(self, model: nn.Module, case: Case) -> Tensors:
        found = {}
        for i, layer in enumerate(encoder_layers(model)):
            layer.output = _Sublayer(layer.output, case, model.config.attention_probs_dropout_prob)
            path = f"encoder.layer.{i}.{SITE}"
            for name in _names(case):
                for part, linears in (("down", layer.output.down), ("up", layer.output.up)):
                    found[f"{name}/{path}.{part}.weight"] = linears[name].weight
                    found[f"{name}/{path}.{part}.bias"] = linears[name].bias
            for part in TENSORS:
                found[f"{path}.{part}"] = layer.output.get_parameter(part)
        return found

    def config(self, case: Case) -> Any:
        # AdapterHub leaves the penalty of W_v to its own Trainer, so no system's loss has it here.
        return fa.FusionConfig(adapters=tuple(_names(case)), regularization=0.0)

    def adapt(self, model: nn.Module, name: str, case: Case) -> Tensors:
        found = {}
        for each in _names(case):
            if each not in fa.adaptations(model):  # a second fusion mixes those of the first
                fa.adapt(model, PFEIFFER.config(case), name=each)
            found.update({f"{each}/{path}": p for path, p in own_tensors(model, each).items()})
        return {**found, **super().adapt(model, name, case)}

    def adapterhub(self, model: nn.Module, name: str, case: Case) -> Tensors:
        from adapters.composition import Fuse

        names, found = _names(case), {}
        for each in names:
            model.add_adapter(each, config=PFEIFFER.hub_config(case, model))
            found.update({f"{each}/{path}": p for path, p in PFEIFFER.hub_tensors(model, each, case).items()})
        model.add_adapter_fusion(Fuse(*names))
        model.train_adapter_fusion(Fuse(*names))
        for i, layer in enumerate(encoder_layers(model)):
            fusion = layer.output.adapter_fusion_layer[",".join(names)]
            for part in TENSORS:
                found[f"encoder.layer.{i}.{SITE}.{part}"] = fusion.get_parameter(part)
        return found


METHODS = {"fusion": Fusion()}
