"""AdapterHub's `adapters`, with the case's weights written into its modules."""

from __future__ import annotations

import logging

from torch import nn

from fastadapt.bench.methods.base import Tensors
from fastadapt.bench.peers import Inference, Training
from fastadapt.bench.peers.stock import no_grad_forward, training_step
from fastadapt.bench.setup import Setup

NAME = "bench"


def _install(setup: Setup) -> tuple[nn.Module, Tensors]:
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns that no adapter is active while one is added
    import adapters

    model = setup.stock()
    adapters.init(model)
    tensors = setup.method.adapterhub(model, NAME, setup.case)
    setup.write(tensors)
    return model.to(setup.case.device), tensors


def adapted_model(setup: Setup) -> nn.Module:
    """In the case's dtype, in evaluation mode, with nothing that trains."""
    return _install(setup)[0].to(setup.case.torch_dtype).eval().requires_grad_(False)


def inference(setup: Setup) -> Inference:
    return no_grad_forward(adapted_model(setup), setup.ids)


def training(setup: Setup) -> Training:
    return training_step(setup, *_install(setup))
