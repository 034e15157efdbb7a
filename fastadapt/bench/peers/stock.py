"""Hugging Face as it comes: eager, SDPA; the base of every ratio."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadapt.bench.peers import Inference, Training
from fastadapt.bench.setup import Setup

# The step is a real one, and yet a hundred of them leave loss and gradients where they were.
LEARNING_RATE = 1e-8


def no_grad_forward(model: nn.Module, ids: Tensor) -> Inference:
    """``model`` on ``ids`` without autograd."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state

    return Inference(call, lambda output: output)


def training_step(setup: Setup, model: nn.Module, gradients: Callable[[], dict[str, Tensor]]) -> Training:
    """Forward, backward and AdamW over what ``model`` trains."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def loss() -> Tensor:
        return setup.loss(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return Training(model, step, loss, gradients)


def inference(setup: Setup) -> Inference:
    return no_grad_forward(setup.stock(setup.case.torch_dtype), setup.ids)


def training(setup: Setup) -> Training:
    """Full fine-tuning."""
    model = setup.stock()
    return training_step(setup, model, lambda: {n: p.grad for n, p in model.named_parameters()})
