"""One op on its own: the fused adapter + residual + LayerNorm as a share of the least time this machine could take.

The floor is the larger of the op's arithmetic at the rate of a dense H×H product of as many rows, and its bytes (x,
residual and y, once each) at the rate of a copy that moves as many. Both are measured in the same rounds as the op. The
product is the fastest of those at hand, because a slow one would be a low floor: torch's, oneDNN's with packed weights
on a CPU, and this library's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench import measure, report, verify
from fastadapt.bench.case import Case
from fastadapt.console import Progress

BASE = "eager"
OPS = ("fastadapt", "eager")  # what computes the op; the other rows are what it is held against
LABELS = {
    "fastadapt": "fastadapt, one op",
    "eager": "eager PyTorch",
    "floor": "floor",
    "gemm": "floor of arithmetic",
    "copy": "floor of bytes",
}


def tensors(case: Case, hidden: int = 768) -> dict[str, Tensor]:
    """x and residual [rows, H], the adapter's four tensors and the LayerNorm's two, in the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(case.device, case.torch_dtype)

    b = case.bottleneck
    return {
        "x": normal(case.rows, hidden),
        "w_down": normal(b, hidden, std=hidden**-0.5),
        "b_down": normal(b, std=0.1),
        "w_up": normal(hidden, b, std=b**-0.5),
        "b_up": normal(hidden, std=0.1),
        "residual": normal(case.rows, hidden),
        "norm_weight": 1 + normal(hidden, std=0.1),
        "norm_bias": normal(hidden, std=0.1),
    }


def eager(t: dict[str, Tensor]) -> Tensor:
    """Houlsby's sublayer end in plain PyTorch: LN(W_up GELU(W_down x + b_down) + b_up + x + residual)."""
    o = F.linear(F.gelu(F.linear(t["x"], t["w_down"], t["b_down"])), t["w_up"], t["b_up"])
    s = o + t["x"] + t["residual"]
    return F.layer_norm(s, s.shape[-1:], t["norm_weight"], t["norm_bias"], 1e-12)


def fused(t: dict[str, Tensor]) -> Tensor:
    return fa.ops.bottleneck(**t, activation="gelu", skip=True, eps=1e-12)


def calls(case: Case, t: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed, by system."""
    x = t["x"]
    hidden = x.shape[-1]
    generator = torch.Generator().manual_seed(case.seed)
    dense = (torch.randn(hidden, hidden, generator=generator) * hidden**-0.5).to(x)
    moved = bytes_moved(case, hidden)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=x.device).zero_()
    target = torch.empty_like(source).zero_()

    def without_autograd(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function()

        return call

    found = {
        "fastadapt": without_autograd(lambda: fused(t)),
        "eager": without_autograd(lambda: eager(t)),
        "copy": lambda: target.copy_(source),
        "gemm torch": without_autograd(lambda: F.linear(x, dense)),
        "gemm fastadapt": without_autograd(lambda: fa.ops.linear(x, dense)),
    }
    if x.device.type == "cpu" and _has_packed_product(dense.dtype):
        packed, blocked = _packed_product(dense), x.to_mkldnn()
        found["gemm oneDNN"] = without_autograd(lambda: packed(blocked))
    return found


def _has_packed_product(dtype: torch.dtype) -> bool:
    """oneDNN refuses bfloat16 on processors without AVX-512, and says so only when it multiplies."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_product(dense: Tensor) -> nn.Module:
    linear = nn.Linear(*dense.shape, bias=False).eval().requires_grad_(False)
    linear.weight = nn.Parameter(dense.float(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is made of TorchScript, which torch deprecates, and has no successor
        from torch.utils import mkldnn

        return mkldnn.to_mkldnn(linear, dtype=dense.dtype)


def bytes_moved(case: Case, hidden: int) -> int:
    """x and residual read, y written; the adapter's weights stay in the cache."""
    return 3 * case.rows * hidden * case.torch_dtype.itemsize


def floor_ratio(case: Case, hidden: int) -> float:
    """The op's arithmetic over that of the dense product: 4·H·b against 2·H²."""
    return 2 * case.bottleneck / hidden


def run_case(case: Case, *, hidden: int, budget: float, progress: Progress) -> list[report.Record]:
    """All records of one cell."""
    cell = f"{case.dtype} {case.rows} rows"
    t = tensors(case, hidden)
    wide = {name: tensor.double() for name, tensor in t.items()}
    with torch.no_grad():
        exact = eager(wide)
        yardstick = verify.hidden_state_distance(eager(t), exact)
        verdict = verify.judge(verify.hidden_state_distance(fused(t), exact), yardstick)
    del wide, exact
    timed = calls(case, t)
    if not verdict.correct:
        progress.step(f"{cell}: {LABELS['fastadapt']} is WRONG ({verdict}), so it is not timed")
        del timed["fastadapt"]
    progress.step(f"{cell}: {len(timed)} systems take turns")
    samples = measure.take_turns(timed, budget=budget, device=case.device)
    products = [samples[name] for name in samples if name.startswith("gemm ")]
    samples["gemm"] = [min(round_) * floor_ratio(case, hidden) for round_ in zip(*products, strict=True)]
    samples["floor"] = [max(pair) for pair in zip(samples["gemm"], samples["copy"], strict=True)]
    records = []
    for name, label in LABELS.items():
        mine = samples.get(name)
        records.append(
            report.record(
                "op",
                case,
                name,
                label,
                verdict=verdict if name == "fastadapt" else None,
                samples=mine,
                base=samples[BASE],
                peak_bytes=measure.peak_bytes(timed[name], case.device) if mine and name in OPS else None,
                base_system=BASE,
                op="bottleneck+residual+layernorm",
                rows=case.rows,
                hidden=hidden,
                share_of_floor=measure.paired_ratio(samples["floor"], mine) if mine else None,
            )
        )
    return records


def rows(records: Sequence[report.Record]) -> str:
    """The table."""

    def figures(r: report.Record) -> list[str]:
        share = f"{r['share_of_floor']:.0%}" if r["system"] in OPS else "-"
        return [*report.times(r, 3), f"{r['ratio_to_bare']:.3f}", share]

    return report.cell_table(
        ("op", "p20 ms", "p50 ms", "p80 ms", "÷ eager", "of the floor"),
        records,
        cell=lambda r: f"{r['dtype']} {r['rows']:>6} rows ",
        name=lambda r: r["label"],
        figures=figures,
    )
