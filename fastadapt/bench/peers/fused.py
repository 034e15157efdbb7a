"""fastadapt itself: accelerated without adapters, and with the case's method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench.peers import Inference, Training
from fastadapt.bench.peers.stock import no_grad_forward, training_step
from fastadapt.bench.reference import ATTENTION, FFN, NORM_TENSORS, TENSORS
from fastadapt.bench.setup import Setup

NAME = "bench"
CONFIGS = {"houlsby": fa.HoulsbyConfig, "pfeiffer": fa.PfeifferConfig, "parallel": fa.ParallelConfig}
PATHS = {ATTENTION: "attention.output", FFN: "output"}


def _install(setup: Setup) -> nn.Module:
    model = setup.stock()
    fa.adapt(model, CONFIGS[setup.case.method](bottleneck=setup.case.bottleneck), name=NAME)
    tensors = _tensors(model, setup)
    with torch.no_grad():
        for (i, site), weights in setup.weights.items():
            for name in TENSORS:
                tensors[f"{i}.{site}.{name}"].copy_(weights[name])
    return model


def _tensors(model: nn.Module, setup: Setup) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    found = {}
    for i, site in setup.weights:
        path = f"fastadapt.{NAME}.encoder.layer.{i}.{PATHS[site]}"
        for name in TENSORS:
            found[f"{i}.{site}.{name}"] = own[f"{path}.{name}"]
        for name in NORM_TENSORS:
            if f"{path}.{name}" in own:
                found[f"{i}.{site}.{name}"] = own[f"{path}.{name}"]
    return found


def bare(setup: Setup) -> Inference:
    model = setup.stock(setup.case.torch_dtype).requires_grad_(False)
    return no_grad_forward(fa.accelerate(model), setup.ids)


def adapted(setup: Setup) -> Inference:
    model = _install(setup).to(setup.case.torch_dtype).eval().requires_grad_(False)
    return no_grad_forward(model, setup.ids)


def training(setup: Setup) -> Training:
    model = _install(setup)
    tensors = _tensors(model, setup)

    def gradients() -> dict[str, Tensor]:
        return {name: tensor.grad for name, tensor in tensors.items()}

    return training_step(setup, model, gradients)
