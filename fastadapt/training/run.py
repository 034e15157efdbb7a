"""``fastadapt train``: files and a model in, result folders and a report out."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastadapt as fa
from fastadapt.console import Progress
from fastadapt.errors import UserError
from fastadapt.training import base, checkpoints, data, folder, recipe
from fastadapt.training.batches import Example, longest, tokenize
from fastadapt.training.data import Row, Source
from fastadapt.training.fit import checkpoint_folder, fit
from fastadapt.training.options import Options, check, enter, identity_of, is_main
from fastadapt.training.task import Task, make_task, targets
from fastadapt.training.trainer import Unit

SEEDS = "seeds"


@dataclass(frozen=True)
class Prepared:
    """A task, read and checked."""

    task: Task
    train_file: Source
    dev_file: Source
    train_rows: list[Row]
    dev_rows: list[Row]
    train: list[Example] = field(default_factory=list)
    dev: list[Example] = field(default_factory=list)


def prepare(options: Options) -> list[Prepared]:
    """Every task's rows and labels; raises ``UserError`` for what is wrong with a file."""
    prepared = []
    for files in options.tasks:
        train_rows, train = data.read(files.train, labelled=True)
        if options.rows is not None:
            train_rows = train_rows[: options.rows]
        task = make_task(
            files.name, train_rows, train, kind=files.kind, metric=files.metric, max_length=options.max_length
        )
        dev_rows, dev = data.read(files.dev, labelled=True)
        targets(task, dev_rows, dev, train.path)
        prepared.append(Prepared(task, train, dev, train_rows, dev_rows))
    return prepared


def tokenized(prepared: Sequence[Prepared], tokenizer: Any, limit: int) -> list[Prepared]:
    """The same with token ids; ``limit`` is how many a row may have."""
    done = []
    for number, item in enumerate(prepared):
        cut = item.task.max_length
        options = {"limit": limit, "cut": cut, "task": number}
        train_targets = targets(item.task, item.train_rows, item.train_file, item.train_file.path)
        dev_targets = targets(item.task, item.dev_rows, item.dev_file, item.train_file.path)
        train = tokenize(item.train_rows, item.train_file, tokenizer, targets=train_targets, **options)
        dev = tokenize(item.dev_rows, item.dev_file, tokenizer, targets=dev_targets, **options)
        done.append(replace(item, train=train, dev=dev))
    return done


# -- stages: what is trained together ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Tasks trained together: (adaptation's name, task) of each; ``config`` of the adaptations."""

    label: str
    members: tuple[tuple[str | None, int], ...]
    config: Any
    lr: float


def stages(options: Options, prepared: Sequence[Prepared], mixed: Sequence[str]) -> list[Stage]:
    """In their order; ``mixed`` are adapters that a fusion finds in the model already."""
    names = [item.task.name for item in prepared]
    if options.method == "full":
        return [Stage(names[0], ((None, 0),), None, options.lr)]
    if options.method == "fusion":
        first: list[Stage] = []
        if not mixed:
            width = {} if options.size.bottleneck is None else {"bottleneck": options.size.bottleneck}
            adapter = fa.PfeifferConfig(**width)
            first = _split(
                options, [(name, i) for i, name in enumerate(names)], adapter, "adapters", options.adapter_lr
            )
        fields = replace(options.size, bottleneck=None)
        config = recipe.fusion(tuple(mixed or names), fields)
        mixes = [(f"{name}_fusion", i) for i, name in enumerate(names)]
        return first + [Stage(name, ((name, i),), config, options.lr) for name, i in mixes]
    config = recipe.configuration(options.method, options.size)
    return _split(options, [(name, i) for i, name in enumerate(names)], config, "joint", options.lr)


def _split(options: Options, members: list[tuple[str, int]], config: Any, label: str, lr: float) -> list[Stage]:
    if options.one_by_one or len(members) == 1:
        return [Stage(name, ((name, i),), config, lr) for name, i in members]
    return [Stage(label, tuple(members), config, lr)]


# -- the run -------------------------------------------------------------------------------------------------------


