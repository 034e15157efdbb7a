"""One op on its own: the fused adapter + residual + LayerNorm as a share of the least time this machine could take.

The floor is the larger of the op's arithmetic at the rate of a dense H×H product of as many rows, and its bytes (x,
residual and y, once each) at the rate of a copy that moves as many. Both are measured in the same rounds as the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapt as fa
from fastadapt.bench import measure, report, verify
from fastadapt.bench.case import Case

BASE = "eager"
LABELS = {
    "fastadapt": "fastadapt, one op",
    "eager": "eager PyTorch",
    "gemm": "dense H×H of as many rows",
    "copy": "copy of as many bytes",
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

    return {
        "fastadapt": without_autograd(lambda: fused(t)),
        "eager": without_autograd(lambda: eager(t)),
        "gemm": without_autograd(lambda: F.linear(x, dense)),
        "copy": lambda: target.copy_(source),
    }


def bytes_moved(case: Case, hidden: int) -> int:
    """x and residual read, y written; the adapter's weights stay in the cache."""
    return 3 * case.rows * hidden * case.torch_dtype.itemsize


def floor_ratio(case: Case, hidden: int) -> float:
    """The op's arithmetic over that of the dense product: 4·H·b against 2·H²."""
    return 2 * case.bottleneck / hidden


def run_case(case: Case, *, hidden: int, budget: float, progress: report.Progress) -> list[report.Record]:
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
    floors = [
        max(gemm * floor_ratio(case, hidden), copy) for gemm, copy in zip(samples["gemm"], samples["copy"], strict=True)
    ]
    records = []
    for name, label in LABELS.items():
        mine = samples.get(name)
        is_op = name in ("fastadapt", "eager")
        records.append(
            report.record(
                "op",
                case,
                name,
                label,
                verdict=verdict if name == "fastadapt" else None,
                samples=mine,
                base=samples[BASE],
                peak_bytes=measure.peak_bytes(timed[name], case.device) if name in timed else None,
                base_system=BASE,
                op="bottleneck+residual+layernorm",
                rows=case.rows,
                hidden=hidden,
                share_of_floor=measure.paired_ratio(floors, mine) if mine and is_op else None,
            )
        )
    return records


def rows(records: Sequence[report.Record]) -> str:
    """The table."""
    lines: list[list[str] | None] = []
    cell: tuple[Any, ...] | None = None
    for r in records:
        here = (r["dtype"], r["rows"])
        if cell not in (None, here):
            lines.append(None)
        cell = here
        start = [f"{r['dtype']} {r['rows']:>6} rows  {r['label']}"]
        if r["correct"] is False:
            lines.append([*start, "WRONG", f"{r['error']:.0e}", f">{r['tolerance']:.0e}", "-", "-"])
            continue
        times = [f"{r[f'p{p}_ms']:.3f}" for p in (20, 50, 80)]
        share = "-" if r["share_of_floor"] is None else f"{r['share_of_floor']:.0%}"
        lines.append([*start, *times, f"{r['ratio_to_bare']:.3f}", share])
    return report.table(("op", "p20 ms", "p50 ms", "p80 ms", "÷ eager", "of the floor"), lines)
