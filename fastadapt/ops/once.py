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
    penalty would silently have no gradient. What refuses stands between the gradient and everything that it may depend
    on: the incoming gradients and the leaves of the op's graph, because ``autograd.grad`` runs only what lies on a way
    to the tensors that it is asked for. Gradients that carry a tangent, while the forward ran without, raise too.
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
        sources = [g for g in gradients if isinstance(g, Tensor) and g.requires_grad] + _leaves(ctx)
        if isinstance(found, Tensor):
            return _Refuse.apply(found, *sources)
        return tuple(_Refuse.apply(g, *sources) if isinstance(g, Tensor) else g for g in found)

    return once


def _leaves(node: Any) -> list[Tensor]:
    """The leaves that an autograd node's graph ends in."""
    found, seen, left = [], {node}, [node]
    while left:
        for below, _ in left.pop().next_functions:
            if below is None or below in seen:
                continue
            seen.add(below)
            left.append(below)
            if hasattr(below, "variable"):
                found.append(below.variable)
    return found


def _carries_tangent(gradient: Tensor | None) -> bool:
    return gradient is not None and forward_ad.unpack_dual(gradient).tangent is not None


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            "fastadapt's ops can be differentiated once, and a gradient of theirs was differentiated again; accepted "
            "is a model without them (fa.unload, fa.restore)"
        )
