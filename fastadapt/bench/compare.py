"""All methods side by side: what each trains, what share of the parameters that is, what it costs, ours and theirs.

The records are those of `bench latency` and `bench train`, told apart by ``job``, and of switching between two tasks.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial

from fastadapt.bench import latency, measure, report, train
from fastadapt.bench.case import Case, available_layers
from fastadapt.bench.merge import Job
from fastadapt.bench.methods import method
from fastadapt.bench.peers import PEERS, fused
from fastadapt.bench.setup import Setup
from fastadapt.console import Progress, table
from fastadapt.errors import UserError

THEIRS = ("adapterhub", "peft", "plain")
LEGEND = """infer: ÷ the same library's model without the method; train: ÷ full fine-tuning
who they are: AH AdapterHub, HF plain PyTorch (no library has the method)"""


def jobs(names: Sequence[str], case: Case, batches: Sequence[int], dtypes: Sequence[str], budget: float) -> list[Job]:
    """For every method: what it holds, and inference, training and switching in every dtype and batch."""
    found = []
    layers = available_layers(case) if case.layers is None else case.layers
    case = dataclasses.replace(case, drop=min(case.drop, layers * 5 // 12))  # AdapterDrop's share: 5 of 12
    for name in names:
        for dtype in dtypes:
            for batch in batches:
                one = dataclasses.replace(case, method=name, dtype=dtype, batch=batch, **method(name).standard)
                found.append(partial(run_method, one, budget=budget, switches=batch == batches[0]))
    return found


def run_method(case: Case, *, budget: float, switches: bool, progress: Progress) -> list[report.Record]:
    """All records of one method in one cell."""
    how, setup = method(case.method), Setup(case)
    own, base = setup.parameters
    common = {"bench": "methods", "trains": how.trains, "parameters": own, "parameters_of_base": base}
    able = [name for name in how.inference_peers if name in THEIRS and PEERS[name].missing() is None]
    records = latency.run_case(
        case, latency.systems_of(case, able), budget=budget, progress=progress, job="inference", **common
    )
    able = [name for name in how.training_peers if PEERS[name].missing() is None]
    records += train.run_case(case, able, budget=budget, progress=progress, job="training", **common)
    if switches:
        try:
            call = fused.switching(Setup(case, classifier=True))  # a task has a head
        except (UserError, ValueError) as error:
            progress.step(f"{case.dtype} {case.method}: no switch measured: {error}")
            return records
        both = measure.take_turns({"fastadapt": call}, budget=min(budget, 2.0), device=case.device)["fastadapt"]
        switch = [ms / 2 for ms in both]
        label = PEERS["fastadapt"].label
        more = {key: value for key, value in common.items() if key != "bench"}
        records.append(
            report.record(
                "methods", case, "fastadapt", label, verdict=None, samples=switch, base=switch, job="switch", **more
            )
        )
    return records


def _find(records: Sequence[report.Record], first: report.Record, job: str, system: str) -> report.Record | None:
    keys = ("method", "dtype", "batch")
    for r in records:
        if r["job"] == job and r["system"] == system and all(r[key] == first[key] for key in keys):
            return r if r["samples_ms"] else None
    return None


def _ratio(mine: report.Record | None, base: report.Record | None) -> str:
    if mine is None or base is None:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(mine['samples_ms'], base['samples_ms'], strict=True)):.2f}"


def rows(records: Sequence[report.Record]) -> str:
    """The table: extra cost of inference over the own bare model, the step over full fine-tuning's, ours and theirs."""
    lines: list[list[str] | None] = []
    before = None
    firsts: dict[tuple[str, int, str], report.Record] = {}
    for r in records:
        firsts.setdefault((r["dtype"], r["batch"], r["method"]), r)
    for r in sorted(firsts.values(), key=lambda r: (r["dtype"] != "fp32", r["batch"])):
        here = (r["dtype"], r["batch"])
        if before not in (None, here):
            lines.append(None)
        before = here
        inference, training = (partial(_find, records, r, job) for job in ("inference", "training"))
        peer = next((name for name in THEIRS if inference(name) or training(name)), None)
        theirs = [_ratio(inference(peer), inference("stock")), _ratio(training(peer), training("full"))]
        lines.append([
            f"{r['dtype']} B={r['batch']:<2} {r['method']}: {r['trains']}",
            f"{r['parameters']:,}",
            f"{r['parameters'] / r['parameters_of_base']:.2%}",
            _ratio(inference("fastadapt"), inference("bare")),
            theirs[0],
            _ratio(training("fastadapt"), training("full")),
            theirs[1],
            "-" if peer is None else {"adapterhub": "AH", "peft": "PEFT", "plain": "HF"}[peer],
        ])  # fmt: skip
    headers = ("method: what it trains", "parameters", "share", "infer", "theirs", "train", "theirs", "who")
    return f"{table(headers, lines)}\n{LEGEND}"
