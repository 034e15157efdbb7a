"""AdapterHub's `adapters`, with the case's weights written into its modules."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from fastadapt.bench.case import UserError
from fastadapt.bench.peers import Inference, Training
from fastadapt.bench.peers.stock import no_grad_forward, training_step
from fastadapt.bench.reference import ACTIVATION, ATTENTION, FFN, SCALE, TENSORS, Weights, encoder_layers
from fastadapt.bench.setup import Setup

NAME = "bench"
PRESETS = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn", "parallel": "par_bn"}


def _install(model: nn.Module, setup: Setup) -> nn.Module:
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns that no adapter is active while one is added
    import adapters

    case, hidden = setup.case, model.config.hidden_size
    if hidden % case.bottleneck:
        raise UserError(f"adapterhub: --bottleneck must divide the hidden size {hidden}; got {case.bottleneck}")
    adapters.init(model)
    config = adapters.AdapterConfig.load(
        PRESETS[case.method],
        reduction_factor=hidden / case.bottleneck,
        non_linearity=ACTIVATION[case.method],
        scaling=SCALE[case.method],
    )
    model.add_adapter(NAME, config=config)
    model.train_adapter(NAME)
    tensors = _tensors(model, setup.weights)
    with torch.no_grad():
        for (i, site), weights in setup.weights.items():
            for name in TENSORS:
                tensors[f"{i}.{site}.{name}"].copy_(weights[name])
    return model


def _tensors(model: nn.Module, weights: Weights) -> dict[str, nn.Parameter]:
    found = {}
    for i, site in weights:
        layer = encoder_layers(model)[i]
        adapter = {ATTENTION: layer.attention.output, FFN: layer.output}[site].adapters[NAME]
        for prefix, linear in (("down", adapter.adapter_down[0]), ("up", adapter.adapter_up)):
            found[f"{i}.{site}.{prefix}.weight"] = linear.weight
            found[f"{i}.{site}.{prefix}.bias"] = linear.bias
    return found


def adapted_model(setup: Setup) -> nn.Module:
    """In the case's dtype, in evaluation mode, with nothing that trains."""
    model = _install(setup.stock(), setup).to(setup.case.device, setup.case.torch_dtype)
    return model.eval().requires_grad_(False)


def inference(setup: Setup) -> Inference:
    return no_grad_forward(adapted_model(setup), setup.ids)


def training(setup: Setup) -> Training:
    model = _install(setup.stock(), setup).to(setup.case.device)
    tensors = _tensors(model, setup.weights)

    def gradients() -> dict[str, Tensor]:
        return {name: tensor.grad for name, tensor in tensors.items()}

    return training_step(setup, model, gradients)
