"""Hugging Face PEFT, with the case's weights written into its modules."""

from __future__ import annotations

from torch import nn

import fastadapt as fa
from fastadapt.bench.methods.base import Tensors
from fastadapt.bench.peers import Inference, Merging, Training
from fastadapt.bench.peers.stock import no_grad_forward, training_step
from fastadapt.bench.setup import Setup

NAME, OTHER = "bench", "other"


def install(setup: Setup) -> tuple[nn.Module, Tensors]:
    """(PEFT's model around a float32 model with the case's method, its parameters by name)."""
    import peft

    model = setup.stock()
    config = setup.method.peft_config(setup.case)
    if hasattr(model, "classifier"):
        config.modules_to_save = ["classifier"]
    wrapped = peft.get_peft_model(model, config, adapter_name=NAME)
    tensors = setup.method.peft_tensors(model, NAME, setup.case)
    setup.write(tensors)
    return wrapped.to(setup.case.device), tensors


def adapted_model(setup: Setup) -> nn.Module:
    """In the case's dtype, in evaluation mode, with nothing that trains."""
    return install(setup)[0].to(setup.case.torch_dtype).eval().requires_grad_(False)


def inference(setup: Setup) -> Inference:
    return no_grad_forward(adapted_model(setup), setup.ids)


def merged(setup: Setup) -> Inference:
    model = adapted_model(setup)
    model.merge_adapter()
    return no_grad_forward(model, setup.ids)


def accelerated(setup: Setup) -> Inference:
    return no_grad_forward(fa.accelerate(adapted_model(setup)), setup.ids)


def merging(setup: Setup) -> Merging:
    """PEFT has no swap: it unmerges one and merges the other."""
    model = install(setup)[0]
    model.add_adapter(OTHER, setup.method.peft_config(setup.case))
    setup.write(setup.method.peft_tensors(model, OTHER, setup.case), setup.other_weights)
    model = model.to(setup.case.torch_dtype).eval().requires_grad_(False)

    def swap() -> None:
        model.unmerge_adapter()
        model.merge_adapter([OTHER])

    return Merging(
        matrices=setup.method.matrices(model, setup.case),
        merge=lambda: model.merge_adapter([NAME]),
        swap=swap,
        unmerge=model.unmerge_adapter,
    )


def training(setup: Setup) -> Training:
    return training_step(setup, *install(setup))


def accelerated_training(setup: Setup) -> Training:
    model, tensors = install(setup)
    return training_step(setup, fa.accelerate(model), tensors)
