"""For backward functions that have no derivative themselves: a second differentiation is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastadapt import dispatch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's, but gradients made under ``create_graph=True`` raise whenever they are differentiated.

    PyTorch's gives back constants where the incoming gradient is one (that of a plain sum is), and so a gradient
    penalty would silently have no gradient. Gradients that carry a tangent, while the forward ran without, raise too.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        if dispatch.transformed() and any(map(_carries_tangent, gradients)):
            raise NotImplementedError(
                "forward-mode AD through the backward of a fastadapt op whose forward ran outside of it; accepted is "
                "to run both inside of it, or a model without the op (fa.unload, fa.restore)"
            )
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        if isinstance(found, Tensor):
            return _guarded(found)
        return tuple(_guarded(g) if isinstance(g, Tensor) else g for g in found)

    return once


def _carries_tangent(gradient: Tensor | None) -> bool:
    return gradient is not None and forward_ad.unpack_dual(gradient).tangent is not None


def _guarded(gradient: Tensor) -> Tensor:
    return _Refuse.apply(gradient.detach().requires_grad_())


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "fastadapt's ops can be differentiated once, and a gradient of theirs was differentiated again; accepted "
            "is a model without them (fa.unload, fa.restore)"
        )
