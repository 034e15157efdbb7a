"""The fused adapter + residual + LayerNorm, and what it is held against."""

from __future__ import annotations

import pytest
import torch

from fastadapt.bench import op, verify
from fastadapt.bench.case import Case


@pytest.mark.parametrize("rows", [1024, 16384])
@pytest.mark.parametrize("system", ["fastadapt", "eager", "copy", "gemm torch", "gemm fastadapt", "gemm oneDNN"])
def test_bottleneck(benchmark, system, rows, dtype):
    case = Case(batch=rows // 128, seq=128, dtype=dtype)
    tensors = op.tensors(case)
    if system == "fastadapt":
        with torch.no_grad():
            exact = op.eager({name: tensor.double() for name, tensor in tensors.items()})
            yardstick = verify.hidden_state_distance(op.eager(tensors), exact)
            verdict = verify.judge(verify.hidden_state_distance(op.fused(tensors), exact), yardstick)
        assert verdict.correct, f"wrong, so not timed: {verdict}"
    benchmark.group = f"bottleneck + residual + LayerNorm, {dtype}, {rows} rows"
    calls = op.calls(case, tensors)
    if system not in calls:
        pytest.skip(f"no {system} here")
    benchmark.pedantic(calls[system], rounds=20, iterations=3, warmup_rounds=3)
