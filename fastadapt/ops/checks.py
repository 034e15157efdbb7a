"""Argument checks that every public op shares. An error names the argument, what was given, what is accepted."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from fastadapt import dispatch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}; a tensor is accepted")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {x.dtype}; accepted are float32, bfloat16, float16 and float64")


def activations(name: str, x: Tensor) -> None:
    """What an op reads as rows: floating, [..., H]."""
    floating(name, x)
    if x.dim() < 1:
        raise ValueError(f"{name}: got a 0-d tensor; accepted is [..., H]")


def shape(name: str, x: Tensor | None, expected: tuple[int, ...], device: torch.device) -> None:
    """Dtype, shape and device of a parameter; None passes."""
    if x is None:
        return
    floating(name, x)
    if x.shape != expected:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted is {expected}")
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, but x is on {device}; move one of them")


def scale(name: str, x: Tensor, hidden: int, device: torch.device) -> None:
    """A scale that is a tensor."""
    accepted = ((), (1,), (hidden,))
    if tuple(x.shape) not in accepted:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted are a float, [1] and [{hidden}]")
    shape(name, x, tuple(x.shape), device)


def like(name: str, x: Tensor | None, reference: Tensor) -> None:
    """Shape and device of an activation that goes beside x."""
    if x is not None:
        shape(name, x, tuple(reference.shape), reference.device)


def flat_like(residual: Tensor, x: Tensor) -> Tensor:
    """What goes beside x as [T, H], for a kernel that checks the rest."""
    if residual.shape != x.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}; accepted is {tuple(x.shape)}")
    return residual.view(-1, x.shape[-1])


def rows(table: Tensor | None, x: Tensor, slot_count: int) -> None:
    """The table that gives every batch row of x [B, ..., K] its slot; None passes."""
    if table is None:
        return
    if not isinstance(table, Tensor) or table.dtype != torch.int64 or tuple(table.shape) != (x.shape[0],):
        given = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"rows: got {given}; accepted is an int64 tensor of shape ({x.shape[0]},), a slot a batch row")
    if table.device != x.device:
        raise ValueError(f"rows: is on {table.device}, but x is on {x.device}; move one of them")
    if table.device.type != "cpu" or torch.compiler.is_compiling():
        return
    slots = table.tolist()  # a batch is short: PyTorch's minimum and maximum take ten times as long
    if slots and not 0 <= min(slots) <= max(slots) < slot_count:
        raise ValueError(f"rows: got {slots}; accepted are slots 0 to {slot_count - 1}")


def number(name: str, value: float, accepted: str = "a number") -> float:
    if type(value) is float:  # nearly always, and asking an abstract class costs a microsecond
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}; accepted is {accepted}")
    return float(value)


def count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}; accepted is an int from 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}; accepted is an int from 1")


def probability(name: str, p: float) -> float:
    p = number(name, p, "a probability from 0 to 1")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: got {p}; accepted is a probability from 0 to 1")
    return p


def epsilon(name: str, eps: float) -> float:
    eps = number(name, eps, "a number from 0")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{name}: got {eps}; accepted is a number from 0")
    return eps


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an op computes in: autocast's where it is on for x's device (float64 stays), else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def flatten(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., H] as a contiguous [T, H] in ``dtype``; no copy where it already is one."""
    if x.dtype == dtype and x.is_contiguous():
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # three calls of PyTorch's are three microseconds
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether a call needs the op's own backward; under a transform PyTorch differentiates the reference itself."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted and not dispatch.transformed()
