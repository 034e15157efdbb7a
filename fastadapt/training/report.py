"""The report of a run: every number in ``report.json``, the same for a reader in ``report.md``, and a plot."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

from fastadapt.console import table
from fastadapt.environment import environment
from fastadapt.errors import UserError
from fastadapt.training import base, checkpoints, folder
from fastadapt.training.options import is_main
from fastadapt.training.recipe import RECIPES, describe
from fastadapt.training.run import Run

REPORT, TEXT, PLOT = "report.json", "report.md", "curves.png"


def finish(run: Run, results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Put each task's best seed where the user looks for it, and write the report; its content."""
    options = run.options
    tasks: dict[str, dict[str, Any]] = {}
    for stage in run.stages:
        for name, i in stage.members:
            task = run.prepared[i].task
            label = name or task.name
            per_seed = {s: next(r for r in found if r["label"] == stage.label) for s, found in results.items()}
            scores = {seed: result["scores"][task.name] for seed, result in per_seed.items()}
            best = max(scores, key=lambda seed: scores[seed]["score"])
            counts = per_seed[best]["parameters"]["tasks"][label]
            tasks[label] = {
                "task": task.name,
                "kind": task.kind,
                "labels": list(task.labels),
                "metric": task.metric,
                "rows": {"train": len(run.prepared[i].train), "dev": len(run.prepared[i].dev)},
                "scores": {str(seed): score for seed, score in scores.items()},
                "mean": statistics.fmean(s["score"] for s in scores.values()),
                "spread": statistics.stdev(s["score"] for s in scores.values()) if len(scores) > 1 else None,
                "best_seed": best,
                "parameters": counts,
                "folder": str(_place(run, label)),
                "checksum": per_seed[best]["checksums"][label],
                "config": None if stage.config is None else describe(stage.config),
            }
    if is_main():
        for label, found in tasks.items():
            folder.copy(run.seed_folder(found["best_seed"]) / label, Path(found["folder"]))
            found["bytes"] = folder.bytes_of(Path(found["folder"]))
    report = {
        "method": options.method,
        "model": options.model,
        "recipe": {
            "lr": options.lr,
            "lr_source": RECIPES[options.method].source if options.lr == RECIPES[options.method].lr else "given",
            **{k: getattr(options, k) for k in ("head_lr", "weight_decay", "warmup", "batch", "accumulate", "clip",
                                                "epochs", "patience", "dtype", "seeds")},
        },
        "tasks": tasks,
        "size": _sizes(run, tasks),
        "base_checksum": {"before": run.base_before, "after": base.base_checksum(run.model)}
        if options.method != "full" else None,
        "base_lacked": list(run.extra),
        "stages": [result for found in results.values() for result in found],
        "notes": list(dict.fromkeys(note for found in results.values() for r in found for note in r["notes"])),
        "environment": environment(options.device),
    }  # fmt: skip
    if is_main():
        if importlib.util.find_spec("matplotlib") is None:
            report["notes"].append("no plot: it needs matplotlib (pip install matplotlib)")
        else:
            _draw(report, options.output / PLOT)
        checkpoints.write_json(options.output / REPORT, report)
        write_text(options.output / TEXT, text(report, (options.output / PLOT).is_file()))
    return report


def _place(run: Run, label: str) -> Path:
    """Where a task's folder is: the output itself where there is one."""
    alone = len(run.stages) == 1 and len(run.stages[0].members) == 1
    return run.options.output if alone else run.options.output / label


