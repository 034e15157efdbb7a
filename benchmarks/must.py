"""Prints every figure that the project has to reach, beside what was measured: python benchmarks/must.py [FOLDER].

Reads what `make bench-full` wrote into FOLDER (benchmarks/results); prints each file's machine, commit and date first.
Ratios are medians over paired rounds of one run. Exit code 1 where a figure is missed or missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapt.bench.case import Case
from fastadapt.bench.measure import paired_ratio
from fastadapt.bench.peers import fused
from fastadapt.bench.report import read_json
from fastadapt.bench.setup import Setup
from fastadapt.console import table
from fastadapt.errors import UserError

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
        if row["system"] == system and all(row.get(key) == value for key, value in cell.items()):
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


def changed(merge: Records, dtype: str) -> float | None:
    """Bits of the weights that differ after 1,000 cycles or more."""
    for row in merge:
        if row["system"] == "fastadapt" and row["phase"] == "drift" and row["dtype"] == dtype and row["cycles"] >= 1000:
            return float(row["bits_changed"])
    return None


def bottlenecks(latency: Records, train: Records, op: Records) -> list[Figure]:
    """Bottleneck adapters, in the order in which the project states them."""
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


def loras(latency: Records, train: Records, merge: Records) -> list[Figure]:
    """LoRA on all six linears."""
    found = []
    for rank, bounds in (
        (8, {"fp32": (1.06, 1.025), "bf16": (1.10, 1.04)}),
        (64, {"fp32": (1.18, 1.14), "bf16": (1.21, 1.15)}),
    ):
        for dtype, (must, goal) in bounds.items():
            for batch in (8, 32):
                cell = {"dtype": dtype, "batch": batch, "rank_or_bottleneck": rank}
                got = ratio(latency, "fastadapt", "fastadapt-merged", **cell)
                found.append(Figure(f"LoRA r={rank} unmerged ÷ merged, {dtype} B={batch}", must, goal, got))
    stock = {
        "fp32": ((1, 0.85, 0.78), (8, 0.97, 0.86), (32, 1.00, 0.92)),
        "bf16": ((1, 0.78, 0.47), (8, 0.88, 0.63), (32, 0.88, 0.60)),
    }
    for dtype, cells in stock.items():
        for batch, must, goal in cells:
            got = ratio(latency, "fastadapt", "stock", dtype=dtype, batch=batch, rank_or_bottleneck=8)
            found.append(Figure(f"LoRA r=8 unmerged ÷ stock, no adapters, {dtype} B={batch}", must, goal, got))
    for dtype, must, goal in (("fp32", 0.60, 0.45), ("bf16", 0.45, 0.25)):
        got = ratio(train, "fastadapt", "peft", dtype=dtype, batch=32, rank_or_bottleneck=8)
        found.append(Figure(f"LoRA r=8 training step ÷ PEFT, {dtype} B=32", must, goal, got))
    for step in ("merge", "unmerge"):
        for dtype, must, goal in (("fp32", 1.6, 1.1), ("bf16", 2.5, 1.5)):
            cell = {"phase": "merge", "dtype": dtype, "rank_or_bottleneck": 8, "matrices": 72}
            ours, copy = find(merge, "fastadapt", step=step, **cell), find(merge, "copy", step="copy", **cell)
            got = paired_ratio(ours["samples_ms"], copy["samples_ms"]) if ours and copy else None
            found.append(Figure(f"{step} of 72 matrices ÷ a copy of as many bytes, {dtype}", must, goal, got))
    for dtype in ("fp32", "bf16"):
        text = f"bits changed by 1,000 cycles of merge, swap, unmerge, {dtype}"
        found.append(Figure(text, 0.0, 0.0, changed(merge, dtype)))
    return found


HIDDEN, SEQ, PREFIX = 768, 128, 30


def share_of_arithmetic(method: str, bottleneck: int) -> float:
    """What a method adds to a layer's arithmetic: 24·H² + 4·S·H a token without it."""
    layer = 24 * HIDDEN**2 + 4 * SEQ * HIDDEN
    extra = 4 * HIDDEN * bottleneck + (4 * PREFIX * HIDDEN if method == "mam" else 0)
    return extra / layer


def undropped_share(drop: Records, dtype: str, batch: int) -> float | None:
    """A step of AdapterDrop over the undropped forward and update and, of its backward, the layers that are left."""
    cell = {"method": "adapterdrop", "job": "training", "dtype": dtype, "batch": batch, "layers": 12}
    ours, whole = find(drop, "fastadapt", **cell), find(drop, "undropped", **cell)
    if ours is None or whole is None:
        return None
    left, steps = (12 - ours["drop"]) / 12, whole["steps_ms"]
    rounds = zip(steps["forward"], steps["backward"], steps["update"], strict=True)
    return paired_ratio(ours["samples_ms"], [forward + back * left + update for forward, back, update in rounds])


PARAMETERS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("houlsby", {"bottleneck": 48}, 1_789_056),
    ("pfeiffer", {"bottleneck": 48}, 894_528),
    ("parallel", {"bottleneck": 384}, 7_091_712),
    ("lora", {"rank": 8, "targets": ("query", "value")}, 294_912),
    ("bitfit", {}, 102_912),
    ("fusion", {"adapters": 2}, 21_252_096),
    ("prefix", {"length": 30}, 9_872_384),
)


