"""Inference: a forward pass of the encoder, every system on the same weights and the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.bench import measure, report, verify
from fastadapt.bench.case import Case, UserError
from fastadapt.bench.peers import PEERS, Inference, Peer
from fastadapt.bench.setup import Setup

ALWAYS = ("stock", "bare", "fastadapt")
DEFAULT_PEERS = ("adapterhub", "compile", "adapterhub-compile")
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


def run_case(
    case: Case, peers: Sequence[Peer], *, budget: float, compile_mode: str, progress: report.Progress
) -> list[report.Record]:
    """All records of one cell."""
    torch._dynamo.reset()  # a graph of another cell's shapes would turn this one's dynamic
    cell = f"{case.dtype} B={case.batch}"
    setup = Setup(case, compile_mode=compile_mode)
    expected = references(setup)
    systems: dict[str, Inference] = {}
    verdicts: dict[str, verify.Verdict] = {}
    refused: dict[str, str] = {}
    for peer in (*(PEERS[name] for name in ALWAYS), *peers):
        progress.tick(f"{cell}: setting up {peer.label}")
        try:
            system = peer.setup("inference", setup)
        except UserError as error:
            refused[peer.name] = str(error)
            progress.step(f"{cell}: not measured: {error}")
            continue
        output = system.hidden(system.call())
        exact, yardstick = expected[peer.adapted]
        verdict = verify.judge(verify.hidden_state_distance(output, exact), yardstick)
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
        progress=lambda done, left: progress.tick(f"{cell}: round {done}, {max(left, 0):.0f} s left"),
    )
    peaks = {
        name: measure.peak_bytes(system.call, case.device)
        for name, system in systems.items()
        if PEERS[name].module != "exchange"  # their memory does not pass through PyTorch's allocator
    }
    return [
        report.record(
            "latency",
            case,
            name,
            PEERS[name].label,
            verdict=verdicts[name],
            samples=samples.get(name),
            base=samples.get(BASE),
            peak_bytes=peaks.get(name),
            base_system=BASE,
        )
        for name in verdicts
    ]


def rows(records: Sequence[report.Record]) -> str:
    """The table."""
    lines: list[list[str] | None] = []
    cell: tuple[Any, ...] | None = None
    for r in records:
        here = (r["dtype"], r["batch"])
        if cell not in (None, here):
            lines.append(None)
        cell = here
        name = r["label"] if r["system"] != "fastadapt" else f"fastadapt, {r['method']} b={r['rank_or_bottleneck']}"
        start = [f"{r['dtype']} B={r['batch']:<3} {name}"]
        if not r["correct"]:
            lines.append([*start, "WRONG", f"{r['error']:.0e}", f">{r['tolerance']:.0e}", "-", "-"])
            continue
        times = [f"{r[f'p{p}_ms']:.2f}" for p in (20, 50, 80)]
        lines.append([*start, *times, f"{r['ratio_to_bare']:.3f}", report.megabytes(r["peak_bytes"])])
    return report.table(("system", "p20 ms", "p50 ms", "p80 ms", "÷ stock", "peak MB"), lines)
