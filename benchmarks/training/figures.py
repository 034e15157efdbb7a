"""What the cells say: the table, and the figures that the project has to reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.must import Figure
from benchmarks.training.cells import rate_text
from benchmarks.training.data import DATASETS
from benchmarks.training.variants import FIXED, FULL, SIZED, VARIANTS
from fastadapt.bench.report import Record

# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def score(cells: Sequence[Record], task: str, name: str, seed: int) -> float | None:
    """Dev score in points."""
    for cell in cells:
        if (cell["task"], cell["variant"], cell["seed"]) == (task, name, seed):
            return 100 * cell["score"]
    return None


def tasks_of(cells: Sequence[Record]) -> list[str]:
    return [task for task in DATASETS if any(cell["task"] == task for cell in cells)]


def seeds_of(cells: Sequence[Record], names: Iterable[str]) -> list[int]:
    """The seeds for which every task has all of ``names``."""
    tasks, names = tasks_of(cells), list(names)
    seeds = sorted({cell["seed"] for cell in cells})
    return [s for s in seeds if all(score(cells, t, n, s) is not None for t in tasks for n in names)]


def best_sizes(cells: Sequence[Record], seeds: Sequence[int]) -> dict[str, str]:
    """Task -> the size whose mean over the seeds is highest."""
    return {
        task: max(SIZED, key=lambda n, t=task: statistics.fmean(score(cells, t, n, s) for s in seeds))
        for task in tasks_of(cells)
    }


def paired(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half the width of its 95 % interval; None of a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = _T95.get(len(values) - 1, 1.96)
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def differences(cells: Sequence[Record]) -> list[float]:
    """For each seed: mean over the tasks of adapters with the size chosen per task, minus that of full fine-tuning."""
    seeds = seeds_of(cells, (*SIZED, FULL))
    if not seeds:
        return []
    best = best_sizes(cells, seeds)
    return [statistics.fmean(score(cells, t, best[t], s) - score(cells, t, FULL, s) for t in best) for s in seeds]


def fixed_below_best(cells: Sequence[Record]) -> float | None:
    """Mean over tasks and seeds of the best size's score minus that of 64."""
    seeds = seeds_of(cells, SIZED)
    if not seeds:
        return None
    best = best_sizes(cells, seeds)
    return statistics.fmean(score(cells, t, best[t], s) - score(cells, t, FIXED, s) for t in best for s in seeds)


def ratio(times: Sequence[Record], name: str, dtype: str, to: str) -> float | None:
    """Our seconds over all timed batches ÷ those of ``"peer"`` or ``"full"``."""
    for row in times:
        if row["variant"] == name and row["dtype"] == dtype and to in row["seconds"]:
            return sum(row["seconds"]["ours"]) / sum(row["seconds"][to])
    return None


def figures(cells: Sequence[Record], times: Sequence[Record]) -> list[Figure]:
    """Those of the project's training table that are computed here."""
    diffs = differences(cells)
    reach, how = None, "no seed is complete"
    if diffs:
        mean, half = paired(diffs)
        reach = mean if half is None else mean + half
        how = f"{mean:+.2f} of {len(diffs)} seeds, " + ("no interval" if half is None else f"± {half:.2f}")
    names = f"over {len(tasks_of(cells))} tasks"
    return [
        Figure(f"adapters of the best size - full, points, {names} ({how}): the 95 % interval reaches", -0.4, 0.0,
               reach, at_least=True),
        Figure(f"fixed size 64 below the best size, points, {names}", 0.8, 0.4, fixed_below_best(cells)),
        Figure("seconds an epoch, bf16, Houlsby b=64 ÷ AdapterHub", 0.75, 0.5, ratio(times, FIXED, "bf16", "peer")),
        Figure("seconds an epoch, bf16, Houlsby b=64 ÷ full fine-tuning", 0.6, 0.4, ratio(times, FIXED, "bf16", FULL)),
    ]  # fmt: skip