def counted(method: str, fields: dict[str, Any]) -> float:
    """Parameters of the adaptation that fastadapt makes of BERT-base, copies of LayerNorms apart."""
    setup = Setup(Case(method=method, **fields))
    _, tensors = fused.install(setup)
    own = (t for name, t in tensors.items() if name in setup.weights and not setup.method.frozen(name))
    return float(sum(t.numel() for t in own))


def methods(records: Records, drop: Records) -> list[Figure]:
    """The methods of the founding papers, as extra cost over the own bare model."""
    found = []
    bounds = (("fusion", 0.40, 0.22), ("parallel", 0.04, 0.01), ("mam", 0.06, 0.02), ("bitfit", 0.01, 0.0))
    for method, must, goal in bounds:
        free = share_of_arithmetic(method, 384) if method in ("parallel", "mam") else 0.0
        for dtype in ("fp32", "bf16"):
            for batch in (8, 32):
                cell = {"method": method, "job": "inference", "dtype": dtype, "batch": batch}
                got = ratio(records, "fastadapt", "bare", **cell)
                extra = None if got is None else got - 1 - free
                text = f"{method} inference, extra cost{' over its arithmetic' if free else ''}, {dtype} B={batch}"
                found.append(Figure(text, must, goal, extra))
    for dtype in ("fp32", "bf16"):
        row = find(records, "fastadapt", method="bitfit", job="switch", dtype=dtype)
        found.append(Figure(f"bitfit, ms to switch its task, {dtype}", 1.0, 0.1, row and row["p50_ms"]))
    for dtype in ("fp32", "bf16"):
        for batch in (8, 32):
            got = undropped_share(drop, dtype, batch)
            found.append(Figure(f"AdapterDrop 5 of 12, step ÷ its share, {dtype} B={batch}", 1.05, 1.02, got))
    for method, fields, expected in PARAMETERS:
        off = abs(counted(method, fields) - expected)
        found.append(Figure(f"{method}, parameters more or less than {expected:,}", 0.0, 0.0, off))
    return found


def tasks(mixed: Records, mixed_lora: Records, shared: Records) -> list[Figure]:
    """Several tasks at once."""
    found = []
    for method, records in (("houlsby", mixed), ("lora", mixed_lora)):
        for count, must, goal in ((8, 1.05, 1.02), (32, 1.12, 1.05)):
            for dtype in ("fp32", "bf16"):
                cell = {"method": method, "dtype": dtype, "batch": 32, "mixed_with": count}
                got = ratio(records, "fastadapt-mixed", "fastadapt", **cell)
                found.append(Figure(f"{method}, {count} tasks in a batch of 32 ÷ one, {dtype}", must, goal, got))
    for dtype in ("fp32", "bf16"):
        for batch in (8, 32):
            cell = {"dtype": dtype, "batch": batch, "mixed_with": 8, "layers": 12, "drop": 5}
            got = ratio(shared, "fastadapt-shared", "fastadapt-alone", **cell)
            text = f"8 tasks on the same {batch} texts, 5 of 12 layers shared ÷ each alone, {dtype}"
            found.append(Figure(text, 0.70, 0.65, got))
    return found


TABLES: tuple[tuple[Callable[..., list[Figure]], tuple[str, ...]], ...] = (
    (bottlenecks, ("latency", "train", "op")),
    (loras, ("latency_lora", "train_lora", "merge")),
    (methods, ("methods", "methods_drop")),
    (tasks, ("mixed", "mixed_lora", "shared")),
)


def read(path: Path) -> dict[str, Any] | None:
    """The document in ``path``; None, and a line that says why, where it can't be read."""
    try:
        return read_json(path)
    except UserError as error:
        print(f"must.py: {error}", file=sys.stderr)
        return None


def machine(document: dict[str, Any]) -> str:
    """Where a file was measured."""
    e = document["environment"]
    return f"{e['device']} ({', '.join(e['cpu_extensions'])}), {e['threads']} threads"


def origins(documents: dict[str, dict[str, Any] | None]) -> str:
    """A line a file: machine, commit and date; and one that says so where the machines differ."""
    lines = []
    for name, document in documents.items():
        e = {"commit": "-", "date": "-"} if document is None else document["environment"]
        where = "cannot be read" if document is None else machine(document)
        lines.append([f"{name}.json", where, str(e["commit"]), e["date"][:10]])
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    machines = {machine(document) for document in documents.values() if document is not None}
    return text + (f"\nfigures of {len(machines)} machines stand side by side below" if len(machines) > 1 else "")


def summary(found: list[Figure]) -> str:
    """How many of the figures that must be reached are reached, missed and missing."""
    required = [figure for figure in found if figure.must is not None]
    missing = sum(figure.measured is None for figure in required)
    missed = sum(figure.failed for figure in required) - missing
    reached = len(required) - missed - missing
    return f"of {len(required)} figures that must be reached {reached} are reached, {missed} missed, {missing} missing"


def main(folder: Path) -> int:
    documents = {name: read(folder / f"{name}.json") for _, names in TABLES for name in names}
    records: dict[str, Records] = {name: [] if d is None else d["records"] for name, d in documents.items()}
    found = [figure for figures, names in TABLES for figure in figures(*(records[name] for name in names))]
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
    print(f"{origins(documents)}\n")
    print(table(("figure", "must", "goal", "measured", ""), lines))
    print(summary(found))
    return 1 if any(figure.failed for figure in found) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    sys.exit(main(parser.parse_args().folder))
