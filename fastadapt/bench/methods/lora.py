"""LoRA: y = W x + b + s·B A drop(x), s = α/r, in any of a layer's six linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Method, Tensors, encoder_layers
from fastadapt.config.lora import TARGETS
from fastadapt.errors import UserError

ALPHA = 8
PATHS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
A, B = "lora_A.weight", "lora_B.weight"


def spoken(targets: Sequence[str]) -> str:
    """``all six`` or the targets' names."""
    return "all six" if len(targets) == len(TARGETS) else ", ".join(targets)


def places(layers: nn.ModuleList, case: Case) -> list[tuple[int, str]]:
    """(layer, path in it) of every target."""
    return [(i, PATHS[target]) for i in range(len(layers)) for target in case.targets]


class _Linear(nn.Module):
    """Takes the place of a linear, which it holds."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), self.a), self.b)


class LoRA(Method):
    name, trains = "lora", "low-rank updates of linears"
    has_rank = True
    merges = True
    inference_peers = ("peft",)
    training_peers = ("peft",)

    def size(self, case: Case) -> int:
        return case.rank

    def extra(self, case: Case) -> dict[str, Any]:
        return {"targets": list(case.targets)}

    def describe(self, record: dict[str, Any]) -> str:
        return f"lora r={record['rank_or_bottleneck']} on {spoken(record['targets'])}"

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        """s·B A x has a good third of the size of W x for x of the size that a LayerNorm gives it."""
        generator = torch.Generator().manual_seed(case.seed + 3)
        scale, found = ALPHA / case.rank, {}
        layers = encoder_layers(model)
        for i, path in places(layers, case):
            base = layers[i].get_submodule(path)
            a = torch.randn(case.rank, base.in_features, generator=generator)
            b = torch.randn(base.out_features, case.rank, generator=generator)
            found[f"encoder.layer.{i}.{path}.{A}"] = a * base.in_features**-0.5
            found[f"encoder.layer.{i}.{path}.{B}"] = b * (0.2 * case.rank**-0.5 / scale)
        return found

    def install(self, model: nn.Module, case: Case) -> Tensors:
        layers, found = encoder_layers(model), {}
        for i, path in places(layers, case):
            linear = _Linear(layers[i].get_submodule(path), case.rank, ALPHA / case.rank, case.lora_dropout)
            layers[i].set_submodule(path, linear)
            found[f"encoder.layer.{i}.{path}.{A}"] = linear.a
            found[f"encoder.layer.{i}.{path}.{B}"] = linear.b
        return found

    def config(self, case: Case) -> Any:
        return fa.LoRAConfig(r=case.rank, alpha=ALPHA, targets=case.targets, dropout=case.lora_dropout)

    def adapterhub(self, model: nn.Module, name: str, case: Case) -> Tensors:
        import adapters

        if "attention_output" in case.targets:
            raise UserError("adapterhub: has no LoRA on attention_output; --targets accepts the others")
        attention = [target[0] for target in ("query", "key", "value") if target in case.targets]
        config = adapters.LoRAConfig(
            selfattn_lora=bool(attention),
            intermediate_lora="intermediate" in case.targets,
            output_lora="output" in case.targets,
            attn_matrices=attention,
            r=case.rank,
            alpha=ALPHA,
            dropout=case.lora_dropout,
        )
        model.add_adapter(name, config=config)
        model.train_adapter(name)
        layers, found = encoder_layers(model), {}
        for i, path in places(layers, case):
            own = layers[i].get_submodule(path).loras[name]
            found[f"encoder.layer.{i}.{path}.{A}"] = own.lora_A
            found[f"encoder.layer.{i}.{path}.{B}"] = own.lora_B
        return found

    def peft_config(self, case: Case) -> Any:
        from peft import LoraConfig

        paths = "|".join(PATHS[target].replace(".", r"\.") for target in case.targets)
        return LoraConfig(
            r=case.rank,
            lora_alpha=ALPHA,
            lora_dropout=case.lora_dropout,
            target_modules=rf".*encoder\.layer\.\d+\.({paths})",  # a list would match by suffix
        )

    def peft_tensors(self, model: nn.Module, name: str, case: Case) -> Tensors:
        layers, found = encoder_layers(model), {}
        for i, path in places(layers, case):
            own = layers[i].get_submodule(path)
            found[f"encoder.layer.{i}.{path}.{A}"] = own.lora_A[name].weight
            found[f"encoder.layer.{i}.{path}.{B}"] = own.lora_B[name].weight
        return found

    def matrices(self, model: nn.Module, case: Case) -> Tensors:
        """The base's weights that a merge changes, in a model of any of the libraries, by path."""
        layers, found = encoder_layers(model), {}
        for i, path in places(layers, case):
            linear = layers[i].get_submodule(path)
            found[f"encoder.layer.{i}.{path}.weight"] = getattr(linear, "base_layer", linear).weight
        return found


METHODS = {"lora": LoRA()}
