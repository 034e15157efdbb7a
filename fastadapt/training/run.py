"""``fastadapt train``: files and a model in, result folders and a report out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastadapt as fa
from fastadapt.bench.report import Progress, cpu_extensions
from fastadapt.errors import UserError
from fastadapt.training import base, checkpoints, data, folder, recipe
from fastadapt.training.batches import Example, longest, tokenize
from fastadapt.training.data import Row, Source
from fastadapt.training.recipe import RECIPES, Size
from fastadapt.training.task import Task, make_task, targets
from fastadapt.training.trainer import TaskTrainer, Unit
from fastadapt.training.watch import Watch

RUN, SEEDS, CHECKPOINTS = "run.json", "seeds", "checkpoints"
DTYPES = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Files:
    """A task's files and what the user says of it; None is found out."""

    name: str
    train: Source
    dev: Source
    kind: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Options:
    """What a run is asked for; None takes the recipe's.

    Attributes:
        model: folder or hub id of the base.
        tasks: one or more.
        output: folder for everything.
        method, size: of :data:`fastadapt.training.recipe.RECIPES`.
        adapters: result folders that ``fusion`` mixes; without them it trains an adapter for each task first.
        one_by_one: several tasks one after another and not in mixed batches.
        seeds: of heads, adapters, order and dropout; the best on dev is kept.
        epochs, lr, head_lr, weight_decay, warmup, batch, accumulate, clip: as their names say; ``warmup`` is a share
            of the steps, ``clip`` the largest gradient norm, 0 for none.
        max_length: tokens at which texts are cut.
        rows: the first so many of each training file.
        eval_steps: steps between evaluations; None is an epoch.
        patience: evaluations without a better score after which training stops.
        dtype: ``auto`` takes bf16 autocast where the processor has it.
        device: ``auto``, ``cpu`` or ``cuda``.
        tensorboard: write its logs.
        resume: go on where an earlier call stopped.
    """

    model: str
    tasks: tuple[Files, ...]
    output: Path
    method: str = "houlsby"
    size: Size = field(default_factory=Size)
    adapters: tuple[Path, ...] = ()
    one_by_one: bool = False
    seeds: tuple[int, ...] = (0,)
    epochs: float | None = None
    lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    batch: int = 32
    accumulate: int = 1
    clip: float = 1.0
    max_length: int | None = None
    rows: int | None = None
    eval_steps: int | None = None
    patience: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    tensorboard: bool = False
    resume: bool = False

    def settled(self) -> Options:
        """With every None that a recipe or this machine decides replaced."""
        recipe_ = RECIPES[self.method]
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return replace(
            self,
            lr=recipe_.lr if self.lr is None else self.lr,
            epochs=recipe_.epochs if self.epochs is None else self.epochs,
            device=device,
            dtype=_fast_dtype(device) if self.dtype == "auto" else self.dtype,
        )


