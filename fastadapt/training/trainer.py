"""Hugging Face's ``Trainer`` for one task or several that share a frozen base: their batches, scores, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import fastadapt as fa
from fastadapt.errors import UserError
from fastadapt.modules.state import container_of
from fastadapt.routing import refusal
from fastadapt.training import checkpoints, metrics
from fastadapt.training.batches import Collator, Example, TaskBatches
from fastadapt.training.task import Task
from fastadapt.training.watch import Schedule


@dataclass(frozen=True)
class Unit:
    """One task in training.

    Attributes:
        task: what is learnt.
        name: of its adaptation; None trains the whole model.
        train, dev: its rows; ``Example.task`` is the unit's number.
    """

    task: Task
    name: str | None
    train: Sequence[Example]
    dev: Sequence[Example]


@dataclass
class Best:
    """The best scores so far, and the weights that gave them.

    Attributes:
        scores: task -> {"score", "loss", "step", and every metric at that step}.
        tensors: of :func:`fastadapt.training.checkpoints.trained_state`.
        stale: evaluations in a row in which no task's score or, at the same score, loss got better.
    """

    scores: dict[str, dict[str, float]]
    tensors: dict[str, Tensor]
    stale: int = 0


class TaskTrainer(Trainer):
    """Trains units in batches that mix all tasks whose heads have one width (:func:`fastadapt.route`); tasks of other
    widths, and methods that are not routed in training, take turns with them.

    The loss is the model's own, a mean over the rows of a batch. Adam's step is of the size of the learning rate
    whatever the gradient's, so a task learns as it would alone, in batches of its rows.

    Args:
        model: with an adaptation for each unit's name.
        args: of the ``Trainer``.
        units: tasks, each with rows to train and to choose by.
        tokenizer: pads the batches.
        head_lr: learning rate of the heads; None is the others'.
        patience: evaluations without a better score after which training stops; None trains on.
        run: what checkpoints are marked with.
        announce: is told every task's scores, as a line.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        units: Sequence[Unit],
        tokenizer: Any,
        *,
        head_lr: float | None = None,
        patience: int | None = None,
        run: str = "",
        announce: Callable[[str], None] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.units, self.head_lr, self.patience, self.run = list(units), head_lr, patience, run
        self.best = Best({}, {})
        self.announce = announce
        self.scored: Unit | None = None
        collator = Collator(tokenizer, [unit.name for unit in units])
        rows = [row for unit in units for row in unit.train]
        super().__init__(
            model, args, data_collator=collator, train_dataset=rows,
            eval_dataset=[row for unit in units for row in unit.dev], compute_metrics=self._scores,
            callbacks=[Schedule(), *callbacks],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        # BERT's own loss is a mean over rows, whatever its signature in this version of transformers says.
        self.model_accepts_loss_kwargs = False

    # -- batches -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        rows = self.train_dataset
        groups = [self._groups()[row.task] for row in rows]
        sampler = TaskBatches(
            [row.length for row in rows], groups, self._train_batch_size, self.args.seed, lambda: int(self.state.epoch)
        )
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=sampler, collate_fn=self.data_collator))

    def _groups(self) -> list[Any]:
        """Of each unit, what it has in common with those that it may share a batch with."""
        container = container_of(self.model)
        routed = [u.name is not None and refusal(container[u.name].config, True) is None for u in self.units]
        return [
            unit.task.width if shared else f"alone {i}"
            for i, (unit, shared) in enumerate(zip(self.units, routed, strict=True))
        ]

    @contextmanager
    def running(self, names: Sequence[str | None]) -> Iterator[None]:
        """What a batch runs with: row i with the adaptation ``names[i]``."""
        if len(set(names)) > 1:
            with fa.route(self.model, names):
                yield
            return
        if names[0] is not None:
            fa.activate(self.model, names[0])
        yield

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with self.running(inputs.pop("names")):  # the backward too
            return super().training_step(model, inputs, *args, **kwargs)

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if training:
            # DistributedDataParallel sends what requires a gradient now, which else the active task's alone does.
            for unit in self.units:
                if unit.name is not None:
                    container_of(self.model)[unit.name].requires_grad_(True)
        return super()._wrap_model(model, training, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            names = [unit.name for unit in self.units if unit.name is not None]
            groups = fa.param_groups(
                self.model,
                lr=self.args.learning_rate,
                head_lr=self.head_lr,
                weight_decay=self.args.weight_decay,
                names=names or None,
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # -- scores --------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Every task's scores; the weights of tasks that got better are kept, and early stopping counts."""
        found: dict[str, float] = {}
        better = False
        for unit in self.units:
            self.scored = unit
            prefix = metric_key_prefix if len(self.units) == 1 else f"{metric_key_prefix}_{unit.task.name}"
            with self.running([unit.name]):
                result = super().evaluate(unit.dev, metric_key_prefix=prefix)
            found |= result
            names = metrics.CLASSIFICATION if unit.task.classes else metrics.REGRESSION
            scores = {name: result[f"{prefix}_{name}"] for name in names}
            score = scores[unit.task.metric]
            before = self.best.scores.get(unit.task.name)
            loss = result[f"{prefix}_loss"]
            # Of equal scores (of a class alone, say) the smaller loss decides.
            new_best = before is None or (score, -loss) > (before["score"], -before["loss"])
            if self.announce is not None and self.is_world_process_zero():
                self._announce(unit, loss, scores, new_best)
            if new_best:
                better = True
                self.best.scores[unit.task.name] = {
                    "score": score,
                    "loss": loss,
                    "step": self.state.global_step,
                    **scores,
                }
                state = checkpoints.trained_state(self.model, unit.name)
                self.best.tensors |= {key: t.detach().cpu().clone() for key, t in state.items()}
        self.best.stale = 0 if better else self.best.stale + 1
        if self.patience is not None and self.best.stale >= self.patience:
            self.control.should_training_stop = True
        return found

    def _announce(self, unit: Unit, loss: float, scores: dict[str, float], best: bool) -> None:
        found = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
        epoch, mark = self.state.epoch or 0.0, "  best so far" if best else ""
        self.announce(f"{unit.name or unit.task.name}  epoch {epoch:.4g}  dev loss {loss:.4f}  {found}{mark}")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = sorted(eval_dataset, key=lambda row: row.length)  # little padding; labels come along
        size = self.args.eval_batch_size
        return self.accelerator.prepare(DataLoader(rows, batch_size=size, collate_fn=self.data_collator))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("names")
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _scores(self, predictions: Any) -> dict[str, float]:
        logits, labels = torch.as_tensor(predictions.predictions), torch.as_tensor(predictions.label_ids)
        return metrics.scores(logits, labels, classes=self.scored.task.classes)

    def keep_best(self) -> None:
        """Give the model the weights of the best evaluation of each task."""
        checkpoints.put_back(self.model, self.best.tensors)

    # -- checkpoints: what trains, the best so far, optimizer, schedule, random numbers; never the frozen base ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return  # transformers calls this in every process
        now = {k: t for unit in self.units for k, t in checkpoints.trained_state(self.model, unit.name).items()}
        scores = {"scores": self.best.scores, "stale": self.best.stale}
        checkpoints.write_weights(Path(output_dir or self.args.output_dir), now, self.best.tensors, scores)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        now, best, scores = checkpoints.read_weights(Path(resume_from_checkpoint))
        checkpoints.put_back(self.model, now)
        self.best = Best(scores["scores"], best, scores["stale"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what a kill has left of it
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has put its random numbers there
            if self.args.should_save:
                checkpoints.seal(folder, self.run)
        except (OSError, RuntimeError, SafetensorError, UserError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            why = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise UserError(
                f"{folder}: cannot be written ({why}); the checkpoint before it is whole, and --resume goes on from it"
            ) from error
