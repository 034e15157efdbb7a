"""LoRA merged and unmerged: what the forwards cost, what the merge costs, and what it leaves of the weights.

Three kinds of records, told apart by ``phase``:

    forward  a forward pass: bare, unmerged, merged, swapped in; the base is stock
    merge    merge, swap and unmerge of whole models; the base is a copy of as many bytes
    drift    bits of the weights that differ after many cycles of merge, swap and unmerge
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadapt.bench import latency, measure, report, verify
from fastadapt.bench.case import Case, available_layers
from fastadapt.bench.methods.lora import ALPHA, A, B
from fastadapt.bench.peers import PEERS, Merging, expanded
from fastadapt.bench.setup import Setup
from fastadapt.config.lora import TARGETS
from fastadapt.console import Progress

DEFAULT_PEERS = ("peft",)
FORWARDS = (*latency.ALWAYS, "fastadapt-swapped")
STEPS = ("merge", "swap", "unmerge")
BASE = "copy"
MIN_ROUNDS = 3
SAME = ("dtype", "targets", "rank_or_bottleneck")  # what a forward and the merge that serves it have in common

Job = Callable[..., list[report.Record]]


def jobs(
    cases: Sequence[Case], peers: Sequence[str], *, budget: float, merge_layers: int, cycle_layers: int, cycles: int
) -> list[Job]:
    """The forwards of every case, the merges of every dtype, target set and rank, the drift of every dtype."""
    available = available_layers(cases[0])
    systems = expanded((*FORWARDS, *peers), merges=True)
    found: list[Job] = [
        partial(latency.run_case, case, systems, budget=budget, bench="merge", min_rounds=MIN_ROUNDS, phase="forward")
        for case in cases
    ]
    everyone = ["fastadapt", *(name for name in peers if name != "fastadapt")]
    merges = dict.fromkeys(dataclasses.replace(case, batch=1, layers=min(merge_layers, available)) for case in cases)
    found += [partial(run_merges, case, everyone, budget=budget) for case in merges]
    drifts: dict[str, Case] = {}
    for case in merges:
        drifts.setdefault(case.dtype, dataclasses.replace(case, layers=min(cycle_layers, available)))
    return found + [partial(run_drift, case, everyone, cycles=cycles) for case in drifts.values()]


# -- the merge itself ----------------------------------------------------------------------------------------------


def merged_exactly(matrices: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """W + s·B A in float64, of what W, A and B are in the case's dtype."""
    scale, found = ALPHA / case.rank, {}
    for name, matrix in matrices.items():
        path = name.removesuffix("weight")
        a, b = (weights[path + part].to(matrix).double() for part in (A, B))
        found[name] = matrix.double() + scale * (b @ a)
    return found


