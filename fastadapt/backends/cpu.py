"""The C++ kernels for CPUs, compiled at install time; the instruction set is picked at run time.

``FASTADAPT_CPU`` (``portable``, ``avx2``, ``avx512``, ``avx512_bf16``, ``amx``) picks another than the fastest here:
the widest, but ``avx512`` on an Intel processor with AVX512-BF16 and no AMX, which is slow at products of bfloat16.
``amx`` multiplies float32 as sums of three bfloat16 numbers each, which keep all its bits (``csrc/cpu/parts.inl``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastadapt.ops.schemas  # noqa: F401  (defines the ops that the library implements)

_found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
if not _found:
    raise ImportError("the compiled kernels are not there; reinstall fastadapt where a C++ compiler is")
torch.ops.load_library(str(_found[0]))

if os.environ.get("FASTADAPT_CPU"):
    torch.ops.fastadapt_cpu.set_capability(os.environ["FASTADAPT_CPU"])

_MAX_FEATURES, _MAX_RANK, _MAX_ATTENTION_LENGTH, _MAX_HEAD_DIM = torch.ops.fastadapt_cpu.limits()

bottleneck_forward = torch.ops.fastadapt.bottleneck_forward.default
bottleneck_backward = torch.ops.fastadapt.bottleneck_backward.default
bottleneck_rows_forward = torch.ops.fastadapt.bottleneck_rows_forward.default
bottleneck_rows_backward = torch.ops.fastadapt.bottleneck_rows_backward.default
add_norm_forward = torch.ops.fastadapt.add_norm_forward.default
add_norm_backward = torch.ops.fastadapt.add_norm_backward.default
drop = torch.ops.fastadapt.drop.default
mix_forward = torch.ops.fastadapt.mix_forward.default
mix_backward = torch.ops.fastadapt.mix_backward.default
linear_forward = torch.ops.fastadapt.linear_forward.default
linear_backward = torch.ops.fastadapt.linear_backward.default
lora_forward = torch.ops.fastadapt.lora_forward.default
lora_backward = torch.ops.fastadapt.lora_backward.default
attention_forward = torch.ops.fastadapt.attention_forward.default
attention_backward = torch.ops.fastadapt.attention_backward.default
remerge_ = torch.ops.fastadapt.remerge_.default


def refusal(op: str, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
    """Why these kernels can't serve the call; None where they can."""
    if device_type != "cpu":
        return f"the tensors are on {device_type}, not on the CPU"
    if op == "remerge_" and dtype == torch.float16:
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {dtype} (float32 and bfloat16 are served)"
    for name in ("features", "hidden", "bottleneck", "outputs"):
        if facts.get(name) == 0:
            return f"{name} of 0"
    if facts.get("features", facts.get("hidden", 0)) > _MAX_FEATURES:
        return f"{facts.get('features', facts.get('hidden'))} features (up to {_MAX_FEATURES} are served)"
    if facts.get("rank", 0) > _MAX_RANK:
        return f"ranks of {facts['rank']} in all (up to {_MAX_RANK} are served)"
    if op.startswith("attention"):
        if facts.get("length", 0) > _MAX_ATTENTION_LENGTH:
            return f"sequence of {facts['length']} (up to {_MAX_ATTENTION_LENGTH} are served)"
        if facts.get("head_dim", 0) > _MAX_HEAD_DIM:
            return f"head of {facts['head_dim']} (up to {_MAX_HEAD_DIM} are served)"
    return None


def capabilities() -> list[str]:
    """The instruction sets that run here, narrowest first; ``amx_emulated``, for tests, is last."""
    return list(torch.ops.fastadapt_cpu.capabilities())


@contextmanager
def capability(name: str | None = None) -> Iterator[str]:
    """Run with instruction set ``name`` (None: the current one) while the context lasts; yields its name."""
    before = torch.ops.fastadapt_cpu.capability()
    if name is not None:
        torch.ops.fastadapt_cpu.set_capability(name)
    try:
        yield torch.ops.fastadapt_cpu.capability()
    finally:
        torch.ops.fastadapt_cpu.set_capability(before)


def forget(tensors: list[torch.Tensor]) -> int:
    """Drop the packed copies of these tensors; returns how many there were."""
    return torch.ops.fastadapt_cpu.forget(tensors)


@torch.compiler.disable
def _forget_what_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Fused optimizers (the default of Hugging Face's Trainer) write parameters without moving their version counters.
    forget([p for group in optimizer.param_groups for p in group["params"] if p.device.type == "cpu"])


register_optimizer_step_post_hook(_forget_what_stepped)


def release() -> int:
    """Drop every packed copy and every cached page; returns the bytes given back."""
    return torch.ops.fastadapt_cpu.release()
