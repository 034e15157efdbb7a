"""Triton kernels: NVIDIA GPUs of compute capability 8.0 and up, and CPU tensors in Triton's interpreter.

On a GPU the ops go through ``torch.ops.fastadapt``, so that ``torch.compile`` keeps them as nodes of its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastadapt.backends.triton import bottleneck, bottleneck_rows, launch, linear, lora, merge, mix, norm
from fastadapt.backends.triton.numeric import INTERPRETED
from fastadapt.ops.schemas import library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST_NORM = 8192
_WIDEST_BOTTLENECK = 512
_WIDEST_MIX = 4096


def refusal(op: str, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
    """Why Triton can't serve this call; None where it can."""
    if op.startswith("attention"):
        return "PyTorch's own scaled_dot_product_attention serves attention on a GPU"
    if op == "drop":
        return "PyTorch's own dropout serves on a GPU where nothing is fused with it"
    if dtype not in _DTYPES:
        return f"no Triton kernels in {str(dtype).removeprefix('torch.')}; there are in float32, bfloat16 and float16"
    if facts.get("bottleneck", 0) > _WIDEST_BOTTLENECK:
        return f"bottleneck {facts['bottleneck']} is wider than {_WIDEST_BOTTLENECK}, the widest that a tile holds"
    if op.startswith("mix") and facts.get("adapters", 0) * facts.get("bottleneck", 0) > _WIDEST_MIX:
        given = f"{facts['adapters']} adapters of {facts['bottleneck']}"
        return f"{given} are more than {_WIDEST_MIX} neurons, the most that a program holds"
    if op.startswith("add_norm") and facts.get("hidden", 0) > _WIDEST_NORM:
        return f"hidden {facts['hidden']} is wider than {_WIDEST_NORM}, the widest row that a program holds"
    if device_type == "cpu" and not INTERPRETED.value:
        return "Triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1 before triton is imported)"
    if device_type not in ("cpu", "cuda"):
        return f"no Triton kernels for device {device_type!r}; there are for cuda"
    if device_type == "cuda" and INTERPRETED.value:
        return "Triton's interpreter is on (TRITON_INTERPRET=1) and takes CPU tensors only"
    if device_type == "cuda" and torch.cuda.get_device_properties().major < 8:
        return "Triton kernels need compute capability 8.0"
    return None


def _served(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` as the op's CUDA implementation; the op itself for CUDA tensors, the kernel in the interpreter."""
    if INTERPRETED.value:
        return kernel
    library.impl(name, launch.on_device_of_first(kernel), "CUDA")
    return getattr(torch.ops.fastadapt, name)


bottleneck_forward = _served("bottleneck_forward", bottleneck.forward)
bottleneck_backward = _served("bottleneck_backward", bottleneck.backward)
bottleneck_rows_forward = _served("bottleneck_rows_forward", bottleneck_rows.forward)
bottleneck_rows_backward = _served("bottleneck_rows_backward", bottleneck_rows.backward)
add_norm_forward = _served("add_norm_forward", norm.forward)
add_norm_backward = _served("add_norm_backward", norm.backward)
linear_forward = _served("linear_forward", linear.forward)
linear_backward = _served("linear_backward", linear.backward)
lora_forward = _served("lora_forward", lora.forward)
lora_backward = _served("lora_backward", lora.backward)
mix_forward = _served("mix_forward", mix.forward)
mix_backward = _served("mix_backward", mix.backward)
remerge_ = _served("remerge_", merge.remerge_)
