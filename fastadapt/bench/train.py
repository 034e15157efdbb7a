"""Training: one whole optimizer step, and what its forward keeps for backward."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch

from fastadapt.bench import measure, report, verify
from fastadapt.bench.case import Case
from fastadapt.bench.methods import method
from fastadapt.bench.peers import Peer, Training, expanded
from fastadapt.bench.setup import Setup
from fastadapt.console import Progress, megabytes
from fastadapt.errors import UserError

ALWAYS = ("full", "fastadapt")
BASE = "full"


def judge_gradients(case: Case, peers: Sequence[Peer]) -> dict[str, verify.Verdict]:
    """Each adapted system's gradients with dropout off against a float64 model's, yardstick plain eager PyTorch."""
    batch = max(case.batch, method(case.method).judged_batch)
    setup = Setup(dataclasses.replace(case, dropout=0.0, lora_dropout=0.0, batch=batch), classifier=True)
    model, tensors = setup.plain_with_tensors(torch.float64)
    model.train()(input_ids=setup.ids, labels=setup.labels).loss.backward()  # as the systems are: dropout is 0
    exact = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    model, tensors = setup.plain_with_tensors()
    setup.loss(model.train()).backward()
    eager = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    del model, tensors
    verdicts = {}
    for peer in peers:
        if not peer.adapted:
            continue
        system: Training = peer.setup("training", setup)
        system.loss().backward()
        own = system.gradients()
        # The method's own gradients each system must have; of the base's that train with them, those it has.
        judged = {name: g for name, g in exact.items() if not setup.method.silent(name)}
        expected = {name: g for name, g in judged.items() if name in setup.weights or name in own}
        verdicts[peer.name] = verify.judge(
            verify.tensor_distance(own, expected), verify.tensor_distance(eager, expected), peer.factor
        )
    return verdicts


def saved_bytes_per_layer(case: Case, peers: Sequence[Peer]) -> dict[str, int]:
    """Bytes kept for backward by a layer above the lowest: what a model of three layers keeps beyond one of two.

    Both with as many layers more as the method leaves alone, and with random weights: bytes are those of any values,
    and a pretrained model may have fewer layers.
    """
    kept: dict[str, list[int]] = {peer.name: [] for peer in peers}
    idle = method(case.method).idle_layers(case)
    for layers in (idle + 2, idle + 3):
        setup = Setup(dataclasses.replace(case, layers=layers, pretrained=False), classifier=True)
        for peer in peers:
            system: Training = peer.setup("training", setup)
            kept[peer.name].append(measure.saved_bytes(system.model, system.loss))
            del system
            gc.collect()
    return {name: three - two for name, (two, three) in kept.items()}


def able(case: Case, peers: Sequence[Peer], progress: Progress) -> list[Peer]:
    """Those of ``peers`` that can serve the case at all; the others are named, with the reason."""
    layers = 1 + method(case.method).idle_layers(case)
    setup = Setup(dataclasses.replace(case, layers=layers, pretrained=False), classifier=True)
    found = []
    for peer in peers:
        try:
            peer.setup("training", setup)
        except UserError as error:
            progress.step(f"{case.dtype} B={case.batch}: not measured: {error}")
        else:
            found.append(peer)
    return found


def run_case(
    case: Case,
    peers: Sequence[str],
    *,
    budget: float,
    progress: Progress,
    bench: str = "train",
    **more: Any,
) -> list[report.Record]:
    """All records of one cell; ``bench`` and ``more`` go into each."""
    cell = f"{case.dtype} {case.method} {method(case.method).size(case)} B={case.batch}"
    everyone = able(case, expanded((*ALWAYS, *peers), merges=False), progress)
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
    steps = measure.take_turns_in_steps(
        {name: system.steps for name, system in systems.items()},
        budget=budget,
        device=case.device,
        progress=lambda done, left: progress.tick(f"{cell}: round {done}, {max(left, 0):.0f} s left"),
    )
    samples = {name: [sum(turn) for turn in zip(*mine.values(), strict=True)] for name, mine in steps.items()}
    peaks = {name: measure.peak_bytes(system.step, case.device) for name, system in systems.items()}
    return [
        report.record(
            bench,
            case,
            peer.name,
            peer.label,
            verdict=verdicts.get(peer.name),
            samples=samples.get(peer.name),
            base=samples.get(BASE),
            peak_bytes=peaks.get(peer.name),
            base_system=BASE,
            saved_bytes_per_layer=saved.get(peer.name),
            steps_ms={step: [round(ms, 5) for ms in each] for step, each in steps.get(peer.name, {}).items()},
            **more,
        )
        for peer in everyone
    ]


def rows(records: Sequence[report.Record]) -> str:
    """The table."""

    def figures(r: report.Record) -> list[str]:
        memory = [megabytes(r["peak_bytes"]), megabytes(r["saved_bytes_per_layer"])]
        return [*report.times(r, 1), f"{r['ratio_to_bare']:.3f}", *memory]

    headers = ("system", "p20 ms", "p50 ms", "p80 ms", "÷ full", "peak MB", "kept MB/layer")
    return report.cell_table(headers, records, cell=report.cells(records), name=report.system_name, figures=figures)
