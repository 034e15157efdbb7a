"""Prints every figure that the project has to reach, beside what was measured: python benchmarks/must.py [FOLDER].

Reads latency.json, train.json and op.json of FOLDER (benchmarks/results), written by `make bench-full`. Ratios are
medians over paired rounds of one run. Exit code 1 where a figure is missed or missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapt.bench.case import UserError
from fastadapt.bench.measure import paired_ratio
from fastadapt.bench.report import read_json, table

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """One line: ``must`` is None where a figure is only reported; ``at_least`` turns the comparison around."""

    text: str
    must: float | None
    goal: float
    measured: float | None
    at_least: bool = False

    def reaches(self, bound: float) -> bool:
        if self.measured is None:
            return False
        return self.measured >= bound if self.at_least else self.measured <= bound

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "missing"
        if self.reaches(self.goal):
            return "goal"
        if self.must is None:
            return "reported"
        return "pass" if self.reaches(self.must) else "FAIL"

    @property
    def failed(self) -> bool:
        return self.must is not None and (self.measured is None or not self.reaches(self.must))


def find(records: Records, system: str, **cell: Any) -> dict[str, Any] | None:
    """The record of ``system`` in ``cell``, if it was measured and right."""
    for row in records:
        if row["system"] == system and all(row[key] == value for key, value in cell.items()):
            return row if row["samples_ms"] else None
    return None


def ratio(records: Records, system: str, base: str, **cell: Any) -> float | None:
    """Median over rounds of ``system``'s time over ``base``'s."""
    ours, theirs = find(records, system, **cell), find(records, base, **cell)
    return None if ours is None or theirs is None else paired_ratio(ours["samples_ms"], theirs["samples_ms"])


def kept(records: Records, **cell: Any) -> float | None:
    """Bytes kept for backward a layer, ours over AdapterHub's."""
    ours, theirs = find(records, "fastadapt", **cell), find(records, "adapterhub", **cell)
    return None if ours is None or theirs is None else ours["saved_bytes_per_layer"] / theirs["saved_bytes_per_layer"]


def share(records: Records, **cell: Any) -> float | None:
    """The fused op's share of its floor."""
    ours = find(records, "fastadapt", **cell)
    return None if ours is None else ours["share_of_floor"]


def figures(latency: Records, train: Records, op: Records) -> list[Figure]:
    """Every line, in the order in which the project states them."""
    found = []
    bounds = {
        "fp32": ((1, 0.83, 0.76), (8, 0.96, 0.86), (32, 1.00, 0.92)),
        "bf16": ((1, 0.75, 0.45), (8, 0.88, 0.62), (32, 0.88, 0.60)),
    }
    for dtype, cells in bounds.items():
        for batch, must, goal in cells:
            got = ratio(latency, "fastadapt", "stock", dtype=dtype, batch=batch)
            found.append(Figure(f"inference {dtype} B={batch} ÷ stock, no adapters", must, goal, got))
    for base, label, must in (
        ("adapterhub-compile", "AdapterHub, torch.compile", 1.0),
        ("openvino", "OpenVINO", None),
    ):
        for dtype, cells in bounds.items():
            for batch, *_ in cells:
                goal = 1.0 if must is None else {"fp32": 0.95, "bf16": 0.75}[dtype]
                got = ratio(latency, "fastadapt", base, dtype=dtype, batch=batch)
                found.append(Figure(f"inference {dtype} B={batch} ÷ {label}", must, goal, got))
    for dtype, must, goal in (("fp32", 0.80, 0.65), ("bf16", 0.55, 0.35)):
        got = ratio(train, "fastadapt", "adapterhub", dtype=dtype, batch=32)
        found.append(Figure(f"training step {dtype} B=32 ÷ AdapterHub", must, goal, got))
    for dtype, must, goal in (("fp32", 0.65, 0.55), ("bf16", 0.30, 0.20)):
        got = kept(train, dtype=dtype, batch=32)
        found.append(Figure(f"bytes kept a layer {dtype} B=32 ÷ AdapterHub", must, goal, got))
    for dtype in ("fp32", "bf16"):
        for rows in (1024, 16384):
            got = share(op, dtype=dtype, rows=rows)
            found.append(Figure(f"op's share of its floor, {dtype}, {rows:,} rows", 0.60, 0.85, got, at_least=True))
    return found


def main(folder: Path) -> int:
    documents = []
    for name in ("latency", "train", "op"):
        try:
            documents.append(read_json(folder / f"{name}.json")["records"])
        except UserError as error:
            print(f"must.py: {error}", file=sys.stderr)
            documents.append([])
    found = figures(*documents)
    lines = [
        [
            figure.text,
            "-" if figure.must is None else f"{figure.must:.2f}",
            f"{figure.goal:.2f}",
            "-" if figure.measured is None else f"{figure.measured:.3f}",
            figure.verdict,
        ]
        for figure in found
    ]
    print(table(("figure", "must", "goal", "measured", ""), lines))
    required = [figure for figure in found if figure.must is not None]
    missed = sum(figure.failed for figure in required)
    print(f"{len(required) - missed} of {len(required)} figures that must be reached are reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("results"))))
