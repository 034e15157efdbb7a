"""Inference: a forward pass of the encoder, every system on the same weights and the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.bench import measure, report, verify
from fastadapt.bench.case import Case
from fastadapt.bench.methods import method
from fastadapt.bench.peers import PEERS, Inference, Peer, expanded
from fastadapt.bench.setup import Setup
from fastadapt.console import Progress, megabytes
from fastadapt.errors import UserError

ALWAYS = ("stock", "bare", "fastadapt")
BASE = "stock"


def references(setup: Setup) -> dict[bool, tuple[Tensor, verify.Distance]]:
    """{adapted: (float64 hidden states, distance of plain eager PyTorch in the case's dtype from them)}."""
    found = {}
    for adapted, make in ((False, setup.stock), (True, setup.plain)):
        with torch.no_grad():
            exact = make(torch.float64)(input_ids=setup.ids).last_hidden_state
            eager = make(setup.case.torch_dtype)(input_ids=setup.ids).last_hidden_state
        found[adapted] = exact, verify.hidden_state_distance(eager, exact)
    return found


def systems_of(case: Case, peers: Sequence[str]) -> list[Peer]:
    """Who takes turns: those that always do, then ``peers``, each with its merged form where the method merges."""
    return expanded((*ALWAYS, *peers), merges=method(case.method).merges)


def run_case(
    case: Case,
    everyone: Sequence[Peer],
    *,
    budget: float,
    progress: Progress,
    compile_mode: str = "default",
    bench: str = "latency",
    min_rounds: int = measure.MIN_ROUNDS,
    **more: Any,
) -> list[report.Record]:
    """All records of one cell; ``bench`` and ``more`` go into each."""
    torch._dynamo.reset()  # a graph of another cell's shapes would turn this one's dynamic
    cell = f"{case.dtype} {case.method} {method(case.method).size(case)} B={case.batch}"
    setup = Setup(case, compile_mode=compile_mode)
    expected = references(setup)
    systems: dict[str, Inference] = {}
    verdicts: dict[str, verify.Verdict] = {}
    for peer in everyone:
        progress.tick(f"{cell}: setting up {peer.label}")
        try:
            system = peer.setup("inference", setup)
        except UserError as error:
            progress.step(f"{cell}: not measured: {error}")
            continue
        output = system.hidden(system.call())
        exact, yardstick = expected[peer.adapted]
        verdict = verify.judge(verify.hidden_state_distance(output, exact), yardstick, peer.factor)
        verdicts[peer.name] = verdict
        if verdict.correct:
            systems[peer.name] = system
        else:
            progress.step(f"{cell}: {peer.label} is WRONG ({verdict}), so it is not timed")
    del expected
    gc.collect()

    progress.step(f"{cell}: {len(systems)} systems take turns")
    samples = measure.take_turns(
        {name: system.call for name, system in systems.items()},
        budget=budget,
        device=case.device,
        min_rounds=min_rounds,
        progress=lambda done, left: progress.tick(f"{cell}: round {done}, {max(left, 0):.0f} s left"),
    )
    peaks = {
        name: measure.peak_bytes(system.call, case.device)
        for name, system in systems.items()
        if PEERS[name].module != "exchange"  # their memory does not pass through PyTorch's allocator
    }
    return [
        report.record(
            bench,
            case,
            name,
            PEERS[name].label,
            verdict=verdicts[name],
            samples=samples.get(name),
            base=samples.get(BASE),
            peak_bytes=peaks.get(name),
            base_system=BASE,
            **more,
        )
        for name in verdicts
    ]


def over_merged(records: Sequence[report.Record], r: report.Record) -> float | None:
    """The time of ``r`` over that of the same library's merged form in the same rounds; None where there is none."""
    twin = PEERS[r["system"]].merged
    same = ("dtype", "batch", "method", "rank_or_bottleneck", "targets")
    for other in records if twin is not None else ():
        if other["system"] == twin and all(other.get(key) == r.get(key) for key in same):
            both = r["samples_ms"], other["samples_ms"]
            return measure.paired_ratio(*both) if all(both) else None
    return None


def rows(records: Sequence[report.Record]) -> str:
    """The table."""
    merges = any(r["system"] == PEERS["fastadapt"].merged for r in records)

    def figures(r: report.Record) -> list[str]:
        shown = [*report.times(r, 2), f"{r['ratio_to_bare']:.3f}"]
        if merges:
            ratio = over_merged(records, r)
            shown.append("-" if ratio is None else f"{ratio:.3f}")
        return [*shown, megabytes(r["peak_bytes"])]

    headers = ("system", "p20 ms", "p50 ms", "p80 ms", "÷ stock", *(("÷ merged",) if merges else ()), "peak MB")
    return report.cell_table(headers, records, cell=report.cells(records), name=report.system_name, figures=figures)
