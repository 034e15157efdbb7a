"""Functional ops: plain tensors in, plain tensors out, differentiable, in every backend."""

from fastadapt.ops.activations import ACTIVATIONS
from fastadapt.ops.attention import attention
from fastadapt.ops.bottleneck import bottleneck
from fastadapt.ops.bottleneck_rows import Slot, bottleneck_rows
from fastadapt.ops.drop import drop
from fastadapt.ops.linear import linear, lora_linear
from fastadapt.ops.lora import LowRank, LowRanks
from fastadapt.ops.merge import Residue, merge_, swap_, unmerge_
from fastadapt.ops.mix import mix
from fastadapt.ops.norm import add_norm

__all__ = [
    "ACTIVATIONS", "LowRank", "LowRanks", "Residue", "Slot", "add_norm", "attention", "bottleneck", "bottleneck_rows",
    "drop", "linear", "lora_linear", "merge_", "mix", "swap_", "unmerge_",
]  # fmt: skip
