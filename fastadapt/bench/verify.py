"""Right before fast: how a system's output or gradients are judged.

fastadapt is right where its distance from a float64 reference is at most twice that of plain eager PyTorch in the same
dtype, in the mean over everything and in the worst part (a token's hidden state, a parameter's gradient): the tolerance
follows from dtype and shape, nobody chooses it. A peer has eight times instead, because a runtime that approximates erf
or exp is off by a few last bits and should be measured, not dismissed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OWN_FACTOR = 2.0
PEER_FACTOR = 8.0


@dataclass(frozen=True)
class Distance:
    """Relative distances from the reference: over everything, and of the worst part."""

    overall: float
    worst: float


@dataclass(frozen=True)
class Verdict:
    """Whether a system computes what the reference computes, and the figures that say so."""

    correct: bool
    error: float
    tolerance: float

    def __str__(self) -> str:
        return f"error {self.error:.1e}, allowed {self.tolerance:.1e}"


def hidden_state_distance(output: Tensor, reference: Tensor) -> Distance:
    """Of hidden states [B, S, H]; parts are tokens."""
    if output.shape != reference.shape:
        return Distance(float("inf"), float("inf"))
    difference = (output.double() - reference.double()).flatten(0, -2)
    size = reference.double().flatten(0, -2).norm(dim=-1)
    per_token = difference.norm(dim=-1) / size
    return Distance(float(difference.norm() / size.norm()), float(per_token.max()))


def tensor_distance(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> Distance:
    """Of gradients or weights by name, which are the parts. One missing or of another shape is infinitely wrong."""
    parts = []
    for name, expected in reference.items():
        got = tensors.get(name)
        if got is None or got.shape != expected.shape:
            return Distance(float("inf"), float("inf"))
        parts.append((got.double() - expected.double()).norm() / expected.double().norm())
    each = torch.stack(parts)
    return Distance(float(each.square().mean().sqrt()), float(each.max()))


def judge(measured: Distance, yardstick: Distance, factor: float = OWN_FACTOR) -> Verdict:
    """``measured`` against ``factor`` times ``yardstick``; NaN anywhere is wrong."""
    for ours, eager in ((measured.overall, yardstick.overall), (measured.worst, yardstick.worst)):
        allowed = factor * eager
        if not ours <= allowed:
            return Verdict(False, ours, allowed)
    return Verdict(True, measured.overall, factor * yardstick.overall)
