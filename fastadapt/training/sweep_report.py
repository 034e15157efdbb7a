"""The report of a sweep: every point in ``sweep.json``, the same for a reader in ``sweep.md``, and a plot."""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastadapt.console import table
from fastadapt.environment import environment
from fastadapt.errors import UserError
from fastadapt.training import checkpoints
from fastadapt.training.report import write_text
from fastadapt.training.sweep import Point, Sweep, size_field

REPORT, TEXT, PLOT = "sweep.json", "sweep.md", "sweep.png"


def finish(run: Sweep, results: dict[Point, dict[str, Any]]) -> dict[str, Any]:
    """Write the report; its content."""
    best = max(results, key=lambda point: run.score(results[point]))
    cells: dict[tuple[float, int | None], list[tuple[Point, float]]] = {}
    for point, result in results.items():
        cells.setdefault((point.lr, point.size), []).append((point, run.score(result)))
    rows = []
    for (lr, size), scores in cells.items():
        values = [score for _, score in scores]
        counted = results[scores[0][0]]["parameters"]["tasks"][run.item.task.name]
        rows.append({"lr": lr, "size": size, "mean": statistics.fmean(values), "parameters": counted,
                     "spread": statistics.stdev(values) if len(values) > 1 else None,
                     "scores": {str(point.seed): score for point, score in scores}})  # fmt: skip
    options = run.options
    report = {
        "method": options.method, "model": options.model, "task": run.item.task.name, "metric": run.item.task.metric,
        "best": {**asdict(best), "score": run.score(results[best])}, "cells": rows, "points": list(results.values()),
        "recipe": {k: getattr(options, k) for k in ("head_lr", "weight_decay", "warmup", "batch", "accumulate", "clip",
                                                    "epochs", "patience", "dtype")},
        "environment": environment(options.device),
    }  # fmt: skip
    plotted = importlib.util.find_spec("matplotlib") is not None
    if plotted:
        draw(report, options.output / PLOT)
    checkpoints.write_json(options.output / REPORT, report)
    write_text(options.output / TEXT, text(report, plotted))
    return report


def summary(report: dict[str, Any]) -> str:
    """The table that is printed at the end; the best mean is marked."""
    field = size_field(report["method"]) or "size"
    top = max(row["mean"] for row in report["cells"])
    rows = [
        [f"{row['lr']:g}", "-" if row["size"] is None else str(row["size"]), f"{row['mean']:.4f}",
         "-" if row["spread"] is None else f"{row['spread']:.4f}", f"{max(row['scores'].values()):.4f}",
         f"{row['parameters']['own']:,}", "best" if row["mean"] == top else ""]
        for row in report["cells"]
    ]  # fmt: skip
    return table(["lr", field, f"dev {report['metric']}", "± std", "best seed", "parameters", ""], rows)


def text(report: dict[str, Any], plotted: bool) -> str:
    """``sweep.md``."""
    best, r, env = report["best"], report["recipe"], report["environment"]
    size = "" if best["size"] is None else f", {size_field(report['method'])} {best['size']}"
    lines = [f"# Sweep of {report['method']}: {report['task']}", ""]
    lines += [f"![dev score by learning rate]({PLOT})", ""] if plotted else []
    lines += ["```text", summary(report), "```", ""]
    lines += [f"The best single training, whose weights are here: learning rate {best['lr']:g}{size}, seed "
              f"{best['seed']}, dev {report['metric']} {best['score']:.4f}. Adam, batch {r['batch']}, {r['epochs']:g} "
              f"epochs at most, {r['warmup']:.0%} linear warm-up, then linear decay, {r['dtype']}.", ""]  # fmt: skip
    lines += [f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, transformers "
              f"{env['versions']['transformers']}, {env['date'][:10]}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Dev score over the learning rate, a line a size; dots are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    field = size_field(report["method"])
    for size in dict.fromkeys(row["size"] for row in report["cells"]):
        rows = sorted((row for row in report["cells"] if row["size"] == size), key=lambda row: row["lr"])
        label = report["method"] if size is None else f"{field} {size}"
        (line,) = axes.plot([r["lr"] for r in rows], [r["mean"] for r in rows], marker="o", label=label)
        for row in rows:
            if len(row["scores"]) > 1:
                x = [row["lr"]] * len(row["scores"])
                axes.plot(x, list(row["scores"].values()), ".", color=line.get_color(), alpha=0.45)
    best = report["best"]
    axes.plot(best["lr"], best["score"], "o", markersize=13, fillstyle="none", color="black", label="best training")
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"dev {report['metric']}",
             title=f"{report['method']}, {report['task']}")  # fmt: skip
    rates = sorted({row["lr"] for row in report["cells"]})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)
