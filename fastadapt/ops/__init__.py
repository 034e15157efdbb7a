"""Functional ops: plain tensors in, plain tensors out, differentiable, in every backend."""

from fastadapt.ops.activations import ACTIVATIONS
from fastadapt.ops.attention import attention
from fastadapt.ops.bottleneck import bottleneck
from fastadapt.ops.drop import drop
from fastadapt.ops.linear import linear
from fastadapt.ops.norm import add_norm

__all__ = ["ACTIVATIONS", "add_norm", "attention", "bottleneck", "drop", "linear"]
