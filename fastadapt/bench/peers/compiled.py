"""torch.compile with frozen weights, of the stock model and of the peers' own: what a PyTorch user would try first."""

from __future__ import annotations

from torch import Tensor, nn

from fastadapt.bench.peers import Inference
from fastadapt.bench.setup import Setup


def _compiled(setup: Setup, model: nn.Module) -> Inference:
    import torch._inductor.config

    torch._dynamo.reset()  # a graph of another case's shapes would turn this one dynamic
    graph = torch.compile(model, mode=setup.compile_mode, dynamic=False)

    def call() -> Tensor:
        # Freezing folds parameters into the graph as constants; inductor reads the switch when it compiles.
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return graph(input_ids=setup.ids).last_hidden_state

    call()

    def run() -> Tensor:
        with torch.no_grad():
            return graph(input_ids=setup.ids).last_hidden_state

    return Inference(run, lambda output: output)


def stock(setup: Setup) -> Inference:
    return _compiled(setup, setup.stock(setup.case.torch_dtype).requires_grad_(False))


def adapterhub(setup: Setup) -> Inference:
    from fastadapt.bench.peers.adapterhub import adapted_model

    return _compiled(setup, adapted_model(setup))


def peft(setup: Setup) -> Inference:
    from fastadapt.bench.peers.peft import adapted_model

    return _compiled(setup, adapted_model(setup))
