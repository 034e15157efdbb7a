"""One training a cell: a task, a variant, a seed. Finished ones are kept in one JSON file, others go on."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.data import DATASETS, files
from benchmarks.training.variants import VARIANTS, rate_name
from fastadapt.bench.report import Progress, Record
from fastadapt.errors import UserError
from fastadapt.training import checkpoints, run, sweep
from fastadapt.training.options import Options


@dataclass(frozen=True)
class Plan:
    """What all cells share.

    Attributes:
        data, out: folders of the data, and of everything that is made.
        model: folder or id of the base.
        epochs, batch, rows: of every training; ``rows`` caps those of the tasks.
        dtype, device: as in ``fastadapt train``.
    """

    data: Path
    out: Path
    model: str
    epochs: float
    batch: int = 32
    rows: int | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def options(self, task: str, name: str, seed: int, folder: Path, lr: float, **more: Any) -> Options:
        """One training."""
        caps = [cap for cap in (self.rows, DATASETS[task].rows) if cap is not None]
        variant = VARIANTS[name]
        given: dict[str, Any] = {
            "epochs": self.epochs, "rows": min(caps) if caps else None, "batch": self.batch, "dtype": self.dtype,
            "device": self.device, "lr": lr, "resume": True, "max_length": 128, **more,
        }  # fmt: skip
        source = files(task, self.data, self.out / "data")
        return Options(self.model, (source,), folder, variant.method, variant.size, seeds=(seed,), **given)

    def settings(self) -> dict[str, Any]:
        """What cells of one table have to have in common."""
        return {k: getattr(self, k) for k in ("epochs", "batch", "rows", "dtype", "device")}


class Store:
    """The finished cells, in a file that is whole at any time."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "cells": [], "times": []}
        if path.is_file():
            self.content = checkpoints.read_json(path)
            if self.content["settings"] != settings:
                raise UserError(f"--out: {path} is of {self.content['settings']}, but now {settings} are asked for; "
                                "accepted is another folder")  # fmt: skip

    def find(self, kind: str, **key: Any) -> Record | None:
        found = (row for row in self.content[kind] if all(row[k] == v for k, v in key.items()))
        return next(found, None)

    def add(self, kind: str, row: Record) -> None:
        self.content[kind].append(row)
        checkpoints.write_json(self.path, self.content)


def train_cells(
    plan: Plan, store: Store, tasks: Sequence[str], names: Sequence[str], seeds: Sequence[int],
    rates: dict[str, float], progress: Progress,
) -> None:  # fmt: skip
    """Train every cell that is not in ``store``."""
    wanted = [(seed, task, name) for seed in seeds for task in tasks for name in names]
    for number, (seed, task, name) in enumerate(wanted, start=1):
        key = {"task": task, "variant": name, "seed": seed}
        label = f"cell {number} of {len(wanted)}: {task}, {VARIANTS[name].label}, seed {seed}"
        before = store.find("cells", **key)
        if before is not None:
            if before["lr"] != rates[name]:
                raise UserError(f"--out: {store.path} has {label} at the rate {before['lr']:g}; accepted is another "
                                "folder for other rates")  # fmt: skip
            continue
        progress.step(label)
        folder = plan.out / "cells" / f"{task}-{name}-{seed}"
        report = run.train(plan.options(task, name, seed, folder, rates[name]), progress)
        (found,) = report["tasks"].values()
        (stage,) = report["stages"]
        score = found["scores"][str(seed)]
        store.add("cells", {
            **key, "lr": rates[name], "metric": found["metric"], "score": score["score"], "scores": score,
            "parameters": found["parameters"], "base": report["size"]["base"], "steps": stage["steps"],
            "epochs": stage["epochs"], "seconds_a_step": stage["seconds_a_step"],
        })  # fmt: skip
        shutil.rmtree(folder)  # what it found is in the store, and a full model's weights are large


def find_rates(
    plan: Plan, tasks: Sequence[str], names: Sequence[str], path: Path, environment: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Sweep every variant's rates on some tasks; the one with the best mean score, into ``path``."""
    rates: dict[str, Any] = checkpoints.read_json(path)["rates"] if path.is_file() else {}
    for name in dict.fromkeys(rate_name(n) for n in names):
        if name in rates:
            continue
        variant = VARIANTS[name]
        scores: dict[str, dict[str, float]] = {}
        for task in tasks:
            progress.step(f"rates of {variant.label} on {task}")
            options = plan.options(task, name, 0, plan.out / "rates" / f"{task}-{name}", variant.rates[0])
            report = sweep.sweep(options, {"lr": variant.rates}, progress)
            scores[task] = {f"{cell['lr']:g}": cell["mean"] for cell in report["cells"]}
            shutil.rmtree(options.output)
        means = {rate: statistics.fmean(scores[task][f"{rate:g}"] for task in tasks) for rate in variant.rates}
        rates[name] = {"lr": max(means, key=means.__getitem__), "scores": scores}
        how = {"tasks": list(tasks), "seed": 0, **plan.settings()}
        checkpoints.write_json(path, {"how": how, "environment": environment, "rates": rates})
    return rates
