"""A step of every variant, ours and the peer's and full fine-tuning's, on the same batches, taking turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fastadapt as fa
from benchmarks.training.cells import Plan, Store, machine
from benchmarks.training.variants import FULL, VARIANTS, Variant
from fastadapt.bench.case import Case, load_model
from fastadapt.bench.peers import PEERS
from fastadapt.bench.setup import Setup
from fastadapt.console import Progress
from fastadapt.errors import UserError
from fastadapt.training import base, recipe
from fastadapt.training.batches import Collator, TaskBatches, longest
from fastadapt.training.run import prepare, tokenized

Batch = dict[str, Any]
WARM_UP = 3


def epoch(plan: Plan, task: str) -> list[Batch]:
    """The batches of a first epoch as ``fastadapt train`` makes them, for heads of two outputs."""
    options = plan.options(task, FULL, 0, plan.out / "unused", 1e-5)
    (item,) = prepare(options)
    tokenizer = base.load_tokenizer(plan.model)
    model, _ = base.load_model(plan.model, 2)
    (item,) = tokenized([item], tokenizer, longest(tokenizer, model.config))
    lengths = [row.length for row in item.train]
    collate = Collator(tokenizer, [None])
    sampler = TaskBatches(lengths, [0] * len(lengths), plan.batch, 0, lambda: 0)
    batches = [collate([item.train[i] for i in rows]) for rows in sampler]
    # Every system has a head of two outputs, and a step takes as long whatever the classes are.
    return [{k: v.long() % 2 if k == "labels" else v for k, v in b.items() if k != "names"} for b in batches]


def ours(plan: Plan, variant: Variant) -> nn.Module:
    """The model that ``fastadapt train`` trains."""
    model = load_model(Case(model=plan.model, seq=16), classifier=True, dropout=0.1)
    if variant.method != FULL:
        fa.adapt(model, recipe.configuration(variant.method, variant.size))
    return model


def theirs(plan: Plan, variant: Variant) -> nn.Module | None:
    """The peer's model of the same method and size; None where there is none, or it is not installed."""
    if variant.peer == "stock":
        model = load_model(Case(model=plan.model, seq=16), classifier=True, dropout=0.1)
        for key, parameter in model.named_parameters():
            of_method = variant.method == "bitfit" and key.endswith("bias")
            parameter.requires_grad_(of_method or key.startswith("classifier."))
        return model
    if variant.peer is None or PEERS[variant.peer].missing() is not None:
        return None
    method, fields = variant.bench
    setup = Setup(Case(model=plan.model, seq=16, method=method, dropout=0.1, **fields), classifier=True)
    try:
        return PEERS[variant.peer].setup("training", setup).model
    except UserError:  # a size that it has not
        return None


def step_of(model: nn.Module, dtype: str) -> Callable[[Batch], None]:
    """Forward under autocast, backward, clipping and AdamW, as ``Trainer`` does them."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> None:
        kind = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
        with kind:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def take_turns(systems: dict[str, Callable[[Batch], None]], batches: Sequence[Batch]) -> dict[str, list[float]]:
    """Seconds of every system for every batch; who begins goes round."""
    names = list(systems)
    for batch in sorted(batches, key=lambda b: -b["input_ids"].numel())[:WARM_UP]:
        for name in names:
            systems[name](batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, batch in enumerate(batches):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            systems[name](batch)
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def time_variants(
    plan: Plan, store: Store, names: Sequence[str], dtypes: Sequence[str], steps: int, task: str, progress: Progress
) -> None:
    """Time what is not in ``store``: ``steps`` batches spread over an epoch of ``task``; all of it where that is 0."""
    batches = None
    for dtype in dtypes:
        for name in names:
            if store.find("times", variant=name, dtype=dtype) is not None:
                continue
            batches = epoch(plan, task) if batches is None else batches
            count = len(batches) if steps == 0 else min(steps, len(batches))
            chosen = [batches[i * len(batches) // count] for i in range(count)]
            progress.step(f"timing {VARIANTS[name].label}, {dtype}, {count} of {len(batches)} batches of {task}")
            models = {"ours": ours(plan, VARIANTS[name])}
            if name != FULL:
                models |= {"peer": theirs(plan, VARIANTS[name]), FULL: ours(plan, VARIANTS[FULL])}
            systems = {who: step_of(model, dtype) for who, model in models.items() if model is not None}
            seconds = take_turns(systems, chosen)
            row = {"variant": name, "dtype": dtype, "task": task, "steps_an_epoch": len(batches), "machine": machine()}
            row["peer"] = VARIANTS[name].peer if "peer" in systems else None
            row["seconds"] = {who: [round(s, 6) for s in taken] for who, taken in seconds.items()}
            store.add("times", row)
