"""Bottleneck adapters, read off their equations.

    Houlsby    y = LN(A1(f) + f + x)          after the attention output and after the FFN output
    Pfeiffer   y = LN(f + A1(LN(f + x)) + x)  after the FFN output
    Parallel   y = LN(f + s·A1(x) + x)        beside the FFN

with f the sublayer's output after its dropout, x its input and A1(u) = W_up σ(W_down u + b_down) + b_up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import get_activation

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Method, Tensors, encoder_layers
from fastadapt.errors import UserError

ATTENTION, FFN = "attention.output", "output"
TENSORS = ("down.weight", "down.bias", "up.weight", "up.bias")


class Bottleneck(Method):
    """One preset.

    Args:
        name: of the method.
        config: fastadapt's configuration class.
        hub: AdapterHub's name for it.
        sites: paths in a layer.
        activation: σ.
        scale: s.
        norms: whether the sublayers' LayerNorms train too (AdapterHub leaves them frozen).
    """

    def __init__(
        self, name: str, config: type, hub: str, sites: tuple[str, ...], activation: str, scale: float, norms: bool
    ) -> None:
        self.name, self.preset, self.hub, self.sites = name, config, hub, sites
        self.trains = "adapters, LayerNorms" if norms else "adapters"
        self.activation, self.scale, self.norms = activation, scale, norms

    def layers(self, case: Case, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        """The layers that have adapters, with their numbers."""
        return enumerate(encoder_layers(model))

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        generator = torch.Generator().manual_seed(case.seed + 3)
        hidden, b = model.config.hidden_size, case.bottleneck

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        found = {}
        for i, _ in self.layers(case, model):
            for site in self.sites:
                path = f"encoder.layer.{i}.{site}"
                found[f"{path}.down.weight"] = normal(b, hidden, std=hidden**-0.5)
                found[f"{path}.down.bias"] = normal(b, std=0.1)
                found[f"{path}.up.weight"] = normal(hidden, b, std=0.5 * b**-0.5 / self.scale)
                found[f"{path}.up.bias"] = normal(hidden, std=0.05)
        return found

    def install(self, model: nn.Module, case: Case) -> Tensors:
        found = {}
        for i, layer in self.layers(case, model):
            for site in self.sites:
                owner = layer.get_submodule(site.rpartition(".")[0])
                owner.output = _Sublayer(owner.output, self, case.bottleneck)
                for name in (*TENSORS, *(("LayerNorm.weight", "LayerNorm.bias") if self.norms else ())):
                    found[f"encoder.layer.{i}.{site}.{name}"] = owner.output.get_parameter(name)
        return found

    def config(self, case: Case) -> Any:
        return self.preset(bottleneck=case.bottleneck)

    def adapterhub(self, model: nn.Module, name: str, case: Case) -> Tensors:
        model.add_adapter(name, config=self.hub_config(case, model))
        model.train_adapter(name)
        return self.hub_tensors(model, name, case)

    def hub_config(self, case: Case, model: nn.Module) -> Any:
        """AdapterHub's configuration."""
        import adapters

        hidden = model.config.hidden_size
        if hidden % case.bottleneck:
            raise UserError(f"adapterhub: --bottleneck must divide the hidden size {hidden}; got {case.bottleneck}")
        used = [i for i, _ in self.layers(case, model)]
        return adapters.AdapterConfig.load(
            self.hub,
            reduction_factor=hidden / case.bottleneck,
            non_linearity=self.activation,
            scaling=self.scale,
            leave_out=[i for i in range(len(encoder_layers(model))) if i not in used],
        )

    def hub_tensors(self, model: nn.Module, name: str, case: Case) -> Tensors:
        found = {}
        for i, layer in self.layers(case, model):
            for site in self.sites:
                adapter = layer.get_submodule(site).adapters[name]
                for prefix, linear in (("down", adapter.adapter_down[0]), ("up", adapter.adapter_up)):
                    found[f"encoder.layer.{i}.{site}.{prefix}.weight"] = linear.weight
                    found[f"encoder.layer.{i}.{site}.{prefix}.bias"] = linear.bias
        return found


class _Sublayer(nn.Module):
    """Takes the place of BertSelfOutput or BertOutput and keeps its dense, dropout and LayerNorm."""

    def __init__(self, original: nn.Module, method: Bottleneck, b: int) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = original.dense, original.dropout, original.LayerNorm
        hidden = self.dense.out_features
        self.preset, self.scale = method.preset, method.scale
        self.down, self.up = nn.Linear(hidden, b), nn.Linear(b, hidden)
        self.activation: Callable[[Tensor], Tensor] = get_activation(method.activation)

    def adapter(self, u: Tensor) -> Tensor:
        return self.up(self.activation(self.down(u)))

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        f, x = self.dropout(self.dense(hidden_states)), input_tensor
        if self.preset is fa.HoulsbyConfig:
            return self.LayerNorm(self.adapter(f) + f + x)
        if self.preset is fa.PfeifferConfig:
            return self.LayerNorm(f + self.adapter(self.LayerNorm(f + x)) + x)
        return self.LayerNorm(f + self.scale * self.adapter(x) + x)


class Parallel(Bottleneck):
    standard: ClassVar[dict[str, Any]] = {"bottleneck": 384}


class Dropped(Bottleneck):
    """AdapterDrop, specialised: the first layers have no adapters and keep their LayerNorms."""

    training_peers = ("undropped", "adapterhub")

    def layers(self, case: Case, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        count = len(encoder_layers(model))
        if case.drop >= count:
            raise UserError(f"--drop: got {case.drop}; accepted are 0 to {count - 1}, less than the model's layers")
        return islice(enumerate(encoder_layers(model)), case.drop, None)

    def idle_layers(self, case: Case) -> int:
        return case.drop

    def extra(self, case: Case) -> dict[str, Any]:
        return {"drop": case.drop}

    def describe(self, record: dict[str, Any]) -> str:
        return f"houlsby b={record['rank_or_bottleneck']}, {record['drop']} layers dropped"

    def config(self, case: Case) -> Any:
        return self.preset(bottleneck=case.bottleneck, drop=fa.AdapterDrop("specialised", n=case.drop))


METHODS = {
    method.name: method
    for method in (
        Bottleneck("houlsby", fa.HoulsbyConfig, "double_seq_bn", (ATTENTION, FFN), "gelu", 1.0, True),
        Bottleneck("pfeiffer", fa.PfeifferConfig, "seq_bn", (FFN,), "relu", 1.0, False),
        Parallel("parallel", fa.ParallelConfig, "par_bn", (FFN,), "relu", 4.0, False),
        Dropped("adapterdrop", fa.HoulsbyConfig, "double_seq_bn", (ATTENTION, FFN), "gelu", 1.0, True),
    )
}
