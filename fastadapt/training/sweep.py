"""A grid of learning rates, sizes and seeds through ``Trainer.hyperparameter_search``: ``fastadapt train --sweep``.

Optuna counts the points; what they found lies in a file of each, so that a stopped sweep goes on with the point, and
from the checkpoint, where it was stopped. The best point's adaptation is the result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastadapt as fa
from fastadapt.console import Progress
from fastadapt.errors import UserError
from fastadapt.training import base, checkpoints, folder, recipe
from fastadapt.training.batches import longest
from fastadapt.training.fit import arguments, ended, found
from fastadapt.training.options import Options, check, enter, identity_of, processes
from fastadapt.training.run import Prepared, Stage, counts, prepare, tokenized
from fastadapt.training.trainer import Best, TaskTrainer, Unit
from fastadapt.training.watch import Watch

POINTS = "points"
SIZES = {"bottleneck": ("houlsby", "pfeiffer", "parallel", "masked", "adapterdrop", "mam"), "rank": ("lora",),
         "length": ("prefix",)}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One training of the grid; a ``size`` of None is the method's own."""

    lr: float
    size: int | None
    seed: int

    @property
    def key(self) -> str:
        """Of its folder."""
        return f"lr-{self.lr:g}" + ("" if self.size is None else f"_size-{self.size}") + f"_seed-{self.seed}"


def size_field(method: str) -> str | None:
    """What a method's size is called; None where it has none."""
    return next((name for name, methods in SIZES.items() if method in methods), None)


def grid(options: Options, axes: Mapping[str, Sequence[float]]) -> list[Point]:
    """All points, in their order; axes that are not given have the one value of ``options``.

    Raises:
        UserError: for an axis that the method has not.
    """
    known = [f.name for f in fields(Point)]
    unknown = [name for name in axes if name not in known]
    if unknown:
        raise UserError(f"--sweep: got {unknown[0]!r}; accepted are {', '.join(known)}")
    if "size" in axes and size_field(options.method) is None:
        raise UserError(f"--sweep: got sizes, but {options.method} has none; accepted are lr and seed")
    rates = axes.get("lr", (options.lr,))
    sizes = [int(size) for size in axes["size"]] if "size" in axes else [None]
    seeds = [int(seed) for seed in axes.get("seed", options.seeds)]
    return [Point(*point) for point in itertools.product(rates, sizes, seeds)]


class SweepTrainer(TaskTrainer):
    """A trainer whose every ``train(trial=...)`` is one point: of its own folder, from its own checkpoint.

    Args:
        sweep: what the points share.
        model, args, units, tokenizer, options: as in :class:`TaskTrainer`; the model has the adaptation of any point.
    """

    def __init__(self, sweep: Sweep, model: nn.Module, args: Any, units: Sequence[Unit], tokenizer: Any, **more: Any):
        super().__init__(model, args, units, tokenizer, **more)
        self.sweep = sweep
        self.point: Point | None = None
        self.model_init = lambda trial: sweep.model_of(self.point)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.sweep.folder(self.point) / "checkpoints")

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, **kwargs: Any) -> Any:
        self.hp_space(trial)
        point = self.point = Point(trial.params["lr"], trial.params.get("size"), trial.params["seed"])
        self.best, self.control.should_training_stop = Best({}, {}), False
        self.args.seed = point.seed  # Trainer sets it before it reads it from the trial
        self.run = hashlib.sha256(f"{self.sweep.mark} {point.key}".encode()).hexdigest()
        watch = Watch(self.sweep.progress)
        self.add_callback(watch)
        where = Path(self._get_output_dir(trial))
        checkpoint = checkpoints.newest(where, self.run)
        self.sweep.progress.step(f"{point.key}: {'starts' if checkpoint is None else f'from {checkpoint.name}'}")
        result = None
        if checkpoint is not None:
            self.model = self.sweep.model_of(point)
        if not ended(self, checkpoint):
            result = super().train(None if checkpoint is None else str(checkpoint), trial=trial, **kwargs)
        self.remove_callback(watch)
        self.keep_best()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # autocast's wrapper, round forward
        self.sweep.finish(point, found(self, watch, self.sweep.item.task.name))
        shutil.rmtree(where, ignore_errors=True)
        return result


