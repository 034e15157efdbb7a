"""Training: one whole optimizer step, and what its forward keeps for backward."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.bench import measure, reference, report, verify
from fastadapt.bench.case import Case
from fastadapt.bench.peers import PEERS, Peer, Training
from fastadapt.bench.setup import Setup

ALWAYS = ("full", "fastadapt")
DEFAULT_PEERS = ("adapterhub",)
BASE = "full"


def _backward(model: nn.Module, setup: Setup) -> dict[str, Tensor]:
    setup.loss(model).backward()
    return reference.gradients(model)


def _required(gradients: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' gradients, which each system must have, and of the others those it has."""
    return {n: g for n, g in gradients.items() if n in own or n.endswith(reference.TENSORS)}


def judge_gradients(case: Case, peers: Sequence[Peer]) -> dict[str, verify.Verdict]:
    """Each adapted system's gradients with dropout off against a float64 model's, yardstick plain eager PyTorch."""
    setup = Setup(dataclasses.replace(case, dropout=0.0), classifier=True)
    exact_model = setup.plain(torch.float64)
    exact_model(input_ids=setup.ids, labels=setup.labels).loss.backward()
    exact = reference.gradients(exact_model)
    del exact_model
    eager = _backward(setup.plain(), setup)
    verdicts = {}
    for peer in peers:
        if not peer.adapted:
            continue
        system: Training = peer.setup("training", setup)
        system.loss().backward()
        own = system.gradients()
        expected = _required(exact, own)
        verdicts[peer.name] = verify.judge(
            verify.gradient_distance(own, expected), verify.gradient_distance(eager, expected)
        )
    return verdicts


def saved_bytes_per_layer(case: Case, peers: Sequence[Peer]) -> dict[str, int]:
    """Bytes kept for backward by a layer above the lowest: what a model of three layers keeps beyond one of two."""
    kept: dict[str, list[int]] = {peer.name: [] for peer in peers}
    for layers in (2, 3):
        setup = Setup(dataclasses.replace(case, layers=layers), classifier=True)
        for peer in peers:
            system: Training = peer.setup("training", setup)
            kept[peer.name].append(measure.saved_bytes(system.model, system.loss))
            del system
            gc.collect()
    return {name: three - two for name, (two, three) in kept.items()}


def run_case(case: Case, peers: Sequence[Peer], *, budget: float, progress: report.Progress) -> list[report.Record]:
    """All records of one cell."""
    cell = f"{case.dtype} B={case.batch}"
    everyone = [*(PEERS[name] for name in ALWAYS), *peers]
    progress.step(f"{cell}: checking gradients")
    verdicts = judge_gradients(case, everyone)
    for peer in everyone:
        if peer.name in verdicts and not verdicts[peer.name].correct:
            progress.step(f"{cell}: {peer.label} is WRONG ({verdicts[peer.name]}), so it is not timed")
    right = [peer for peer in everyone if peer.name not in verdicts or verdicts[peer.name].correct]
    progress.step(f"{cell}: counting what is kept for backward")
    saved = saved_bytes_per_layer(case, right)

    setup = Setup(case, classifier=True)
    systems: dict[str, Training] = {peer.name: peer.setup("training", setup) for peer in right}
    progress.step(f"{cell}: {len(systems)} systems take turns")
    samples = measure.take_turns(
        {name: system.step for name, system in systems.items()},
        budget=budget,
        device=case.device,
        progress=lambda done, left: progress.tick(f"{cell}: round {done}, {max(left, 0):.0f} s left"),
    )
    peaks = {name: measure.peak_bytes(system.step, case.device) for name, system in systems.items()}
    return [
        report.record(
            "train",
            case,
            peer.name,
            peer.label,
            verdict=verdicts.get(peer.name),
            samples=samples.get(peer.name),
            base=samples.get(BASE),
            peak_bytes=peaks.get(peer.name),
            base_system=BASE,
            saved_bytes_per_layer=saved.get(peer.name),
        )
        for peer in everyone
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
        if r["correct"] is False:
            lines.append([*start, "WRONG", f"{r['error']:.0e}", f">{r['tolerance']:.0e}", "-", "-", "-"])
            continue
        times = [f"{r[f'p{p}_ms']:.1f}" for p in (20, 50, 80)]
        memory = [report.megabytes(r["peak_bytes"]), report.megabytes(r["saved_bytes_per_layer"])]
        lines.append([*start, *times, f"{r['ratio_to_bare']:.3f}", *memory])
    headers = ("system", "p20 ms", "p50 ms", "p80 ms", "÷ full", "peak MB", "kept MB/layer")
    return report.table(headers, lines)
