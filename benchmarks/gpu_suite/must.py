"""What has to be reached on an H200, and what the records of a run say to it. Without a record: not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.ops import COMPILED_ROWS

RESULTS = Path(__file__).parents[1] / "results"
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Reading:
    """What the records of some benches say."""

    benches: tuple[str, ...]
    value: Callable[[Records], float | None]


@dataclass(frozen=True)
class Figure:
    """``must`` and ``goal`` are lower bounds of shares, upper bounds of ratios."""

    name: str
    must: float
    goal: float
    share: bool
    reading: Reading

    def holds(self, value: float) -> bool:
        return value >= self.must if self.share else value <= self.must

    def told(self, x: float) -> str:
        return f"{x:.0%}" if self.share else f"{x:.4g}"


def _of(field: str, bench: str, l2: str = "warm", systems: tuple[str, ...] = ("ours",)) -> Reading:
    """A field of the first of these systems that was measured and is not wrong."""

    def value(records: Records) -> float | None:
        for system in systems:
            for row in records:
                if (row["bench"], row["l2"], row["system"]) == (bench, l2, system) and not row["wrong"]:
                    return row.get(field)
        return None

    return Reading((bench,), value)


def _largest(field: str, benches: tuple[str, ...]) -> Reading:
    """Of several measurements the worst, once all are there."""

    def value(records: Records) -> float | None:
        found = [_of(field, bench).value(records) for bench in benches]
        return None if any(x is None for x in found) else max(found)  # type: ignore[type-var]

    return Reading(benches, value)


def _inverse(of: Reading) -> Reading:
    def value(records: Records) -> float | None:
        found = of.value(records)
        return None if not found else 1.0 / found

    return Reading(of.benches, value)


def _spills() -> float:
    """Bytes, over both committed tables; needs no GPU."""
    total = 0
    for name in ("triton_compile", "triton_compile_oldest", "cuda_compile"):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        table = json.loads(path.read_text())
        rows = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
        total += sum(row["spill_stores"] + row["spill_loads"] for row in rows if row["dtype"] != "float32")
    return float(total)


def _bottleneck(kind: str, rows: int) -> str:
    return f"bottleneck {kind} rows={rows} H=768 b=64 bfloat16"


def _lora(rows: int) -> str:
    return f"lora training rows={rows} H=768 r=16 bfloat16"


def _model(kind: str, batch: int) -> str:
    return f"BERT-base houlsby {kind} {batch}x128 bfloat16"


FIGURES = (
    *(Figure(f"adapter+residual+LN forward, {n:,} tokens, cold: share of the roof", must, goal, True,
             _of("share_of_floor", _bottleneck("inference", n), "cold"))
      for n, must, goal in ((65536, 0.75, 0.92), (4096, 0.55, 0.80))),
    *(Figure(f"its backward with all gradients, {n:,} tokens, cold: share of the roof", must, goal, True,
             _of("share_of_floor", _bottleneck("backward", n), "cold"))
      for n, must, goal in ((65536, 0.60, 0.85), (4096, 0.40, 0.65))),
    Figure("forward and backward ÷ torch.compile max-autotune, the worst of 128 to 65,536 tokens", 0.8, 0.5, False,
           _largest("ratio_to_compiled", tuple(_bottleneck("training", n) for n in COMPILED_ROWS))),
    *(Figure(f"lora_linear forward and backward ÷ frozen linear, {n:,} tokens", must, goal, False,
             _of("ratio_to_frozen", _lora(n)))
      for n, must, goal in ((4096, 1.2, 1.1), (65536, 1.12, 1.075))),
    Figure("merge and unmerge of BERT-base r=8: share of copy bandwidth", 0.65, 0.88, True,
           _inverse(_of("ratio_to_copy", "merge and unmerge BERT-base r=8 bfloat16", systems=("cuda", "ours")))),
    Figure("BERT-base with Houlsby ÷ stock eager without, B=1, captured", 0.3, 0.15, False,
           _of("ratio_to_eager", _model("inference", 1), systems=("captured",))),
    Figure("the same, B=32", 0.7, 0.5, False, _of("ratio_to_eager", _model("inference", 32))),
    Figure("B=256 ÷ the arithmetic at the measured GEMM rate", 1.5, 1.2, False,
           _inverse(_of("share_of_floor", _model("inference", 256)))),
    Figure("training step with Houlsby, B=32 ÷ AdapterHub's", 0.6, 0.4, False,
           _of("ratio_to_adapterhub", _model("training", 32))),
    Figure("the same ÷ full fine-tuning", 0.5, 0.4, False, _of("ratio_to_eager", _model("training", 32))),
    Figure("bytes spilled by the chosen launches, bf16 and fp16, sm_80 and sm_90", 0.0, 0.0, False,
           Reading((), lambda _: _spills())),
)  # fmt: skip


def rank(bench: str) -> int:
    """A bench's place among what has to be reached; what is only reported comes after."""
    return next((i for i, figure in enumerate(FIGURES) if bench in figure.reading.benches), len(FIGURES))


def table(records: Records) -> list[dict[str, Any]]:
    """One row a figure: name, must, goal, value (None: not measured) and whether the must is reached."""
    found = []
    for figure in FIGURES:
        value = figure.reading.value(records)
        found.append({"figure": figure.name, "must": figure.must, "goal": figure.goal, "value": value,
                      "reached": None if value is None else figure.holds(value)})  # fmt: skip
    return found


def text(records: Records) -> str:
    """The table as lines."""
    lines = [f"{'figure':92} {'must':>7} {'goal':>7}  measured"]
    for figure, row in zip(FIGURES, table(records), strict=True):
        told = "not measured" if row["value"] is None else figure.told(row["value"])
        if row["reached"] is False:
            told += "  MISSED"
        lines.append(f"{figure.name:92} {figure.told(figure.must):>7} {figure.told(figure.goal):>7}  {told}")
    return "\n".join(lines)
