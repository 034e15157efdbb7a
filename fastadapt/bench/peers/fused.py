"""fastadapt itself: accelerated without adapters, and with the case's method, unmerged and merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

import fastadapt as fa
from fastadapt.bench.methods.base import Tensors, encoder_layers
from fastadapt.bench.peers import Inference, Merging, Training
from fastadapt.bench.peers.stock import no_grad_forward, training_step
from fastadapt.bench.setup import Setup
from fastadapt.errors import UserError

NAME, OTHER = "bench", "other"


def install(setup: Setup) -> tuple[nn.Module, Tensors]:
    """(a float32 model with the case's method, its parameters by name)."""
    model = setup.stock()
    tensors = setup.method.adapt(model, NAME, setup.case)
    setup.write(tensors)
    return model, tensors


def with_another(setup: Setup) -> nn.Module:
    """As :func:`install`, ready for inference, with a second adaptation of other values; :data:`NAME` is active."""
    model, _ = install(setup)
    setup.write(setup.method.adapt(model, OTHER, setup.case), setup.other_weights)
    return fa.activate(_ready(setup, model), NAME)


def _ready(setup: Setup, model: nn.Module) -> nn.Module:
    return model.to(setup.case.torch_dtype).eval().requires_grad_(False)


def bare(setup: Setup) -> Inference:
    return no_grad_forward(fa.accelerate(_ready(setup, setup.stock())), setup.ids)


def adapted(setup: Setup) -> Inference:
    return no_grad_forward(_ready(setup, install(setup)[0]), setup.ids)


def merged(setup: Setup) -> Inference:
    return no_grad_forward(fa.merge(_ready(setup, install(setup)[0]), NAME), setup.ids)


def swapped(setup: Setup) -> Inference:
    """Merged by a swap from another adaptation."""
    model = fa.merge(with_another(setup), OTHER)
    return no_grad_forward(fa.swap(model, NAME), setup.ids)


def merging(setup: Setup) -> Merging:
    model = with_another(setup)
    return Merging(
        matrices=setup.method.matrices(model, setup.case),
        merge=lambda: fa.merge(model, NAME),
        swap=lambda: fa.swap(model, OTHER),
        unmerge=lambda: fa.unmerge(model),
    )


def training(setup: Setup) -> Training:
    return training_step(setup, *install(setup))


def all_positions(setup: Setup) -> Training:
    """With all positions in the last layer too, of which the classifier reads the first."""
    model, tensors = install(setup)
    last = encoder_layers(model)[-1]
    last.forward = last.forward  # a forward of its own might look at any of them
    return training_step(setup, model, tensors)


def undropped(setup: Setup) -> Training:
    """AdapterDrop's step with no layer dropped."""
    if setup.case.method != "adapterdrop":
        raise UserError(f"undropped: serves --method adapterdrop; got {setup.case.method}")
    whole = Setup(dataclasses.replace(setup.case, method="houlsby"), classifier=True)
    return training_step(whole, *install(whole))


def switching(setup: Setup) -> Callable[[], None]:
    """From one adaptation to another and back."""
    model = with_another(setup)

    def call() -> None:
        fa.activate(model, OTHER)
        fa.activate(model, NAME)

    return call
