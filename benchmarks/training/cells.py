"""One training a cell: a task, a variant, a seed. Finished ones are kept in one JSON file, others go on."""

from __future__ import annotations

import fcntl
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.data import DATASETS, files
from benchmarks.training.variants import VARIANTS, rate_name
from fastadapt.bench.report import Record
from fastadapt.console import Progress
from fastadapt.environment import cpu_extensions, cpu_model
from fastadapt.errors import UserError
from fastadapt.training import checkpoints, run, sweep
from fastadapt.training.options import Options


@dataclass(frozen=True)
class Plan:
    """What all cells share.

    Attributes:
        data, out: folders of the data, and of everything that is made.
        model: folder or id of the base.
        epochs, batch, rows: of every training; ``epochs`` None is each variant's own; ``rows`` caps those of the tasks.
        dtype, device: as in ``fastadapt train``.
    """

    data: Path
    out: Path
    model: str
    epochs: float | None = None
    batch: int = 32
    rows: int | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def options(self, task: str, name: str, seed: int, folder: Path, lr: float, **more: Any) -> Options:
        """One training."""
        caps = [cap for cap in (self.rows, DATASETS[task].rows) if cap is not None]
        variant = VARIANTS[name]
        given: dict[str, Any] = {
            "epochs": variant.epochs if self.epochs is None else self.epochs, "rows": min(caps) if caps else None,
            "batch": self.batch, "dtype": self.dtype,
            "device": self.device, "lr": lr, "head_lr": variant.head_lr, "resume": True, "max_length": 128, **more,
        }  # fmt: skip
        source = files(task, self.data, self.out / "data")
        return Options(self.model, (source,), folder, variant.method, variant.size, seeds=(seed,), **given)

    def settings(self) -> dict[str, Any]:
        """What cells of one table have to have in common."""
        return {k: getattr(self, k) for k in ("epochs", "batch", "rows", "dtype", "device")}


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether ``path``, a piece of work, is now this process's alone; free again afterwards, and if the process dies.

    With ``wait``, it is as soon as nobody else has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


class Store:
    """The finished cells, in a file that is whole at any time and that several processes may add to."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "cells": [], "times": []}
        self.read()
        if self.content["settings"] != settings:
            raise UserError(f"--out: {path} is of {self.content['settings']}, but now {settings} are asked for; "
                            "accepted is another folder")  # fmt: skip

    def read(self) -> None:
        """See what others have added."""
        if self.path.is_file():
            self.content = checkpoints.read_json(self.path)

    def find(self, kind: str, **key: Any) -> Record | None:
        found = (row for row in self.content[kind] if all(row[k] == v for k, v in key.items()))
        return next(found, None)

    def add(self, kind: str, row: Record) -> None:
        with claim(self.path.with_suffix(".lock"), wait=True):
            self.read()
            self.content[kind].append(row)
            checkpoints.write_json(self.path, self.content)


def train_cells(
    plan: Plan, store: Store, tasks: Sequence[str], names: Sequence[str], seeds: Sequence[int],
    rates: dict[str, float], progress: Progress,
) -> None:  # fmt: skip
    """Train every cell that is neither in ``store`` nor under way in another process."""
    wanted = [(seed, task, name) for seed in seeds for task in tasks for name in names]
    elsewhere = 0
    for number, (seed, task, name) in enumerate(wanted, start=1):
        label = f"cell {number} of {len(wanted)}: {task}, {VARIANTS[name].label}, seed {seed}"
        folder = plan.out / "cells" / f"{task}-{name}-{seed}"
        with claim(folder.with_suffix(".lock")) as ours:
            if not ours:
                progress.step(f"{label}: under way in another process")
                elsewhere += 1
                continue
            store.read()
            before = store.find("cells", task=task, variant=name, seed=seed)
            if before is None:
                progress.step(label)
                store.add("cells", train_cell(plan, task, name, seed, folder, rates[name], progress))
                shutil.rmtree(folder)  # what it found is in the store, and a full model's weights are large
            elif (before["lr"], before["head_lr"]) != (rates[name], VARIANTS[name].head_lr):
                raise UserError(f"--out: {store.path} has {label} at the rate {rate_text(before)}; accepted is another "
                                "folder for other rates")  # fmt: skip
    store.read()
    if elsewhere:
        progress.step(f"under way in other processes: {elsewhere}; the same command shows them when they end")


def machine() -> str:
    """Where a row of the table is made: rows may come from several machines."""
    threads = torch.get_num_threads()
    return f"{cpu_model()} ({', '.join(cpu_extensions())}), {threads} thread{'s' if threads > 1 else ''}"


def rate_text(cell: Record) -> str:
    """The learning rate of a cell, and the head's where it has its own."""
    return f"{cell['lr']:g}" + ("" if cell["head_lr"] is None else f", head {cell['head_lr']:g}")


def train_cell(plan: Plan, task: str, name: str, seed: int, folder: Path, lr: float, progress: Progress) -> Record:
    """Train one cell in ``folder``; what the table keeps of it."""
    options = plan.options(task, name, seed, folder, lr)
    report = run.train(options, progress)
    (found,) = report["tasks"].values()
    (stage,) = report["stages"]
    score = found["scores"][str(seed)]
    return {
        "task": task, "variant": name, "seed": seed, "lr": lr, "head_lr": options.head_lr,
        "metric": found["metric"], "score": score["score"], "scores": score, "parameters": found["parameters"],
        "base": report["size"]["base"], "steps": stage["steps"], "epochs": stage["epochs"],
        "seconds_a_step": stage["seconds_a_step"], "dtype": options.settled().dtype, "machine": machine(),
    }  # fmt: skip


def find_rates(
    plan: Plan, tasks: Sequence[str], names: Sequence[str], path: Path, progress: Progress
) -> dict[str, Any]:
    """Sweep every variant's rates on some tasks; the one with the best mean score, into ``path``."""

    def known() -> dict[str, Any]:
        return checkpoints.read_json(path)["rates"] if path.is_file() else {}

    how = {"tasks": list(tasks), "seed": 0, **plan.settings()}
    for name in dict.fromkeys(rate_name(n) for n in names):
        with claim(plan.out / "rates" / f"{name}.lock") as ours:
            if not ours:
                progress.step(f"rates of {VARIANTS[name].label}: under way in another process")
            elif name not in known():
                found = sweep_rates(plan, tasks, name, progress)
                with claim(plan.out / "rates" / "all.lock", wait=True):
                    content = {"how": how, "rates": {**known(), name: found}}
                    checkpoints.write_json(path, content)
    return known()


def sweep_rates(plan: Plan, tasks: Sequence[str], name: str, progress: Progress) -> dict[str, Any]:
    """The scores of one variant at each of its rates, and the rate with the best mean."""
    variant = VARIANTS[name]
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        progress.step(f"rates of {variant.label} on {task}")
        options = plan.options(task, name, 0, plan.out / "rates" / f"{task}-{name}", variant.rates[0])
        report = sweep.sweep(options, {"lr": variant.rates}, progress)
        scores[task] = {f"{cell['lr']:g}": cell["mean"] for cell in report["cells"]}
        shutil.rmtree(options.output)
    means = {rate: statistics.fmean(scores[task][f"{rate:g}"] for task in tasks) for rate in variant.rates}
    best = max(means, key=means.__getitem__)
    dtype = options.settled().dtype
    return {"lr": best, "head_lr": variant.head_lr, "dtype": dtype, "machine": machine(), "scores": scores}
