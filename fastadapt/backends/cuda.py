"""The CUDA C++ kernels, compiled at install time where torch has CUDA and nvcc is there.

Forms for compute capability 8.0 and up: merging over a table of pointers, and the forward of the bottleneck and of
add + LayerNorm for few rows, each in one launch. ``FASTADAPT_CUDA=emulated`` runs the same kernels on CPU tensors,
block by block, for tests; nothing else does.
"""

from __future__ import annotations

import os
from typing import Any

import torch

import fastadapt.backends.cpu  # noqa: F401  (loads the compiled library)
from fastadapt import proven
from fastadapt.ops.schemas import CUDA_OPS

EMULATED = os.environ.get("FASTADAPT_CUDA") == "emulated"
if not EMULATED and not torch._C._dispatch_has_kernel_for_dispatch_key("fastadapt_cuda::bottleneck_forward", "CUDA"):
    raise ImportError("the CUDA C++ kernels were not compiled; reinstall fastadapt where torch has CUDA and nvcc is")

_WIDEST_HIDDEN = 8192  # a row lies in shared memory
_WIDEST_BOTTLENECK = 4096
_PROVEN = {architecture: entry["ops"] for architecture, entry in proven.table()["cuda"].items()}
_FEW_ROWS = 512  # above, matrix instructions win, which the Triton kernels have

bottleneck_forward = torch.ops.fastadapt_cuda.bottleneck_forward.default
add_norm_forward = torch.ops.fastadapt_cuda.add_norm_forward.default
remerge_ = torch.ops.fastadapt_cuda.remerge_.default


def refusal(op: str, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
    """Why these kernels can't serve the call; None where they can."""
    if op not in CUDA_OPS:
        return f"no CUDA C++ kernel for {op}; there are for {', '.join(CUDA_OPS)}"
    if device_type != ("cpu" if EMULATED else "cuda"):
        only = "CPU tensors only while emulated (FASTADAPT_CUDA=emulated)" if EMULATED else "CUDA tensors only"
        return f"the tensors are on {device_type}; CUDA C++ kernels take {only}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no CUDA C++ kernels in {str(dtype).removeprefix('torch.')}; there are in float32, bfloat16 and float16"
    if facts.get("hidden", 0) > _WIDEST_HIDDEN:
        return f"hidden {facts['hidden']} is wider than {_WIDEST_HIDDEN}, the widest row that shared memory holds"
    if facts.get("bottleneck", 0) > _WIDEST_BOTTLENECK:
        return f"bottleneck {facts['bottleneck']} is wider than {_WIDEST_BOTTLENECK}"
    if device_type == "cuda" and torch.cuda.get_device_properties().major < 8:
        return "CUDA C++ kernels need compute capability 8.0"
    return None


def reluctance(op: str, device_type: str, facts: dict[str, Any]) -> str | None:
    """Why dispatch should not pick these kernels by itself though they can serve; None where it should."""
    if device_type == "cuda":
        device = torch.cuda.get_device_properties()
        architecture = f"sm_{device.major}{device.minor}"
        if op not in _PROVEN.get(architecture, ()):
            return f"the GPU suite has not proven it on {architecture}; fa.backend('cuda') forces it"
    if op != "remerge_" and facts.get("rows", 0) > _FEW_ROWS:
        return f"{facts['rows']} rows; up to {_FEW_ROWS} are few enough to gain from one launch"
    return None
