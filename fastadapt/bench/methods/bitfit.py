"""BitFit: every bias of the encoder and its head; LayerNorm-only tuning, whose weights train too; the head alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.bench.methods.base import Method, Tensors, encoder_layers


class Own(Method):
    """Parameters that the base has already; no library adapts them, so the peer is plain PyTorch."""

    inference_peers = training_peers = ("plain",)

    def size(self, case: Case) -> int:
        return 0

    def describe(self, record: dict[str, Any]) -> str:
        return self.name

    def own(self, model: nn.Module) -> Tensors:
        """The base's parameters that train."""
        raise NotImplementedError

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        generator = torch.Generator().manual_seed(case.seed + 3)
        return {
            name: own.detach() + 0.2 * torch.randn(own.shape, generator=generator)
            for name, own in self.own(model).items()
        }

    def install(self, model: nn.Module, case: Case) -> Tensors:
        return self.own(model)


class BitFit(Own):
    name, trains = "bitfit", "every bias"

    def own(self, model: nn.Module) -> Tensors:
        return {name: p for name, p in model.base_model.named_parameters() if name.endswith("bias")}

    def silent(self, name: str) -> bool:
        return name.endswith("attention.self.key.bias")  # softmax takes no notice of it

    def config(self, case: Case) -> Any:
        return fa.BitFitConfig()


class LayerNorm(Own):
    name, trains = "layernorm", "the encoder's LayerNorms"

    def own(self, model: nn.Module) -> Tensors:
        return {
            f"encoder.layer.{i}.{name}": p
            for i, layer in enumerate(encoder_layers(model))
            for name, p in layer.named_parameters()
            if ".LayerNorm." in name
        }

    def config(self, case: Case) -> Any:
        return fa.LayerNormConfig()


class Head(Own):
    name, trains = "head", "the head alone"
    judged_batch = 32

    def own(self, model: nn.Module) -> Tensors:
        head = getattr(model, "classifier", None)
        return {} if head is None else {f"head.{name}": p for name, p in head.named_parameters()}

    def config(self, case: Case) -> Any:
        return fa.HeadConfig()

    def adapt(self, model: nn.Module, name: str, case: Case) -> Tensors:
        if hasattr(model, "classifier"):
            return super().adapt(model, name, case)
        fa.accelerate(model)  # the bare encoder has no head, and runs as it does under one
        return {}


METHODS = {"bitfit": BitFit(), "layernorm": LayerNorm(), "head": Head()}
