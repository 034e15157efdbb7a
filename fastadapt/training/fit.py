"""One stage of training: tasks together, from new weights or a checkpoint to the best on dev."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastadapt.console import Progress
from fastadapt.training import checkpoints
from fastadapt.training.options import Options
from fastadapt.training.trainer import TaskTrainer, Unit
from fastadapt.training.watch import Watch

CHECKPOINTS = "checkpoints"


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
    if not ended(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.keep_best()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast's wrapper, round forward
    return found(trainer, watch, label)


def found(trainer: TaskTrainer, watch: Watch, label: str) -> dict[str, Any]:
    """What a finished training found, for the report."""
    history = trainer.state.log_history
    epochs = trainer.state.epoch or 0.0
    steps = trainer.state.global_step
    return {
        "label": label,
        "seed": trainer.args.seed,
        "scores": trainer.best.scores,
        "loss": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "dev": _dev_curves(history, trainer.units),
        "steps": steps,
        "epochs": epochs,
        "seconds_a_step": watch.seconds / watch.steps if watch.steps else None,
        "steps_an_epoch": steps / epochs if epochs else None,
    }


def ended(trainer: TaskTrainer, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is of a training that early stopping had ended; the trainer is then where that was."""
    if checkpoint is None or trainer.patience is None:
        return False
    _, _, found = checkpoints.read_weights(checkpoint)
    if found["stale"] < trainer.patience:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
    return True


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
    bf16 = options.dtype == "bf16"
    # Read, set under bf16 and never taken back by TrainingArguments: all later trainings would be in bf16 too.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
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
        optim="adamw_torch_fused",  # without decay, as by default, this is Adam
        seed=seed,
        data_seed=seed,
        bf16=bf16,
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
