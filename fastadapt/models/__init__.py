"""The wiring of architectures: the only folder that knows transformers. One row, one file an architecture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from fastadapt.models.wiring import Wiring

# config.model_type -> the module that wires it; imported at first need, because it imports transformers' code.
_WIRED: dict[str, str] = {
    "bert": "fastadapt.models.bert",
    "roberta": "fastadapt.models.roberta",
    "electra": "fastadapt.models.electra",
}


def wiring_of(model: nn.Module) -> Wiring:
    """The wiring of a model's architecture; raises ``TypeError`` or ``ValueError`` that lists the wired ones."""
    wired = ", ".join(_WIRED)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise TypeError(f"model: got {type(model).__name__}; accepted is a Hugging Face model of type {wired}")
    if model_type not in _WIRED:
        raise ValueError(f"model: got {type(model).__name__} of type {model_type!r}; wired are {wired}")
    return importlib.import_module(_WIRED[model_type]).WIRING