def _sizes(run: Run, tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Parameters of one base with all tasks, against as many full models."""
    base_count = sum(p.numel() for _, p in base.base_tensors(run.model))
    own = sum(t["parameters"]["own"] + t["parameters"]["head"] for t in tasks.values())
    full = sum({t["task"]: base_count + t["parameters"]["head"] for t in tasks.values()}.values())
    together = own if run.options.method == "full" else base_count + own
    return {
        "base": base_count,
        "tasks": own,
        "together": together,
        "together_to_base": together / base_count,
        "full_models": full,
        "full_models_to_base": full / base_count,
    }


def summary(report: dict[str, Any]) -> str:
    """The table that is printed at the end."""
    rows = []
    for label, t in report["tasks"].items():
        spread = "-" if t["spread"] is None else f"{t['spread']:.4f}"
        best = t["scores"][str(t["best_seed"])]["score"]
        stage = next(s for s in report["stages"] if label in s["checksums"] and s["seed"] == t["best_seed"])
        epoch = "-"
        if stage["seconds_a_step"] and stage["steps_an_epoch"]:
            epoch = f"{stage['seconds_a_step'] * stage['steps_an_epoch']:.1f}"
        share = f"{t['parameters']['own']:,} ({t['parameters']['share']:.2%})"
        rows.append([label, t["metric"], f"{t['mean']:.4f}", spread, f"{best:.4f} ({t['best_seed']})", share, epoch])
    headers = ["task", "metric", "dev mean", "± std", "best (seed)", "parameters", "s/epoch"]
    return table(headers, rows)


def sizes(report: dict[str, Any]) -> str:
    """One line: what is stored, against full models."""
    s, count = report["size"], len({t["task"] for t in report["tasks"].values()})
    return (
        f"{count} task{'s' if count > 1 else ''}: {s['together']:,} parameters in all, {s['together_to_base']:.3f}× "
        f"the base's {s['base']:,}; {count} full model{'s' if count > 1 else ''}: {s['full_models_to_base']:.2f}×"
    )


def text(report: dict[str, Any], plot: bool) -> str:
    """``report.md``."""
    r, env = report["recipe"], report["environment"]
    adam = f"AdamW, weight decay {r['weight_decay']:g}" if r["weight_decay"] else "Adam"
    lines = [f"# {report['method']}: {', '.join(report['tasks'])}", ""]
    if plot:
        lines += [f"![loss and dev score]({PLOT})", ""]
    lines += ["```text", summary(report), "```", "", sizes(report) + ".", ""]
    lines += [
        f"Base {report['model']}. {adam}, learning rate {r['lr']:g} ({r['lr_source']})"
        + ("" if r["head_lr"] is None else f", of the head {r['head_lr']:g}")
        + f", batch {r['batch']}"
        + (f" × {r['accumulate']}" if r["accumulate"] > 1 else "")
        + f", {r['epochs']:g} epochs at most, {r['warmup']:.0%} linear warm-up, then linear decay, {r['dtype']}; the "
        "weights of the best evaluation on dev are kept.",
        "",
    ]
    for label, t in report["tasks"].items():
        best = t["scores"][str(t["best_seed"])]
        found = ", ".join(f"{k} {v:.4f}" for k, v in best.items() if k not in ("score", "loss", "step"))
        classes = f"classes {', '.join(t['labels'])}" if t["labels"] else "a number"
        lines.append(f"- **{label}** ({t['rows']['train']:,} rows, {t['rows']['dev']:,} dev; {classes}): {found}, seed "
                     f"{t['best_seed']}, step {best['step']:.0f}. {t['bytes']:,} bytes of weights.")  # fmt: skip
    if report["base_checksum"] is not None:
        same = report["base_checksum"]["before"] == report["base_checksum"]["after"]
        lines += ["", f"SHA-256 of the base, before and after: {'the same' if same else 'DIFFERENT'}", "", "```text"]
        lines += [
            f"{report['base_checksum']['before']}  base before",
            f"{report['base_checksum']['after']}  base after",
        ]
        lines += [f"{t['checksum']}  {label}" for label, t in report["tasks"].items()]
        lines += ["```"]
    if report["base_lacked"]:
        lacked = ", ".join(report["base_lacked"])
        lines += [
            "",
            f"The base's files lack {lacked}: these start from seed 0, stay frozen, and lie beside the adaptation; "
            "other libraries would draw their own.",
        ]
    lines += [f"\n{note}." for note in report["notes"]]
    lines += ["", f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, transformers "
                  f"{env['versions']['transformers']}, {env['date'][:10]}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def write_text(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _draw(report: dict[str, Any], path: Path) -> None:
    """Loss of the batches to the left, dev scores to the right; a line a task and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    several = len({s["label"] for s in report["stages"]}) > 1 or len(report["recipe"]["seeds"]) > 1
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    by_label: dict[str, str] = {}
    names = {t["task"]: t["metric"] for t in report["tasks"].values()}
    seeds = list(report["recipe"]["seeds"])
    styles = ["-", "--", ":", "-."]
    for stage in report["stages"]:
        style = styles[seeds.index(stage["seed"]) % len(styles)]
        color = by_label.setdefault(stage["label"], colors[len(by_label) % len(colors)])
        if len(stage["dev"]) > 1:  # tasks take turns, so neighbours are of different ones
            stage = {**stage, "loss": _smooth(stage["loss"])}
        if stage["loss"]:
            left.plot(*zip(*stage["loss"], strict=True), style, color=color, linewidth=1.2,
                      label=f"{stage['label']}, seed {stage['seed']}")  # fmt: skip
        for task, curve in stage["dev"].items():
            name = task if len(stage["dev"]) > 1 else stage["label"]
            shade = by_label.setdefault(name, colors[len(by_label) % len(colors)])
            if curve:
                x, y = zip(*curve, strict=True)
                right.plot(x, y, style, color=shade, marker="o", markersize=3, linewidth=1.2,
                           label=f"{name}, seed {stage['seed']}")  # fmt: skip
                best = max(range(len(y)), key=y.__getitem__)
                right.plot(x[best], y[best], "o", color=shade, markersize=8, fillstyle="none")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    metrics = sorted(set(names.values()))
    right.set(xlabel="step", ylabel=f"dev {' / '.join(metrics)}")
    right.set_title("circled: the best, which is kept", fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if several or len(names) > 1:
        for axes in (left, right):
            axes.legend(fontsize="small")
    figure.suptitle(f"{report['method']}: {', '.join(report['tasks'])}")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)


def _smooth(curve: list[list[float]]) -> list[list[float]]:
    """The mean of each value and those before it, a tenth of the curve at most."""
    width = max(1, len(curve) // 10)
    means = []
    for i, (step, _) in enumerate(curve):
        window = curve[max(0, i + 1 - width) : i + 1]
        means.append([step, statistics.fmean(loss for _, loss in window)])
    return means