def merged_eagerly(matrices: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The same in the case's dtype, every operation rounded: the yardstick."""
    scale, found = ALPHA / case.rank, {}
    for name, matrix in matrices.items():
        path = name.removesuffix("weight")
        a, b = (weights[path + part].to(matrix) for part in (A, B))
        found[name] = matrix + scale * (b @ a)
    return found


def judge(setup: Setup, system: Merging, factor: float, *, exact: bool) -> verify.Verdict:
    """The weights after merge and swap against float64; ``exact`` asks for every bit of them after unmerge."""
    before = {name: matrix.detach().clone() for name, matrix in system.matrices.items()}
    worst: verify.Verdict | None = None
    for step, weights in ((system.merge, setup.weights), (system.swap, setup.other_weights)):
        step()
        reference = merged_exactly(before, weights, setup.case)
        yardstick = verify.tensor_distance(merged_eagerly(before, weights, setup.case), reference)
        verdict = verify.judge(verify.tensor_distance(system.matrices, reference), yardstick, factor)
        if worst is None or not verdict.correct:
            worst = verdict
    system.unmerge()
    changed = difference(before, system.matrices)
    if exact and worst.correct and changed.weights:
        return verify.Verdict(False, changed.share, 0.0)
    return worst


def run_merges(case: Case, names: Sequence[str], *, budget: float, progress: Progress) -> list[report.Record]:
    """Merge, swap and unmerge of every system against a copy of as many bytes."""
    cell = f"{case.dtype} r={case.rank} on {_targets(case.targets)}, {case.layers} layers"
    setup = Setup(case)
    systems: dict[str, Merging] = {}
    verdicts: dict[str, verify.Verdict] = {}
    memory: dict[str, tuple[int, int]] = {}
    for name in names:
        peer = PEERS[name]
        progress.tick(f"{cell}: setting up {peer.label}")
        system: Merging = peer.setup("merging", setup)
        memory[name] = _memory(system, case.device)
        verdicts[name] = judge(setup, system, peer.factor, exact=peer.ours)
        if verdicts[name].correct:
            systems[name] = system
        else:
            progress.step(f"{cell}: {peer.label} is WRONG ({verdicts[name]}), so it is not timed")
        del system
    sources = [m.clone() for m in setup.method.matrices(setup.stock(case.torch_dtype), case).values()]
    targets = [torch.empty_like(source).zero_() for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    progress.step(f"{cell}: merging, {len(systems)} systems and a copy take turns")
    samples = measure.take_turns_in_steps(
        {
            BASE: {BASE: copy},
            **{name: {step: getattr(system, step) for step in STEPS} for name, system in systems.items()},
        },
        budget=budget,
        device=case.device,
        progress=lambda done, left: progress.tick(f"{cell}: round {done}, {max(left, 0):.0f} s left"),
    )
    weights = sum(source.numel() for source in sources)
    base = samples[BASE][BASE]
    common = {"base_system": BASE, "phase": "merge", "matrices": len(sources), "weights": weights}
    records = [report.record("merge", case, BASE, "copy", verdict=None, samples=base, base=base, step=BASE, **common)]
    for name in names:
        kept, peak = memory[name]
        for step in STEPS:
            records.append(
                report.record(
                    "merge",
                    case,
                    name,
                    PEERS[name].label,
                    verdict=verdicts[name],
                    samples=samples[name][step] if name in samples else None,
                    base=base,
                    peak_bytes=peak if step == "merge" else None,
                    step=step,
                    kept_bytes_per_weight=kept / weights,
                    **common,
                )
            )
    return records


def _memory(system: Merging, device: str) -> tuple[int, int]:
    """(bytes kept while merged, the most during the merge), of the second of two merges."""
    system.merge()
    system.unmerge()
    kept = measure.kept_bytes(system.merge, device)
    system.unmerge()
    peak = measure.peak_bytes(system.merge, device)
    system.unmerge()
    return kept, peak


# -- what is left of the weights -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far weights are from what they were: weights and bits changed, their share, the largest difference."""

    weights: int
    bits: int
    share: float
    largest: float


_INTEGERS = {2: torch.int16, 4: torch.int32}
_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> Difference:
    """Counted in bits, so that -0 is no 0 and NaN equals itself."""
    weights = bits = total = 0
    largest = 0.0
    for name, old in before.items():
        new = after[name].detach()
        integer = _INTEGERS[old.element_size()]
        changed = old.contiguous().view(integer) ^ new.contiguous().view(integer)
        total += old.numel()
        count = int((changed != 0).sum())
        if count:
            weights += count
            bits += int(_ONES.to(old.device)[changed.view(torch.uint8).flatten().int()].sum())
            largest = max(largest, float((old.double() - new.double()).abs().max()))
    return Difference(weights, bits, weights / total, largest)


def checkpoints(cycles: int) -> list[int]:
    """1, 3, 10, 30, ... and the last cycle."""
    found = {scale * 10**power for power in range(len(str(cycles))) for scale in (1, 3)}
    return sorted({n for n in found if n < cycles} | {cycles})


def run_drift(case: Case, names: Sequence[str], *, cycles: int, progress: Progress) -> list[report.Record]:
    """Each system's weights after ``cycles`` of merge, swap and unmerge."""
    cell = f"{case.dtype} r={case.rank} on {_targets(case.targets)}, {case.layers} layers"
    records = []
    for name in names:
        peer = PEERS[name]
        progress.step(f"{cell}: {cycles} cycles of merge, swap and unmerge, {peer.label}")
        system: Merging = peer.setup("merging", Setup(case))
        before = {key: matrix.detach().clone() for key, matrix in system.matrices.items()}
        history: dict[int, Difference] = {}
        started = time.perf_counter()
        looked_at = checkpoints(cycles)
        for done in range(1, cycles + 1):
            for step in STEPS:
                getattr(system, step)()
            if done in looked_at:
                history[done] = difference(before, system.matrices)
            left = (time.perf_counter() - started) / done * (cycles - done)
            progress.tick(f"{cell}: {peer.label}, cycle {done} of {cycles}, about {left:.0f} s left")
        last = history[cycles]
        records.append(
            report.record(
                "merge",
                case,
                name,
                peer.label,
                verdict=verify.Verdict(last.bits == 0, last.share, 0.0) if peer.ours else None,
                samples=None,
                base=None,
                phase="drift",
                cycles=cycles,
                weights=sum(matrix.numel() for matrix in before.values()),
                weights_changed=last.weights,
                share_changed=last.share,
                bits_changed=last.bits,
                largest_change=last.largest,
                history=[[n, at.share, at.bits, at.largest] for n, at in history.items()],
            )
        )
        del system, before
        gc.collect()
    return records


# -- what it comes to ----------------------------------------------------------------------------------------------


def with_break_even(records: list[report.Record]) -> list[report.Record]:
    """Gives every unmerged forward the number of forwards after which merging has paid for itself.

    That is the time of the library's merge over what a merged forward saves, both for as many layers; None where the
    merged forward saves nothing.
    """
    for r in records:
        if r["phase"] != "forward" or PEERS[r["system"]].merged is None:
            continue
        r["break_even_forwards"] = None
        merge = _same(records, r, phase="merge", step="merge", system=r["system"])
        twin = _same(records, r, phase="forward", system=PEERS[r["system"]].merged, batch=r["batch"])
        if merge and twin and merge["samples_ms"] and r["samples_ms"] and twin["samples_ms"]:
            saved = statistics.median(a - b for a, b in zip(r["samples_ms"], twin["samples_ms"], strict=True))
            if saved > 0:
                r["break_even_forwards"] = merge["p50_ms"] * r["layers"] / merge["layers"] / saved
    return records


def _same(records: Sequence[report.Record], r: report.Record, **more: Any) -> report.Record | None:
    wanted = {**{key: r[key] for key in SAME}, **more}
    return next((other for other in records if all(other.get(key) == value for key, value in wanted.items())), None)


def _targets(targets: Sequence[str]) -> str:
    """``all``, or initials: q+v, ao for attention_output."""
    initials = ("".join(word[0] for word in target.split("_")) for target in targets)
    return "all" if len(targets) == len(TARGETS) else "+".join(initials)


def rows(records: Sequence[report.Record]) -> str:
    """The three tables."""

    def of(phase: str) -> list[report.Record]:
        return [r for r in records if r["phase"] == phase]

    def cell(r: report.Record) -> str:
        return f"{r['dtype']} r={r['rank_or_bottleneck']:<3} {_targets(r['targets'])}"

    def forward(r: report.Record) -> list[str]:
        ratio, pays = latency.over_merged(records, r), r.get("break_even_forwards")
        return [
            *report.times(r, 2),
            f"{r['ratio_to_bare']:.3f}",
            "-" if ratio is None else f"{ratio:.3f}",
            "-" if pays is None else f"{pays:.1f}",
        ]

    def merge(r: report.Record) -> list[str]:
        kept = r["kept_bytes_per_weight"] if r["step"] == "merge" else None
        return [*report.times(r, 2), f"{r['ratio_to_bare']:.2f}", "-" if kept is None else f"{kept:.2f}"]

    def drift(r: report.Record) -> list[str]:
        return [
            f"{r['cycles']:,}",
            f"{r['bits_changed']:,}",
            f"{r['share_changed']:.1%}",
            f"{r['largest_change']:.1e}",
        ]

    names = {name: f"{peer.label}, unmerged" for name, peer in PEERS.items() if peer.merged}
    names |= {"stock": "stock, bare", "bare": "fastadapt, bare"}
    return "\n\n".join([
        report.cell_table(
            ("forwards", "p20 ms", "p50 ms", "p80 ms", "÷ stock", "÷ merged", "pays after"),
            of("forward"),
            cell=lambda r: f"{cell(r)} B={r['batch']:<3}",
            name=lambda r: names.get(r["system"], r["label"]),
            figures=forward,
        ),
        report.cell_table(
            ("merges", "p20 ms", "p50 ms", "p80 ms", "÷ copy", "bytes kept/weight"),
            of("merge"),
            cell=cell,
            name=lambda r: r["label"] if r["system"] == BASE else f"{r['label']}, {r['step']}",
            figures=merge,
        ),
        report.cell_table(
            ("drift", "cycles", "bits changed", "weights changed", "largest change"),
            of("drift"),
            cell=cell,
            name=lambda r: r["label"],
            figures=drift,
        ),
    ])  # fmt: skip
