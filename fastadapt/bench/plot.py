"""The picture of a benchmark: one panel a dtype, one group of bars a batch, time relative to the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastadapt.bench import report
from fastadapt.bench.case import UserError

# One colour a system in every plot, so that pictures can be compared: ours warm, peers cool, bases grey.
COLOURS = {
    "stock": "#9aa0a6",
    "full": "#9aa0a6",
    "eager": "#9aa0a6",
    "bare": "#f2b38f",
    "fastadapt": "#d9480f",
    "adapterhub": "#4263eb",
    "compile": "#b8c9e8",
    "adapterhub-compile": "#7d9bea",
    "openvino": "#5fa8a0",
    "onnxruntime": "#8ec7b5",
    "gemm": "#c9cdd2",
    "copy": "#dfe2e6",
}
TITLES = {
    "latency": "Inference: time relative to stock BERT without adapters",
    "train": "Training step: time relative to full fine-tuning",
    "op": "Adapter + residual + LayerNorm: time relative to eager PyTorch",
}


def _size(row: report.Record) -> str:
    return f"{row['rows']:,} rows" if row["bench"] == "op" else f"batch {row['batch']}"


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
    drawn = [r for r in records if r["bench"] == bench and r["ratio_to_bare"] is not None]
    if not drawn:
        raise UserError("nothing to plot: no record has a time")
    dtypes = list(dict.fromkeys(r["dtype"] for r in drawn))
    systems = list(dict.fromkeys(r["system"] for r in drawn))
    highest = max(r["ratio_to_bare"] for r in drawn)

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "fastadapt"})
    groups = max(len({_size(r) for r in drawn if r["dtype"] == dtype}) for dtype in dtypes)
    width = min(max(5.2, 0.42 * groups * len(systems) + 1.6) * len(dtypes), 16)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(width, 4.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        here = [r for r in drawn if r["dtype"] == dtype]
        sizes = list(dict.fromkeys(_size(r) for r in here))
        bar = 0.84 / len(systems)
        for s, system in enumerate(systems):
            mine = {_size(r): r["ratio_to_bare"] for r in here if r["system"] == system}
            xs = [g - 0.42 + bar * (s + 0.5) for g, size in enumerate(sizes) if size in mine]
            heights = [mine[size] for size in sizes if size in mine]
            label = next(r["label"] for r in drawn if r["system"] == system)
            axis.bar(xs, heights, bar * 0.92, color=COLOURS.get(system, "#666666"), label=label)
            for x, height in zip(xs, heights, strict=True):
                bold = "bold" if system == "fastadapt" else "normal"
                axis.annotate(
                    f"{height:.2f}", (x, height), (0, 2), textcoords="offset points", ha="center", va="bottom",
                    fontsize=7.5, fontweight=bold, rotation=90 if len(systems) * groups > 12 else 0,
                )  # fmt: skip
        axis.axhline(1.0, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_title(dtype, fontsize=11)
        axis.set_ylim(0, highest * 1.16)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
    axes[0][0].set_ylabel("time ÷ base (lower is faster)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(TITLES.get(bench, bench), fontsize=12.5, y=0.985)
    rows = (len(labels) + 3) // 4
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9,
                  bbox_to_anchor=(0.5, 0.045 if caption else 0.0))  # fmt: skip
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


def caption(document: dict) -> str:
    """Where and when the figures were measured."""
    e = document["environment"]
    first = document["records"][0]
    shape = f"{first['model']}, {first['layers'] or 'all'} layers, sequence {first['seq']}"
    if first["bench"] != "op":
        shape += f", {first['method']} b={first['rank_or_bottleneck']}"
    return f"{shape} · {e['device']}, {e['threads']} threads · torch {e['versions']['torch']} · {e['date'][:10]}"
