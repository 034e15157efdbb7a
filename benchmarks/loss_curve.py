"""The loss curve of the fused sublayers against the reference backend: the same weights, batches and dropout.

    python benchmarks/loss_curve.py --model FOLDER --train FILE.tsv [--text COLUMN --label COLUMN] [--steps 200]

Trains the same adaptation twice in float32, once as it runs here and once with every op's reference, and prints the
largest difference of a step's loss. Exit code 1 where that is above --limit.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.training import base, data, fit, recipe
from fastadapt.training.batches import longest, tokenize
from fastadapt.training.data import Source
from fastadapt.training.options import Files, Options
from fastadapt.training.task import make_task, targets
from fastadapt.training.trainer import TaskTrainer, Unit

LIMIT = 1e-4


class _Recorded(TaskTrainer):
    """Keeps every step's loss, which the log of some versions of transformers rounds."""

    losses: list[float]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        return loss


def curve(
    name: str, source: Source, method: str, size: recipe.Size, steps: int, lr: float, backend: str | None
) -> list[float]:
    """The loss of each step; ``backend`` None is what runs here by choice."""
    rows, source = data.read(source, labelled=True)
    task = make_task("task", rows, source, kind=None, metric=None, max_length=128)
    tokenizer = base.load_tokenizer(name)
    model, _ = base.load_model(name, task.width)
    torch.manual_seed(0)
    fa.adapt(model, recipe.configuration(method, size), name="task", head=task.width)
    limit = longest(tokenizer, model.config)
    wanted = targets(task, rows, source, source.path)
    examples = tokenize(rows, source, tokenizer, limit=limit, cut=limit, targets=wanted)
    units = [Unit(task, "task", examples, examples[:1])]
    with tempfile.TemporaryDirectory() as folder:
        files = Files("task", source, source)
        options = Options(name, (files,), Path(folder), method, epochs=1.0, lr=lr, dtype="fp32", device="cpu", batch=16)
        arguments = fit.arguments(options, 0, Path(folder), units)
        arguments.max_steps, arguments.eval_strategy, arguments.save_strategy = steps, "no", "no"
        trainer = _Recorded(model, arguments, units, tokenizer)
        trainer.losses = []
        with contextlib.nullcontext() if backend is None else fa.backend(backend):
            trainer.train()
    return trainer.losses


def largest_difference(one: list[float], other: list[float]) -> tuple[float, int]:
    """(largest difference of a step's loss, the step)."""
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(differences), differences.index(max(differences)) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--text")
    parser.add_argument("--label")
    parser.add_argument("--encoding", default="utf-8")
    parser.add_argument("--method", default="houlsby", choices=[m for m, r in recipe.RECIPES.items() if r.make])
    parser.add_argument("--lr", type=float)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=float, default=LIMIT)
    args = parser.parse_args()
    source = Source(args.train, args.text, None, args.label, args.encoding)
    lr = args.lr or recipe.RECIPES[args.method].lr
    curves = [curve(args.model, source, args.method, recipe.Size(), args.steps, lr, b) for b in (None, "reference")]
    worst, step = largest_difference(*curves)
    print(
        f"loss {curves[0][0]:.4f} to {curves[0][-1]:.4f} in {args.steps} steps of {args.method}, learning rate {lr:g}"
    )
    print(f"largest difference from the reference backend: {worst:.2e} at step {step} (limit {args.limit:g})")
    return 0 if worst <= args.limit else 1


if __name__ == "__main__":
    raise SystemExit(main())
