"""The picture of `bench merge`: unmerged against merged over ranks, a merge against a copy, drift over cycles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastadapt.bench import latency, report

COLOURS = {"fastadapt": "#d9480f", "peft": "#1098ad"}
LINES = {"fp32": "-", "bf16": "--"}
HATCHES = {"fp32": "", "bf16": "///"}
STEPS = ("merge", "swap", "unmerge")


def panels(plt: Any, records: Sequence[report.Record]) -> tuple[Any, tuple[list[Any], list[str]]]:
    """(the figure, what its legend shows); what is drawn is the first target set of the records."""
    from matplotlib.lines import Line2D

    records = [r for r in records if r["targets"] == records[0]["targets"]]
    phases = {phase: [r for r in records if r["phase"] == phase] for phase in ("forward", "merge", "drift")}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8))
    _forwards(axes[0], phases["forward"])
    _merges(axes[1], phases["merge"])
    _drift(axes[2], phases["drift"])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    systems = {r["system"]: r["label"] for r in records if r["system"] in COLOURS}
    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    handles = [Line2D([], [], color=COLOURS[system], linewidth=4) for system in systems]
    handles += [Line2D([], [], color="#555555", linestyle=LINES[dtype]) for dtype in dtypes]
    hatched = {"fp32": "fp32", "bf16": "bf16 (bars: hatched)"}
    return figure, (handles, [*systems.values(), *(hatched[dtype] for dtype in dtypes)])


def merge_layers(records: Sequence[report.Record]) -> int | str:
    """How many layers were merged."""
    return next((r["layers"] for r in records if r["phase"] == "merge"), "-")


def _note(axis: Any, text: str, point: tuple[float, float], offset: tuple[int, int], **where: str) -> None:
    axis.annotate(text, point, offset, textcoords="offset points", fontsize=8, **where)


def _forwards(axis: Any, records: Sequence[report.Record]) -> None:
    batch = max((r["batch"] for r in records), default=0)
    ranks: set[int] = set()
    for system in COLOURS:
        for dtype in LINES:
            mine = [r for r in records if (r["system"], r["dtype"], r["batch"]) == (system, dtype, batch)]
            ratios = {r["rank_or_bottleneck"]: latency.over_merged(records, r) for r in mine}
            points = sorted((rank, ratio) for rank, ratio in ratios.items() if ratio is not None)
            ranks |= {rank for rank, _ in points}
            if points:
                axis.plot(*zip(*points, strict=True), LINES[dtype], marker="o", color=COLOURS[system])
                rank, ratio = points[-1]
                axis.annotate(
                    f"{ratio:.2f}", (rank, ratio), (6, 0), textcoords="offset points", va="center", fontsize=8
                )
    axis.axhline(1.0, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_xscale("log", base=2)
    axis.minorticks_off()
    axis.set_xticks(sorted(ranks), [str(rank) for rank in sorted(ranks)])
    if ranks:
        axis.set_xlim(min(ranks) / 1.5, max(ranks) * 1.8)
    axis.set_xlabel("rank")
    axis.set_title(f"unmerged ÷ merged forward, batch {batch}", fontsize=10.5)


def _merges(axis: Any, records: Sequence[report.Record]) -> None:
    rank = min((r["rank_or_bottleneck"] for r in records), default=0, key=lambda rank: abs(rank - 8))
    here = [r for r in records if r["rank_or_bottleneck"] == rank and r["ratio_to_bare"] is not None]
    kinds = [
        (system, dtype)
        for system in COLOURS
        for dtype in LINES
        if any((r["system"], r["dtype"]) == (system, dtype) for r in here)
    ]
    bar = 0.84 / max(len(kinds), 1)
    for k, (system, dtype) in enumerate(kinds):
        mine = {r["step"]: r["ratio_to_bare"] for r in here if (r["system"], r["dtype"]) == (system, dtype)}
        for g, step in enumerate(STEPS):
            x = g - 0.42 + bar * (k + 0.5)
            look = {"color": COLOURS[system], "hatch": HATCHES[dtype], "edgecolor": "white"}
            axis.bar(x, mine[step], bar * 0.92, **look)
            _note(axis, f"{mine[step]:.1f}", (x, mine[step]), (0, 2), ha="center")
    axis.axhline(1.0, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_xticks(range(len(STEPS)), STEPS)
    axis.tick_params(axis="x", length=0)
    axis.set_title(f"time ÷ a copy of as many bytes, r={rank}", fontsize=10.5)


def _drift(axis: Any, records: Sequence[report.Record]) -> None:
    for r in records:
        points = [(cycle, share * 100) for cycle, share, *_ in r["history"]]
        colour = COLOURS.get(r["system"], "#666666")
        axis.plot(*zip(*points, strict=True), LINES[r["dtype"]], marker="o", markersize=4, color=colour)
        _note(axis, f"{points[-1][1]:.3g} %", points[-1], (0, 6 if r["dtype"] == "fp32" else -13), ha="right")
    axis.set_xscale("log")
    axis.set_ylim(bottom=-3)
    axis.set_xlabel("cycles of merge, swap and unmerge")
    axis.set_title("weights changed, %", fontsize=10.5)