class Sweep:
    """The grid of one task and what its points share: the base, read and frozen once."""

    def __init__(
        self, options: Options, item: Prepared, model: nn.Module, extra: Sequence[str], tokenizer: Any,
        points: Sequence[Point], progress: Progress,
    ) -> None:  # fmt: skip
        self.options, self.item, self.model, self.tokenizer = options, item, model, tokenizer
        self.extra, self.points, self.progress = tuple(extra), list(points), progress
        self.name = None if options.method == "full" else item.task.name
        self.base_checksum = base.base_checksum(model)
        identity = identity_of(options, self.base_checksum) | {"points": [p.key for p in points]}
        self.mark = enter(options, identity)

    def folder(self, point: Point) -> Path:
        return self.options.output / POINTS / point.key

    def config(self, point: Point) -> Any:
        field = size_field(self.options.method)
        size = self.options.size if point.size is None else replace(self.options.size, **{field: point.size})
        return recipe.configuration(self.options.method, size)

    def model_of(self, point: Point) -> nn.Module:
        """The model with the new weights of ``point``, and PyTorch's generator as a training by itself has it."""
        torch.manual_seed(point.seed)
        if self.name is None:
            self.model, _ = base.load_model(self.options.model, self.item.task.width, point.seed)
        else:
            if self.name in fa.adaptations(self.model):
                fa.remove(self.model, self.name)
            fa.adapt(self.model, self.config(point), name=self.name, head=self.item.task.width)
        torch.manual_seed(point.seed)
        return self.model

    # -- results -------------------------------------------------------------------------------------------------

    def results(self) -> dict[Point, dict[str, Any]]:
        """What the finished points found."""
        paths = {point: self.folder(point) / "result.json" for point in self.points}
        return {point: checkpoints.read_json(path) for point, path in paths.items() if path.is_file()}

    def score(self, result: dict[str, Any]) -> float:
        return result["scores"][self.item.task.name]["score"]

    def finish(self, point: Point, result: dict[str, Any]) -> None:
        """Keep what ``point`` found and, where it is the best so far, its weights in the output folder."""
        earlier = [self.score(r) for r in self.results().values()]
        best = not earlier or self.score(result) > max(earlier)
        label = self.item.task.name
        config = None if self.name is None else self.config(point)
        stage = Stage(label, ((self.name, 0),), config, point.lr)
        result |= {"point": asdict(point), "parameters": counts(self.model, stage)}
        if best:
            of_base = (None, ()) if self.name is None else (self.base_checksum, self.extra)
            saved = folder.Saved(self.item.task, self.options.method, self.options.model, *of_base)
            result["notes"] = folder.write(self.model, self.name, saved, self.tokenizer, self.options.output)
        checkpoints.write_json(self.folder(point) / "result.json", result)

    # -- the search ----------------------------------------------------------------------------------------------

    def run(self) -> dict[Point, dict[str, Any]]:
        """Train the points that are missing; what all of them found."""
        missing = [point for point in self.points if point not in self.results()]
        for _ in range(len(self.points) - len(missing)):
            self.progress.step("a point: done before")
        if missing:
            self._search(missing)
        return self.results()

    def _search(self, missing: Sequence[Point]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        units = [Unit(self.item.task, self.name, self.item.train, self.item.dev)]
        args = arguments(self.options, missing[0].seed, self.folder(missing[0]), units)
        trainer = SweepTrainer(self, self.model_of(missing[0]), args, units, self.tokenizer,
                               head_lr=self.options.head_lr, patience=self.options.patience,
                               announce=self.progress.step)  # fmt: skip
        # A study in memory, with the points that are missing in its queue: their results lie in our own files.
        study = {"storage": optuna.storages.InMemoryStorage(), "study_name": "sweep", "load_if_exists": True}
        queue = optuna.create_study(direction="maximize", **study)
        for point in missing:
            queue.enqueue_trial({k: v for k, v in asdict(point).items() if v is not None})

        def space(trial: optuna.Trial) -> dict[str, Any]:
            lr = trial.suggest_categorical("lr", sorted({p.lr for p in self.points}))
            seed = trial.suggest_categorical("seed", sorted({p.seed for p in self.points}))
            if missing[0].size is not None:
                trial.suggest_categorical("size", sorted({p.size for p in self.points}))
            return {"learning_rate": lr, "seed": seed, "data_seed": seed}

        trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=lambda _: trainer.best.scores[self.item.task.name]["score"],
            n_trials=len(missing),
            direction="maximize",
            backend="optuna",
            sampler=optuna.samplers.RandomSampler(),
            pruner=optuna.pruners.NopPruner(),
            **study,
        )


def sweep(options: Options, axes: Mapping[str, Sequence[float]], progress: Progress | None = None) -> dict[str, Any]:
    """Train every point of the grid, and leave the best one's adaptation, a table and a plot; the report's content.

    Args:
        options: of the run; its rate, size and seeds stand where ``axes`` have none.
        axes: ``lr``, ``size``, ``seed``, each with its values.

    Raises:
        UserError: for axes, files and options that cannot be served.
    """
    from fastadapt.training import sweep_report

    if importlib.util.find_spec("optuna") is None:
        raise UserError("--sweep: needs optuna: pip install optuna")
    if processes() > 1:
        raise UserError(f"--sweep: got {processes()} processes of torchrun; accepted is one")
    progress = progress or Progress()
    options = options.settled()
    check(options)
    if len(options.tasks) > 1 or options.method == "fusion":
        raise UserError("--sweep: got several tasks or a fusion; accepted is one task and another method")
    points = grid(options, axes)
    (item,) = prepare(options)
    tokenizer = base.load_tokenizer(options.model)
    model, extra = base.load_model(options.model, item.task.width)
    (item,) = tokenized([item], tokenizer, longest(tokenizer, model.config))
    run = Sweep(options, item, model, extra, tokenizer, points, progress)
    return sweep_report.finish(run, run.run())