# -- the table -----------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def _share(cells: Sequence[Record], name: str) -> str:
    for cell in cells:
        if cell["variant"] == name:
            own = cell["parameters"]["tasks"][cell["task"]] if "tasks" in cell["parameters"] else cell["parameters"]
            return f"{100 * own['own'] / cell['base']:.2f} %"
    return "-"


def _times(times: Sequence[Record], name: str, dtype: str) -> list[str]:
    row = next((r for r in times if r["variant"] == name and r["dtype"] == dtype), None)
    if row is None:
        return ["-"] * 4
    mean = {who: 1e3 * statistics.fmean(s) for who, s in row["seconds"].items()}
    peer = f"{mean['peer']:.1f} ({row['peer']})" if "peer" in mean else "-"
    to_peer, to_full = ratio(times, name, dtype, "peer"), ratio(times, name, dtype, FULL)
    return [f"{mean['ours']:.1f}", peer, *("-" if r is None else f"{r:.2f}" for r in (to_peer, to_full))]


def markdown(content: Mapping[str, Any]) -> str:
    """The table for the README."""
    cells, times = content["cells"], content["times"]
    tasks, dtypes = tasks_of(cells), list(dict.fromkeys(row["dtype"] for row in times))
    heads = ["method", "share", "rate", "epochs", *(f"{task} ({DATASETS[task].metric})" for task in tasks), "mean"]
    for dtype in dtypes:
        heads += [f"{dtype} ms/step", "peer", "÷ peer", "÷ full"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name in VARIANTS:
        own = [cell for cell in cells if cell["variant"] == name]
        timed = any(row["variant"] == name for row in times)
        if not own and not timed:
            continue
        by_task = [[100 * cell["score"] for cell in own if cell["task"] == task] for task in tasks]
        seeds = seeds_of(cells, [name])
        means = [statistics.fmean(score(cells, task, name, seed) for task in tasks) for seed in seeds] if tasks else []
        how = [rate_text(own[0]), f"{own[0]['epochs']:g}"] if own else ["-", "-"]
        row = [VARIANTS[name].label, _share(cells, name), *how]
        row += [*(_spread(values) for values in by_task), _spread(means)]
        for dtype in dtypes:
            row += _times(times, name, dtype)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def machines(content: Mapping[str, Any]) -> str:
    """Which row was timed where, and trained where and in which dtype, as sentences."""
    timed = _grouped(content["times"], lambda row: f"Timed on {row['machine']}")
    how = {"bf16": "under bf16 autocast", "fp32": "in fp32"}
    trained = _grouped(content["cells"], lambda cell: f"Trained {how[cell['dtype']]} on {cell['machine']}")
    return " ".join([*timed, *trained])


def _grouped(rows: Sequence[Record], says: Callable[[Record], str]) -> list[str]:
    """What is said of all rows, once; where it differs, with the names of those of whom it is said."""
    names: dict[str, dict[str, set[int]]] = {}
    for row in rows:
        names.setdefault(says(row), {}).setdefault(row["variant"], set()).add(row.get("seed", 0))
    if len(names) < 2:
        return [f"{text}." for text in names]
    every = {name: set().union(*(of.get(name, ()) for of in names.values())) for name in VARIANTS}

    def called(name: str, seeds: set[int]) -> str:
        part = "" if seeds == every[name] else f" (seed {', '.join(map(str, sorted(seeds)))})"
        return VARIANTS[name].label + part

    return [f"{text}: {', '.join(called(n, of[n]) for n in VARIANTS if n in of)}." for text, of in names.items()]


def verdicts(found: Sequence[Figure]) -> str:
    """One line a figure: what it is, what was measured, and how that is to be called."""
    lines = []
    for f in found:
        measured = "missing" if f.measured is None else f"{f.measured:.3f}"
        lines.append(f"{f.verdict:>8}  {measured:>8}  must {f.must:g}, goal {f.goal:g}: {f.text}")
    return "\n".join(lines)
