"""The picture of a benchmark: one panel a dtype, one group of bars a cell, time relative to the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastadapt.bench import plot_merge, report
from fastadapt.bench.methods import method
from fastadapt.errors import UserError

# One colour a system in every plot, so that pictures can be compared: ours warm, peers cool, bases grey.
COLOURS = {
    "stock": "#9aa0a6",
    "full": "#9aa0a6",
    "eager": "#9aa0a6",
    "bare": "#f2b38f",
    "fastadapt": "#d9480f",
    "fastadapt-merged": "#f08c00",
    "fastadapt-swapped": "#ffc078",
    "all-positions": "#f2b38f",
    "adapterhub": "#4263eb",
    "peft": "#1098ad",
    "peft-merged": "#99e9f2",
    "plain": "#5c677d",
    "peft-accelerated": "#a61e4d",
    "compile": "#b8c9e8",
    "adapterhub-compile": "#7d9bea",
    "peft-compile": "#7d9bea",
    "openvino": "#5fa8a0",
    "onnxruntime": "#8ec7b5",
    "floor": "#2b8a3e",
}
TITLES = {
    "latency": "Inference: time ÷ stock BERT without adapters",
    "train": "Training step: time ÷ full fine-tuning",
    "op": "Adapter + residual + LayerNorm as one op: time ÷ eager PyTorch",
    "merge": "LoRA, merged and unmerged",
    "methods": "Inference with each method: time ÷ stock BERT without adapters",
}
METHODS_SHOWN = ("fastadapt", "adapterhub", "peft", "plain")
BASES = {"methods": "stock", "latency": "stock", "train": "full", "op": "eager"}


def _sizes(records: Sequence[report.Record]) -> Callable[[report.Record], str]:
    """What a group of bars is called."""
    if records[0]["bench"] == "op":
        return lambda r: f"{r['rows']:,} rows"
    if records[0]["bench"] == "methods":
        return lambda r: f"{r['method']}\nB={r['batch']}"
    if len({r["rank_or_bottleneck"] for r in records}) == 1:
        return lambda r: f"batch {r['batch']}"
    return lambda r: f"r={r['rank_or_bottleneck']}\nbatch {r['batch']}"


def draw(records: Sequence[report.Record], path: str | Path, caption: str = "") -> Path:
    """Write a PNG or SVG of the first benchmark in ``records``.

    Raises:
        UserError: where matplotlib is missing, nothing can be drawn or the file can't be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bench = records[0]["bench"]
    hidden = ("gemm", "copy") if bench == "op" else ()  # the floor's two parts; the larger is drawn
    drawn = [r for r in records if r["bench"] == bench and r["system"] not in hidden]
    if bench == "methods":
        drawn = [r for r in drawn if r["job"] == "inference" and r["system"] in METHODS_SHOWN]
    if not any(r["ratio_to_bare"] is not None for r in drawn):
        raise UserError("nothing to plot: no record has a time")
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "fastadapt"})
    figure, (handles, labels) = (plot_merge.panels if bench == "merge" else _bars)(plt, drawn)
    figure.suptitle(TITLES.get(bench, bench), fontsize=12.5, y=0.985)
    rows = (len(labels) + 3) // 4
    place = (0.5, 0.045 if caption else 0.0)
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9, bbox_to_anchor=place)
    if caption:
        figure.text(0.5, 0.012, caption, ha="center", fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.045 * rows + (0.05 if caption else 0.015), 1, 0.985))
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the plot cannot be written ({error})") from error
    finally:
        plt.close(figure)
    return target


def _bars(plt: Any, records: Sequence[report.Record]) -> tuple[Any, tuple[list[Any], list[str]]]:
    """(the figure, what its legend shows)."""
    drawn = [r for r in records if r["ratio_to_bare"] is not None]
    size = _sizes(drawn)
    dtypes = list(dict.fromkeys(r["dtype"] for r in drawn))
    systems = list(dict.fromkeys(r["system"] for r in drawn))
    highest = max(r["ratio_to_bare"] for r in drawn)
    groups = max(len({size(r) for r in drawn if r["dtype"] == dtype}) for dtype in dtypes)
    width = min(max(5.2, 0.42 * groups * len(systems) + 1.6) * len(dtypes), 16)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(width, 4.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        here = [r for r in drawn if r["dtype"] == dtype]
        sizes = list(dict.fromkeys(size(r) for r in here))
        bar = 0.84 / len(systems)
        for s, system in enumerate(systems):
            mine = {size(r): r["ratio_to_bare"] for r in here if r["system"] == system}
            xs = [g - 0.42 + bar * (s + 0.5) for g, group in enumerate(sizes) if group in mine]
            heights = [mine[group] for group in sizes if group in mine]
            label = next(r["label"] for r in drawn if r["system"] == system)
            axis.bar(xs, heights, bar * 0.92, color=COLOURS.get(system, "#666666"), label=label)
            for x, height in zip(xs, heights, strict=True):
                axis.annotate(
                    f"{height:.2f}",
                    (x, height),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=7.5,
                    zorder=4,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                    fontweight="bold" if system == "fastadapt" else "normal",
                    rotation=90 if len(systems) * groups > 24 else 0,
                )
        axis.axhline(1.0, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_title(dtype, fontsize=11)
        axis.set_ylim(0, highest * 1.16)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
    axes[0][0].set_ylabel(f"time ÷ {BASES.get(drawn[0]['bench'], 'base')} (lower is faster)")
    return figure, axes[0][0].get_legend_handles_labels()


def caption(document: dict) -> str:
    """Where and when the figures were measured."""
    e = document["environment"]
    first = document["records"][0]
    shape = f"{first['model']}, {first['layers'] or 'all'} layers, sequence {first['seq']}"
    if first["bench"] == "op":
        shape = f"H={first['hidden']}, b={first['rank_or_bottleneck']}"
    elif first["bench"] == "merge":
        shape += f" (merges: {plot_merge.merge_layers(document['records'])} layers)"
    elif first["bench"] != "methods":
        shape += f", {method(first['method']).describe(first)}"
    return f"{shape} · {e['device']}, {e['threads']} threads · torch {e['versions']['torch']} · {e['date'][:10]}"