def _fast_dtype(device: str) -> str:
    """bf16 where its products are faster than float32's."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(cpu_extensions()) else "fp32"


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


# -- checks: all of them before anything is trained ----------------------------------------------------------------


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


def _tokenized(prepared: Sequence[Prepared], tokenizer: Any, limit: int) -> list[Prepared]:
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


def _check(options: Options) -> None:
    for package, why in (
        ("accelerate", "train"),
        *((("tensorboard", "--tensorboard"),) if options.tensorboard else ()),
    ):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{why}: needs {package}: pip install {package}")
    names = [files.name for files in options.tasks]
    if len(set(names)) < len(names):
        raise UserError(f"--task: got {names} with a name twice; accepted are different names")
    if options.method == "full" and len(names) > 1:
        raise UserError("--method full: got several tasks; accepted is one, since each needs a model of its own")
    if options.method == "fusion":
        if len(names) < 2 and len(options.adapters) < 2:
            raise UserError("--method fusion: got one task; accepted are two with --task, or --adapters DIR DIR ...")
    elif options.adapters:
        raise UserError(f"--adapters: got some with --method {options.method}; accepted with --method fusion alone")
    else:
        if RECIPES[options.method].make is not None:
            recipe.configuration(options.method, options.size)
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output: got {str(options.output)!r}, which is a file; accepted is a folder")


def _identity(options: Options, base_checksum: str) -> dict[str, Any]:
    """All that decides the numbers of a run, for ``--resume`` to compare."""
    tasks = {}
    for files in options.tasks:
        tasks[files.name] = {
            **{side: hashlib.sha256(source.path.read_bytes()).hexdigest() for side, source in _sides(files)},
            **{
                f"{side} columns": [source.text, source.text2, source.label, source.encoding, source.format]
                for side, source in _sides(files)
            },
            "kind": files.kind,
            "metric": files.metric,
        }
    kept = ("method", "one_by_one", "seeds", "epochs", "lr", "head_lr", "weight_decay", "warmup", "batch",
            "accumulate", "clip", "max_length", "rows", "eval_steps", "patience", "dtype", "device")  # fmt: skip
    settings = {name: getattr(options, name) for name in kept}
    size = {k: str(v) for k, v in asdict(options.size).items()}
    adapters = [base.checksum([(p.name, _bytes(p))]) for d in options.adapters for p in sorted(d.glob("*.safetensors"))]
    content = {"model": base_checksum, "tasks": tasks, **settings, "size": size, "adapters": adapters}
    return json.loads(json.dumps(content))


def _bytes(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _sides(files: Files) -> tuple[tuple[str, Source], ...]:
    return (("train", files.train), ("dev", files.dev))


def _enter(options: Options, identity: dict[str, Any]) -> str:
    """Open or continue the output folder; the run's mark."""
    path = options.output / RUN
    if path.is_file():
        if not options.resume:
            raise UserError(f"--output: {options.output} holds a run; --resume goes on with it, another folder is new")
        before = checkpoints.read_json(path)
        differs = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
        if differs:
            what = differs[0]
            was, now = (json.dumps(d.get(what))[:60] for d in (before, identity))
            raise UserError(f"--resume: {options.output} is another run's: its {what} was {was}, and is {now} now")
    elif options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"--output: {options.output} has files of something else; accepted is a new or empty folder")
    else:
        checkpoints.write_json(path, identity)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- stages: what is trained together ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Tasks trained together: (adaptation's name, task) of each; ``config`` of the adaptations."""

    label: str
    members: tuple[tuple[str | None, int], ...]
    config: Any


def stages(options: Options, prepared: Sequence[Prepared], mixed: Sequence[str]) -> list[Stage]:
    """In their order; ``mixed`` are adapters that a fusion finds in the model already."""
    names = [item.task.name for item in prepared]
    if options.method == "full":
        return [Stage(names[0], ((None, 0),), None)]
    if options.method == "fusion":
        first: list[Stage] = []
        if not mixed:
            width = {} if options.size.bottleneck is None else {"bottleneck": options.size.bottleneck}
            adapter = fa.PfeifferConfig(**width)
            first = _split(options, [(name, i) for i, name in enumerate(names)], adapter, "adapters")
        fields = replace(options.size, bottleneck=None)
        config = recipe.fusion(tuple(mixed or names), fields)
        return first + [Stage(f"{name}_fusion", ((f"{name}_fusion", i),), config) for i, name in enumerate(names)]
    config = recipe.configuration(options.method, options.size)
    return _split(options, [(name, i) for i, name in enumerate(names)], config, "joint")


def _split(options: Options, members: list[tuple[str, int]], config: Any, label: str) -> list[Stage]:
    if options.one_by_one or len(members) == 1:
        return [Stage(name, ((name, i),), config) for name, i in members]
    return [Stage(label, tuple(members), config)]


# -- the run -------------------------------------------------------------------------------------------------------


def train(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Train, and leave result folders and a report in ``options.output``; the report's content.

    Raises:
        UserError: for whatever is wrong with files, options or the disk, before training where it can be known.
    """
    from fastadapt.training import report

    progress = progress or Progress()
    options = options.settled()
    _check(options)
    prepared = prepare(options)
    for item in prepared:
        t = item.task
        what = f"{len(t.labels)} classes" if t.classes else "regression"
        progress.step(f"{t.name}: {len(item.train_rows)} rows to train, {len(item.dev_rows)} dev, {what}, {t.metric}")
    tokenizer = base.load_tokenizer(options.model)
    model, extra = base.load_model(options.model, prepared[0].task.width)
    prepared = _tokenized(prepared, tokenizer, longest(tokenizer, model.config))
    run = Run(options, prepared, tokenizer, model, tuple(extra), progress)
    mark = _enter(options, _identity(options, run.base_before))
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

    def main(self) -> bool:
        """Whether this process writes (there are several under ``torchrun``)."""
        return int(os.environ.get("RANK", "0")) == 0

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
        result = fit(self.model, units, self.options, seed, mark, self.tokenizer, self.progress, stage.label)
        result["notes"], result["checksums"] = [], {}
        for (name, _), task in zip(stage.members, tasks, strict=True):
            saved = folder.Saved(
                task,
                self.options.method,
                self.options.model,
                None if name is None else self.base_before,
                () if name is None else self.extra,
                getattr(stage.config, "adapters", ()),
            )
            if self.main():
                result["notes"] += folder.write(self.model, name, saved, self.tokenizer, where[task.name])
            state = checkpoints.trained_state(self.model, name)
            result["checksums"][name or task.name] = base.checksum(sorted(state.items()))
        result["parameters"] = _counts(self.model, stage)
        if self.main():
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


def _counts(model: nn.Module, stage: Stage) -> dict[str, Any]:
    report = fa.parameter_report(model)
    if stage.members[0][0] is None:
        return {"base": report.total, "tasks": {stage.label: {"own": report.total, "head": 0, "share": 1.0}}}
    tasks = {}
    for name, _ in stage.members:
        t = report.tasks[name]
        own = t.adapter + t.layer_norm
        tasks[name] = {"own": own, "head": t.head, "training_only": t.training_only, "share": t.share}
    return {"base": report.base, "tasks": tasks}


def checkpoint_folder(options: Options, seed: int, label: str) -> Path:
    return options.output / CHECKPOINTS / f"seed-{seed}" / label


def fit(
    model: nn.Module,
    units: Sequence[Unit],
    options: Options,
    seed: int,
    mark: str,
    tokenizer: Any,
    progress: Progress,
    label: str,
) -> dict[str, Any]:
    """Train one stage; the model has each task's best weights after it. What is found goes into the report."""
    where = checkpoint_folder(options, seed, label)
    run = hashlib.sha256(f"{mark} {seed} {label}".encode()).hexdigest()
    watch = Watch(progress)
    trainer = TaskTrainer(
        model,
        arguments(options, seed, where, units),
        units,
        tokenizer,
        head_lr=options.head_lr,
        patience=options.patience,
        run=run,
        announce=lambda line: progress.step(f"seed {seed}  {line}"),
        callbacks=[watch, *_tensorboard(options, seed, label)],
    )
    checkpoint = checkpoints.newest(where, run) if options.resume else None
    if checkpoint is not None:
        progress.step(f"seed {seed}, {label}: goes on from {checkpoint.name}")
    _train(trainer, checkpoint)
    trainer.keep_best()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast's wrapper, round forward
    history = trainer.state.log_history
    epochs = trainer.state.epoch or 0.0
    steps = trainer.state.global_step
    return {
        "label": label,
        "seed": seed,
        "scores": trainer.best.scores,
        "loss": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "dev": _dev_curves(history, units),
        "steps": steps,
        "epochs": epochs,
        "seconds_a_step": watch.seconds / watch.steps if watch.steps else None,
        "steps_an_epoch": steps / epochs if epochs else None,
    }


def _train(trainer: TaskTrainer, checkpoint: Path | None) -> None:
    """Train, unless the checkpoint is of a run that early stopping had ended."""
    if checkpoint is not None and trainer.patience is not None:
        _, _, found = checkpoints.read_weights(checkpoint)
        if found["stale"] >= trainer.patience:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def arguments(options: Options, seed: int, where: Path, units: Sequence[Unit]) -> Any:
    """The ``TrainingArguments`` of a stage."""
    from transformers import TrainingArguments

    steps = options.eval_steps
    schedule = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if steps is not None:
        schedule = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": steps, "save_steps": steps}
    # transformers 5 takes a share of the steps as warmup_steps below 1.
    share = "warmup_ratio" if "warmup_ratio" in TrainingArguments.__dataclass_fields__ else "warmup_steps"
    rows = sum(len(unit.train) for unit in units)
    total = options.epochs * rows / (options.batch * options.accumulate)
    return TrainingArguments(
        output_dir=str(where),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=2 * options.batch,
        gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        lr_scheduler_type="linear",
        optim="adamw_torch",  # without decay, as by default, this is Adam
        seed=seed,
        data_seed=seed,
        bf16=options.dtype == "bf16",
        use_cpu=options.device == "cpu",
        logging_strategy="steps",
        logging_steps=max(1, int(total / 200)),
        logging_nan_inf_filter=False,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=options.device != "cpu",
        **schedule,
        **{share: options.warmup},
    )


def _tensorboard(options: Options, seed: int, label: str) -> list[Any]:
    if not options.tensorboard:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(options.output / "tensorboard" / f"seed-{seed}" / label)))]


def _dev_curves(history: list[dict[str, Any]], units: Sequence[Unit]) -> dict[str, list[list[float]]]:
    curves = {}
    for unit in units:
        key = score_key(unit, units)
        curves[unit.task.name] = [[row["step"], row[key]] for row in history if key in row]
    return curves


def score_key(unit: Unit, units: Sequence[Unit]) -> str:
    """What the ``Trainer`` logs the score of a task as."""
    prefix = "eval" if len(units) == 1 else f"eval_{unit.task.name}"
    return f"{prefix}_{unit.task.metric}"
