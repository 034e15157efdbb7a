"""One case made ready: models, adapter weights, tokens and labels that all peers of the case share."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.bench.case import Case, class_labels, load_model, token_ids
from fastadapt.bench.methods import method
from fastadapt.bench.methods.base import Tensors


class Setup:
    """Everything that the peers of one case have in common.

    Args:
        case: the cell.
        classifier: a model with a head and dropout (training), or the bare encoder (inference).
        compile_mode: ``default`` or ``max-autotune``, for peers that compile.
    """

    def __init__(self, case: Case, *, classifier: bool = False, compile_mode: str = "default") -> None:
        self.case = case
        self.compile_mode = compile_mode
        self._model = load_model(case, classifier=classifier, dropout=case.dropout if classifier else 0.0)
        self.method = method(case.method)
        self.weights: Tensors = self.method.weights(case, self._model)
        self.ids: Tensor = token_ids(case)

    @cached_property
    def labels(self) -> Tensor:
        return class_labels(self.case)

    def stock(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A copy of the plain model."""
        return copy.deepcopy(self._model).to(self.case.device, dtype)

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A copy with the method written out in plain PyTorch."""
        return self.plain_with_tensors(dtype)[0]

    def plain_with_tensors(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensors]:
        """(that copy, what it trains by name): the method's tensors and a head; the base is frozen."""
        model = copy.deepcopy(self._model).requires_grad_(False)
        tensors = self.method.install(model, self.case)
        self.write(tensors)
        for name, tensor in tensors.items():
            tensor.requires_grad_(not self.method.frozen(name))
        if hasattr(model, "classifier"):
            model.classifier.requires_grad_(True)
        return model.train(self._model.training).to(self.case.device, dtype), tensors

    @cached_property
    def other_weights(self) -> Tensors:
        """Values for a second adaptation of the same method."""
        return {name: value.flip(0) for name, value in self.weights.items()}

    @property
    def parameters(self) -> tuple[int, int]:
        """(parameters that the method adds or trains, its head's and LayerNorms' apart; those of the base)."""
        own = sum(value.numel() for name, value in self.weights.items() if not self.method.frozen(name))
        return own, sum(p.numel() for p in self._model.base_model.parameters())

    def write(self, tensors: Tensors, values: Tensors | None = None) -> None:
        """Give the method's parameters of any library's model the case's values, or others."""
        with torch.no_grad():
            for name, value in (self.weights if values is None else values).items():
                tensors[name].copy_(value)

    def autocast(self) -> AbstractContextManager[Any]:
        """What a training step of this case runs its forward under."""
        if self.case.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.case.device, dtype=self.case.torch_dtype)

    def loss(self, model: nn.Module) -> Tensor:
        """The classifier's cross-entropy on the case's tokens and labels."""
        with self.autocast():
            return model(input_ids=self.ids, labels=self.labels).loss


def threads() -> int:
    """How many CPU threads every system of a run gets."""
    return torch.get_num_threads()


def use_all_cores() -> None:
    """Benchmarks run on every core of this process, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
