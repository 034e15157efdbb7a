"""Nonlinearities of the bottleneck and of the feed-forward network, with their derivatives.

Every backend implements exactly this table; the names follow Hugging Face's ``ACT2FN``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The names other libraries write for the same function.
_ALIASES = {
    "swish": "silu",
    "linear": "none",
    "identity": "none",
    "leakyrelu": "leaky_relu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}

_LEAKY_SLOPE = 0.01
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _d_relu(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _d_leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, _LEAKY_SLOPE).to(x.dtype)


def _d_gelu(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))) + x * density


def _d_gelu_new(x: Tensor) -> Tensor:
    t = torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    inner = _SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner


def _d_silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _d_tanh(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return 1.0 - t * t


def _d_sigmoid(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 - s)


_TABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, torch.ones_like),
    "relu": (F.relu, _d_relu),
    "gelu": (F.gelu, _d_gelu),
    "gelu_new": (_gelu_new, _d_gelu_new),
    "silu": (F.silu, _d_silu),
    "tanh": (torch.tanh, _d_tanh),
    "sigmoid": (torch.sigmoid, _d_sigmoid),
    "leaky_relu": (lambda x: F.leaky_relu(x, _LEAKY_SLOPE), _d_leaky_relu),
}

ACTIVATIONS: tuple[str, ...] = tuple(_TABLE)


def canonical(name: str) -> str:
    """The table's name for ``name``; raises ``ValueError`` that lists what is accepted."""
    key = name.lower() if isinstance(name, str) else ""
    key = _ALIASES.get(key, key)
    if key not in _TABLE:
        accepted = ", ".join(sorted({*_TABLE, *_ALIASES}))
        raise ValueError(f"activation: got {name!r}; accepted are {accepted}")
    return key


def activate(name: str, x: Tensor) -> Tensor:
    """σ(x), elementwise, in x's dtype."""
    return _TABLE[name][0](x)


def derivative(name: str, x: Tensor) -> Tensor:
    """σ'(x), elementwise, in x's dtype."""
    return _TABLE[name][1](x)