def train(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Train, and leave result folders and a report in ``options.output``; the report's content.

    Raises:
        UserError: for whatever is wrong with files, options or the disk, before training where it can be known.
    """
    from fastadapt.training import report

    progress = progress or Progress(None if is_main() else io.StringIO())
    options = options.settled()
    check(options)
    prepared = prepare(options)
    for item in prepared:
        t = item.task
        what = f"{len(t.labels)} classes" if t.classes else "regression"
        progress.step(f"{t.name}: {len(item.train_rows)} rows to train, {len(item.dev_rows)} dev, {what}, {t.metric}")
    tokenizer = base.load_tokenizer(options.model)
    model, extra = base.load_model(options.model, prepared[0].task.width)
    prepared = tokenized(prepared, tokenizer, longest(tokenizer, model.config))
    run = Run(options, prepared, tokenizer, model, tuple(extra), progress)
    mark = enter(options, identity_of(options, run.base_before))
    results = run.seeds(mark)
    return report.finish(run, results)


class Run:
    """A run's model and all that its stages share."""

    def __init__(
        self,
        options: Options,
        prepared: Sequence[Prepared],
        tokenizer: Any,
        model: nn.Module,
        extra: tuple[str, ...],
        progress: Progress,
    ) -> None:
        self.options, self.prepared, self.tokenizer, self.progress = options, prepared, tokenizer, progress
        self.model, self.extra = model, extra
        self.base_before = base.base_checksum(model)
        self.mixed = self._load_mixed()
        self.stages = stages(options, prepared, self.mixed)

    def _load_mixed(self) -> list[str]:
        names = []
        for path in self.options.adapters:
            saved = folder.read(path)
            folder.check_base(saved, path, self.model, self.options.model)
            if saved.task.name in (*names, *(item.task.name for item in self.prepared)):
                raise UserError(f"--adapters: {path} is of a task {saved.task.name!r}, a name that is taken")
            folder.load(self.model, path, saved, saved.task.name)
            names.append(saved.task.name)
        return names

    def seed_folder(self, seed: int) -> Path:
        return self.options.output / SEEDS / str(seed)

    def seeds(self, mark: str) -> dict[int, list[dict[str, Any]]]:
        """Seed -> what each of its stages found. Those that an earlier call finished are read."""
        results = {}
        for seed in self.options.seeds:
            results[seed] = []
            for stage in self.stages:
                results[seed].append(self._stage(stage, seed, mark))
            self._check_earlier(results[seed])
            for name in [n for n in fa.adaptations(self.model) if n not in self.mixed][::-1]:
                fa.remove(self.model, name)
            if self.options.method != "full" and base.base_checksum(self.model) != self.base_before:
                raise RuntimeError("the base's weights have changed")
        return results

    def _stage(self, stage: Stage, seed: int, mark: str) -> dict[str, Any]:
        done = self.seed_folder(seed) / f"{stage.label}.json"
        tasks = [self.prepared[i].task for _, i in stage.members]
        where = {task.name: self.seed_folder(seed) / (name or task.name) for (name, _), task in
                 zip(stage.members, tasks, strict=True)}  # fmt: skip
        if done.is_file():
            self.progress.step(f"seed {seed}, {stage.label}: done before")
            for (name, _), task in zip(stage.members, tasks, strict=True):
                if name is not None:
                    fa.load(self.model, where[task.name], name=name)
            return checkpoints.read_json(done)
        torch.manual_seed(seed)
        if self.options.method == "full":
            self.model, _ = base.load_model(self.options.model, tasks[0].width, seed)
        for name, i in stage.members:
            if name is not None:
                fa.adapt(self.model, stage.config, name=name, head=self.prepared[i].task.width)
        units = [
            Unit(task, name, [replace(e, task=n) for e in item.train], [replace(e, task=n) for e in item.dev])
            for n, ((name, i), task) in enumerate(zip(stage.members, tasks, strict=True))
            for item in (self.prepared[i],)
        ]
        options = replace(self.options, lr=stage.lr)
        result = fit(self.model, units, options, seed, mark, self.tokenizer, self.progress, stage.label)
        result["notes"], result["checksums"] = [], {}
        for (name, _), task in zip(stage.members, tasks, strict=True):
            saved = folder.Saved(
                task if name is None else replace(task, name=name),
                self.options.method,
                self.options.model,
                None if name is None else self.base_before,
                () if name is None else self.extra,
                getattr(stage.config, "adapters", ()),
            )
            if is_main():
                result["notes"] += folder.write(self.model, name, saved, self.tokenizer, where[task.name])
            state = checkpoints.trained_state(self.model, name)
            result["checksums"][name or task.name] = base.checksum(sorted(state.items()))
        result["parameters"] = counts(self.model, stage)
        if is_main():
            checkpoints.write_json(done, result)
            shutil.rmtree(checkpoint_folder(self.options, seed, stage.label), ignore_errors=True)
        return result

    def _check_earlier(self, results: list[dict[str, Any]]) -> None:
        """Every adaptation is, to the last bit, what it was when its own stage ended."""
        for result in results:
            for name, before in result["checksums"].items():
                if name not in fa.adaptations(self.model):
                    continue
                now = base.checksum(sorted(checkpoints.trained_state(self.model, name).items()))
                if now != before:
                    raise RuntimeError(f"{name!r} was changed by a later task")


def counts(model: nn.Module, stage: Stage) -> dict[str, Any]:
    """Parameters of the base and of each of the stage's tasks."""
    report = fa.parameter_report(model)
    if stage.members[0][0] is None:
        return {"base": report.total, "tasks": {stage.label: {"own": report.total, "head": 0, "share": 1.0}}}
    tasks = {}
    for name, _ in stage.members:
        t = report.tasks[name]
        own = t.adapter + t.layer_norm
        tasks[name] = {"own": own, "head": t.head, "training_only": t.training_only, "share": t.share}
    return {"base": report.base, "tasks": tasks}
