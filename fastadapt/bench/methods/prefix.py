"""Prefix tuning, K' = [P_K; K] and V' = [P_V; V] with P = W2 tanh(W1 e), and its mix with parallel adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Method, Tensors, encoder_layers
from fastadapt.bench.methods.bottleneck import METHODS as BOTTLENECKS

WIDTH = 512  # of the reparametrisation
SHARED = ("wte.weight", "down.weight", "down.bias")


class _Control(nn.Module):
    """W1 e."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.wte, self.down = nn.Embedding(length, hidden), nn.Linear(hidden, WIDTH)

    def forward(self) -> Tensor:
        return torch.tanh(self.down(self.wte.weight))


class _Attention(nn.Module):
    """Takes the place of BertSelfAttention and keeps its three linears; there is no padding, so there is no mask."""

    def __init__(self, original: nn.Module, control: _Control, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = original.query, original.key, original.value
        self.up = nn.Linear(WIDTH, 2 * self.key.out_features)
        self.heads, self.dropout = heads, dropout
        self.__dict__["control"] = control  # of all layers, and registered once

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        prefix = self.up(self.control()).chunk(2, dim=-1)
        batch = hidden_states.shape[0]
        q = self.query(hidden_states)
        k, v = (
            torch.cat([p.to(own.dtype).expand(batch, -1, -1), own], dim=1)
            for p, own in zip(prefix, (self.key(hidden_states), self.value(hidden_states)), strict=True)
        )
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2), None


@dataclass(frozen=True)
class _Rows:
    """Some rows of a parameter, as far as benchmarks use one: AdapterHub keeps every layer's W2 in one."""

    whole: nn.Parameter
    rows: slice

    def copy_(self, value: Tensor) -> None:
        self.whole[self.rows].copy_(value)

    @property
    def grad(self) -> Tensor | None:
        return None if self.whole.grad is None else self.whole.grad[self.rows]


class Prefix(Method):
    name, trains = "prefix", "keys and values before a sequence's own"

    def size(self, case: Case) -> int:
        return case.length

    def describe(self, record: dict[str, Any]) -> str:
        return f"prefix of {record['rank_or_bottleneck']}"

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        generator = torch.Generator().manual_seed(case.seed + 4)
        hidden = model.config.hidden_size

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        found = {
            "prefix_tuning.wte.weight": normal(case.length, hidden, std=1.0),
            "prefix_tuning.down.weight": normal(WIDTH, hidden, std=hidden**-0.5),
            "prefix_tuning.down.bias": normal(WIDTH, std=0.1),
        }
        for i in range(len(encoder_layers(model))):
            found[f"encoder.layer.{i}.attention.self.up.weight"] = normal(2 * hidden, WIDTH, std=2 * WIDTH**-0.5)
            found[f"encoder.layer.{i}.attention.self.up.bias"] = normal(2 * hidden, std=0.1)
        return found

    def install(self, model: nn.Module, case: Case) -> Tensors:
        control = _Control(case.length, model.config.hidden_size)
        model.add_module("prefix_tuning", control)
        found = {f"prefix_tuning.{name}": control.get_parameter(name) for name in SHARED}
        heads, dropout = model.config.num_attention_heads, model.config.attention_probs_dropout_prob
        for i, layer in enumerate(encoder_layers(model)):
            attention = _Attention(layer.attention.self, control, heads, dropout)
            layer.attention.self = attention
            found[f"encoder.layer.{i}.attention.self.up.weight"] = attention.up.weight
            found[f"encoder.layer.{i}.attention.self.up.bias"] = attention.up.bias
        return found

    def config(self, case: Case) -> Any:
        return fa.PrefixConfig(length=case.length, bottleneck=WIDTH)

    def hub_config(self, case: Case, model: nn.Module) -> Any:
        import adapters

        return adapters.PrefixTuningConfig(prefix_length=case.length, bottleneck_size=WIDTH, non_linearity="tanh")

    def adapterhub(self, model: nn.Module, name: str, case: Case) -> Tensors:
        model.add_adapter(name, config=self.hub_config(case, model))
        model.train_adapter(name)
        return self.hub_tensors(model, name, case)

    def hub_tensors(self, model: nn.Module, name: str, case: Case) -> Tensors:
        (prefix,) = model.base_model.prefix_tuning.prefix_tunings[name].values()
        down, up = prefix.control_trans[0], prefix.control_trans[2]
        found: dict[str, Any] = dict(
            zip((f"prefix_tuning.{n}" for n in SHARED), (prefix.wte.weight, down.weight, down.bias), strict=True)
        )
        size = 2 * model.config.hidden_size
        for i in range(len(encoder_layers(model))):
            rows = slice(i * size, (i + 1) * size)
            found[f"encoder.layer.{i}.attention.self.up.weight"] = _Rows(up.weight, rows)
            found[f"encoder.layer.{i}.attention.self.up.bias"] = _Rows(up.bias, rows)
        return found


class MixAndMatch(Prefix):
    """A prefix and a parallel adapter; they share no sublayer."""

    name, trains = "mam", "a prefix and parallel adapters"
    standard: ClassVar[dict[str, Any]] = {"bottleneck": 384}
    parallel = BOTTLENECKS["parallel"]

    def size(self, case: Case) -> int:
        return case.bottleneck

    def extra(self, case: Case) -> dict[str, Any]:
        return {"length": case.length}

    def describe(self, record: dict[str, Any]) -> str:
        return f"mam, prefix of {record['length']}, b={record['rank_or_bottleneck']}"

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        return {**super().weights(case, model), **self.parallel.weights(case, model)}

    def install(self, model: nn.Module, case: Case) -> Tensors:
        return {**super().install(model, case), **self.parallel.install(model, case)}

    def config(self, case: Case) -> Any:
        return fa.MAMConfig(prefix=super().config(case), parallel=self.parallel.config(case))

    def hub_config(self, case: Case, model: nn.Module) -> Any:
        import adapters

        return adapters.ConfigUnion(super().hub_config(case, model), self.parallel.hub_config(case, model))

    def hub_tensors(self, model: nn.Module, name: str, case: Case) -> Tensors:
        return {**super().hub_tensors(model, name, case), **self.parallel.hub_tensors(model, name, case)}


METHODS = {"prefix": Prefix(), "mam": MixAndMatch()}
