"""Every CUDA C++ kernel once under compute-sanitizer: ``python -m benchmarks.gpu_suite.sanitize`` is what it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastadapt as fa
from fastadapt import dispatch

TOOLS = ("memcheck", "racecheck")
LIMIT_S = 120
_FOUND = 9  # the exit code for a finding
_ROOT = Path(__file__).parents[2]


def exercise(device: str) -> int:
    """Run every kernel at shapes that no tile divides; returns how many calls were made."""
    generator = torch.Generator(device).manual_seed(0)
    calls = 0

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    with torch.no_grad(), fa.backend("cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows, hidden, b in ((1, 768, 64), (300, 100, 7), (530, 384, 100)):
                shapes = ((rows, hidden), (b, hidden), (hidden, b), (hidden,))
                x, down, up, vector = (new(*shape, dtype=dtype) for shape in shapes)
                fa.ops.bottleneck(x, down, None, up, vector, residual=x, norm_weight=vector, norm_bias=vector,
                                  dropout_p=0.1, seed=1)  # fmt: skip
                fa.ops.add_norm(x, x, vector, vector, dropout_p=0.1, seed=1, return_sum=True)
                calls += 2
            shapes = ((5, 7), (66, 1030), (200, 96))
            weights = [new(*shape, dtype=dtype) * 0.1 for shape in shapes]
            weights[2][8:12] = 1e-9  # a tile whose list is too long for its room
            a, b = [new(70, k, dtype=dtype) for _, k in shapes], [new(n, 70, dtype=dtype) * 0.01 for n, _ in shapes]
            scales, kept, swapped = [0.5] * len(shapes), [], []
            fa.ops.merge_(weights, a, b, scales, kept)
            fa.ops.swap_(weights, a, b, scales, kept, a, b, [0.25] * len(shapes), swapped)
            fa.ops.unmerge_(weights, a, b, [0.25] * len(shapes), swapped)
            fa.ops.merge_(weights, a, b, scales)
            a[1][3, 5] = torch.nan
            try:
                fa.ops.merge_(weights, a, b, scales, [])
                raise RuntimeError("a merge with NaN was not refused")
            except ValueError:  # refused, as it should be; the undoing is what is exercised
                calls += 5
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


def run(tool: str) -> dict[str, Any]:
    """{"ok", "reason" or "output"}; a tool or kernels that aren't here are no failure, and said."""
    loaded = dispatch.load("cuda")
    program = shutil.which("compute-sanitizer")
    if isinstance(loaded, str):
        return {"ok": None, "reason": loaded}
    if program is None:
        return {"ok": None, "reason": "compute-sanitizer is not on PATH"}
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable, "-m", __spec__.name]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"ok": False, "reason": f"not finished after {LIMIT_S} s"}
    return {"ok": done.returncode == 0, "output": (done.stdout + done.stderr)[-2000:]}


if __name__ == "__main__":
    print(f"{exercise('cuda')} calls")
