"""Hugging Face as it comes: eager, SDPA; the base of every ratio."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadapt.bench.methods.base import Tensors
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


def training_step(setup: Setup, model: nn.Module, tensors: Tensors) -> Training:
    """Forward, backward and AdamW over what ``model`` trains; ``tensors`` are those whose gradients are judged."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def loss() -> Tensor:
        return setup.loss(model)

    pending: list[Tensor] = []

    def forward() -> None:
        optimizer.zero_grad(set_to_none=True)
        pending.append(loss())

    def backward() -> None:
        pending.pop().backward()

    return Training(model, {"forward": forward, "backward": backward, "update": optimizer.step}, loss, tensors)


def inference(setup: Setup) -> Inference:
    return no_grad_forward(setup.stock(setup.case.torch_dtype), setup.ids)


def plain(setup: Setup) -> Inference:
    """The case's method written out in plain PyTorch, for methods that no library has."""
    return no_grad_forward(setup.plain(setup.case.torch_dtype).requires_grad_(False), setup.ids)


def plain_training(setup: Setup) -> Training:
    return training_step(setup, *setup.plain_with_tensors())


def training(setup: Setup) -> Training:
    """Full fine-tuning."""
    model = setup.stock()
    return training_step(setup, model, dict(model.named_parameters()))
