"""Where figures come from: versions, the processor, the commit, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastadapt


def versions() -> dict[str, str | None]:
    """Installed versions of what the benchmarks touch; None where it is absent."""
    found: dict[str, str | None] = {"fastadapt": fastadapt.__version__}
    for name in ("torch", "transformers", "adapters", "peft", "triton", "openvino", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_extensions() -> list[str]:
    """What decides about kernels here: those of AVX2, AVX-512, AVX512-BF16 and AMX that this processor has."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is None:  # before torch 2.12
        return [torch.backends.cpu.get_cpu_capability().lower()]
    found = query()
    return [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(name)]


def multiplies_bf16_fast() -> bool:
    """Whether bfloat16 products are faster than float32's; on Intel without AMX they run at half their rate."""
    found = cpu_extensions()
    return "amx_bf16" in found or ("avx512_bf16" in found and "Intel" not in cpu_model())


def commit() -> str | None:
    """The source tree's commit, with ``-dirty`` where it has changes; None outside a checkout."""
    root = Path(fastadapt.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str) -> dict[str, Any]:
    """Everything a figure depends on beside the code."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cpu_extensions": cpu_extensions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
