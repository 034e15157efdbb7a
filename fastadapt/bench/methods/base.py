"""What a method says about itself, so that every benchmark can measure it in every library."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench.case import Case
from fastadapt.errors import UserError

Tensors = dict[str, Tensor]


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The encoder's layers of a BERT, RoBERTa or ELECTRA, with or without a head."""
    return model.base_model.encoder.layer


def own_tensors(model: nn.Module, name: str) -> Tensors:
    """The parameters of adaptation ``name`` in a model of ``fa.adapt``, without their prefix."""
    prefix = f"fastadapt.{name}."
    return {key.removeprefix(prefix): p for key, p in model.named_parameters() if key.startswith(prefix)}


class Method:
    """One method of adaptation.

    Its tensors have the same names in all libraries: their paths in fastadapt's state, without the adaptation's prefix.

    Attributes:
        name: what ``--method`` and the JSON call it.
        standard: fields of a case that ``bench methods`` sets for it.
        has_rank: whether ``--rank`` is its size.
        merges: whether it can be merged into the base's weights, and so has a merged form that is measured as well.
        trains: what it trains, in a few words.
        judged_batch: rows, at least, of the check of gradients, where so few numbers are judged that chance would.
        inference_peers, training_peers: what it is compared with where ``--peers`` does not say.
    """

    name: str
    trains: str
    standard: ClassVar[dict[str, Any]] = {}
    has_rank = False
    merges = False
    judged_batch = 1
    inference_peers: tuple[str, ...] = ("adapterhub", "compile", "adapterhub-compile")
    training_peers: tuple[str, ...] = ("adapterhub",)

    def size(self, case: Case) -> int:
        """``rank_or_bottleneck`` of its records."""
        return case.bottleneck

    def idle_layers(self, case: Case) -> int:
        """How many layers, from the input, the method leaves as they were."""
        return 0

    def extra(self, case: Case) -> dict[str, Any]:
        """What its records say beyond the common columns."""
        return {}

    def describe(self, record: dict[str, Any]) -> str:
        """What tables and captions call the method of ``record``."""
        return f"{self.name} b={record['rank_or_bottleneck']}"

    def weights(self, case: Case, model: nn.Module) -> Tensors:
        """Float32 values of every tensor it adds, large enough that leaving one out shows in the output."""
        raise NotImplementedError

    def install(self, model: nn.Module, case: Case) -> Tensors:
        """Put the method's equation into a stock model in plain PyTorch, in place.

        In float64 the result is the oracle, in the case's dtype the yardstick. Returns the parameters that it trains:
        those of :meth:`weights`, to be written by the caller, and any of the base's own that train with them.
        """
        raise NotImplementedError

    def frozen(self, name: str) -> bool:
        """Whether tensor ``name`` stays as it is in training."""
        return False

    def silent(self, name: str) -> bool:
        """Whether the gradient of tensor ``name`` is zero but for rounding, and so cannot be judged."""
        return False

    def config(self, case: Case) -> Any:
        """fastadapt's configuration."""
        raise NotImplementedError

    def adapt(self, model: nn.Module, name: str, case: Case) -> Tensors:
        """``fa.adapt`` with it; its parameters, the head's among them, by this method's names."""
        fa.adapt(model, self.config(case), name=name)
        return own_tensors(model, name)

    def adapterhub(self, model: nn.Module, name: str, case: Case) -> Tensors:
        """Add and train it in a model of ``adapters.init``; its parameters, by this method's names."""
        raise UserError(f"adapterhub: has no {self.name}")

    def peft_config(self, case: Case) -> Any:
        """PEFT's configuration."""
        raise UserError(f"peft: has no {self.name}")

    def peft_tensors(self, model: nn.Module, name: str, case: Case) -> Tensors:
        """The parameters of adapter ``name`` in the model that PEFT has changed, by this method's names."""
        raise NotImplementedError
