"""``fastadapt predict``: labels and probabilities from result folders, several tasks in one pass where they can."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.errors import UserError
from fastadapt.modules.state import container_of
from fastadapt.routing import refusal
from fastadapt.training import base, data, folder
from fastadapt.training.batches import Collator, longest, tokenize
from fastadapt.training.data import Row, Source
from fastadapt.training.task import Task


@dataclass(frozen=True)
class Result:
    """What one task says of one row.

    Attributes:
        row: counted from 1.
        line: in the input.
        task: name.
        label: the likeliest class, or a regression's number.
        probabilities: class -> probability; none of a regression.
    """

    row: int
    line: int
    task: str
    label: str | float
    probabilities: dict[str, float]


def predict(
    folders: Sequence[Path],
    source: Source,
    *,
    model: str | None = None,
    batch: int = 32,
    max_length: int | None = None,
    device: str = "auto",
) -> tuple[list[Result], list[Task]]:
    """Every task's result for every row, or the one that the source's ``task`` column asks for; and the tasks.

    Rows in the file's order. Tasks on one base whose heads have one width share batches (:func:`fastadapt.route`);
    others follow.

    Raises:
        UserError: for folders that are none of ``fastadapt train``, another base, and what is wrong with the input.
    """
    saved = [folder.read(path) for path in folders]
    names = [each.task.name for each in saved]
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    tasks = [replace(each.task, name=name) for each, name in zip(saved, names, strict=True)]
    full = [each for each in saved if each.base_checksum is None]
    if full and len(saved) > 1:
        raise UserError(f"--adapters: {full[0].task.name!r} is a whole model; accepted is it alone")
    if full and model is not None:
        raise UserError("--model: got one, but the folder is a whole model; accepted is none")
    rows, source = _read(source, tasks[0])
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = base.load_tokenizer(str(folders[0]))
    network = _open(folders, saved, names, model)
    examples = tokenize(
        rows, source, tokenizer, limit=longest(tokenizer, network.config), cut=max_length or tasks[0].max_length
    )
    asked = _asked(rows, source, tasks)
    network = network.to(target).eval()
    logits: dict[tuple[int, int], Tensor] = {}
    for group in _groups(network, tasks, alone=bool(full)):
        pairs = [pair for pair in asked if pair[1] in group]
        pairs.sort(key=lambda pair: examples[pair[0]].length)
        collate = Collator(tokenizer, [None if full else task.name for task in tasks])
        for start in range(0, len(pairs), batch):
            of = pairs[start : start + batch]
            inputs = collate([replace(examples[row], task=task) for row, task in of])
            logits |= zip(of, _run(network, inputs, target, routed=len(group) > 1), strict=True)
    results = [_result(tasks[task], logits[row, task], row + 1, rows[row].line) for row, task in asked]
    return results, tasks


def _asked(rows: Sequence[Row], source: Source, tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """(number of a row, number of a task) of every result."""
    if source.task is None:
        return [(row, task) for row in range(len(rows)) for task in range(len(tasks))]
    numbers = {task.name: i for i, task in enumerate(tasks)}
    for row in rows:
        if row.task not in numbers:
            raise UserError(
                f"{source.path}, line {row.line}, column {source.task!r}: got the task {row.task!r}; accepted are "
                f"{', '.join(map(repr, numbers))}"
            )
    return [(i, numbers[row.task]) for i, row in enumerate(rows)]


def _read(source: Source, task: Task) -> tuple[list[Row], Source]:
    """The rows; columns, encoding and format that were not named are those of the training file."""
    named = source.text is not None
    filled = replace(
        source,
        text=source.text or task.text,
        text2=source.text2 if named else source.text2 or task.text2,
        label=None,
        encoding=source.encoding or task.encoding,
        format=source.format or task.format,
    )
    if (filled.text2 is None) != (task.text2 is None):
        needs = "one text, --text" if task.text2 is None else "two texts, --text and --text2"
        raise UserError(f"--text2: got {filled.text2!r}; accepted for the task {task.name!r} is {needs}")
    return data.read(filled, labelled=False)


def _open(folders: Sequence[Path], saved: Sequence[folder.Saved], names: Sequence[str], model: str | None) -> nn.Module:
    if saved[0].base_checksum is None:
        network, missing = base.load_model(str(folders[0]), saved[0].task.width)
        if missing:
            raise UserError(f"--adapters: {folders[0]} lacks {missing[0]}")
        return network
    network = folder.open_base(saved[0], folders[0], model)
    for each, path, name in zip(saved, folders, names, strict=True):
        if each.base_checksum != saved[0].base_checksum:
            raise UserError(f"--adapters: {path} and {folders[0]} were trained on different bases")
        if (each.task.text2 is None) != (saved[0].task.text2 is None):
            raise UserError(f"--adapters: {path} and {folders[0]} take different numbers of texts")
        folder.load(network, path, each, name)
    return network


def _groups(network: nn.Module, tasks: Sequence[Task], *, alone: bool) -> list[list[int]]:
    """Numbers of tasks that share batches: those that are routed, by the width of their heads."""
    if alone:
        return [[0]]
    container = container_of(network)
    groups: dict[Any, list[int]] = {}
    for i, task in enumerate(tasks):
        routed = refusal(container[task.name].config, False) is None
        groups.setdefault(task.width if routed else f"alone {i}", []).append(i)
    return list(groups.values())


@torch.inference_mode()
def _run(network: nn.Module, inputs: dict[str, Any], device: str, *, routed: bool) -> Tensor:
    """Logits [B, labels] of a batch, whose rows are all of one task where they are not routed."""
    names = inputs.pop("names")
    context: Any = contextlib.nullcontext()
    if routed:
        context = fa.route(network, names)
    elif names[0] is not None:
        fa.activate(network, names[0])
    with context:
        return network(**{key: t.to(device) for key, t in inputs.items()}).logits.float().cpu()


def _result(task: Task, logits: Tensor, row: int, line: int) -> Result:
    if task.kind == "regression":
        return Result(row, line, task.name, float(logits[0]), {})
    probabilities = logits.softmax(-1)
    shares = {label: float(p) for label, p in zip(task.labels, probabilities, strict=True)}
    return Result(row, line, task.name, task.labels[int(probabilities.argmax())], shares)


# -- output ------------------------------------------------------------------------------------------------------


def write(results: Sequence[Result], tasks: Sequence[Task], path: Path | None, format: str) -> None:
    """Write results to a file, in one step, or to standard output.

    Args:
        format: ``jsonl``: an object a result. ``tsv``: of one task a column for each class's probability; of several
            the label and its probability, a line a row and task.
    """
    if path is None:
        _write(results, tasks, sys.stdout, format)
        return
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as stream:
            _write(results, tasks, stream, format)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--output: {path} cannot be written ({error.strerror})") from error


def _write(results: Sequence[Result], tasks: Sequence[Task], stream: TextIO, format: str) -> None:
    lines = _jsonl(results) if format == "jsonl" else _tsv(results, tasks)
    for line in lines:
        stream.write(line + "\n")


def _jsonl(results: Sequence[Result]) -> Iterator[str]:
    for r in results:
        content = {"row": r.row, "line": r.line, "task": r.task, "label": r.label}
        yield json.dumps(content | ({"probabilities": r.probabilities} if r.probabilities else {}), ensure_ascii=False)


def _tsv(results: Sequence[Result], tasks: Sequence[Task]) -> Iterator[str]:
    if len(tasks) == 1:
        labels = tasks[0].labels
        yield "\t".join(["row", "label", *(f"p({label})" for label in labels)])
        for r in results:
            yield "\t".join([str(r.row), _cell(r), *(f"{r.probabilities[label]:.6f}" for label in labels)])
        return
    yield "\t".join(["row", "task", "label", "probability"])
    for r in results:
        share = f"{r.probabilities[r.label]:.6f}" if r.probabilities else ""
        yield "\t".join([str(r.row), r.task, _cell(r), share])


def _cell(r: Result) -> str:
    return r.label if isinstance(r.label, str) else f"{r.label:.6g}"
