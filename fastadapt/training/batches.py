"""Rows as token ids, and the batches they come in: rows of like length together, tasks mixed where one model can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastadapt.errors import UserError
from fastadapt.training.data import Row, Source

_WINDOW = 50  # batches whose rows are sorted by length together, as in Hugging Face's LengthGroupedSampler


@dataclass(frozen=True)
class Example:
    """A row, tokenized. ``task`` is its number, ``target`` a class's number or a score, or None."""

    inputs: dict[str, list[int]]
    task: int
    target: int | float | None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


def longest(tokenizer: Any, config: Any) -> int:
    """How many tokens a row may have in a model of this configuration."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type == "roberta":
        positions -= config.pad_token_id + 1  # positions are counted from behind the padding's
    return min(positions, tokenizer.model_max_length)


def tokenize(
    rows: Sequence[Row],
    source: Source,
    tokenizer: Any,
    *,
    limit: int,
    cut: int | None,
    task: int = 0,
    targets: Sequence[int | float] | None = None,
) -> list[Example]:
    """Token ids of every row, as the model takes them.

    Args:
        limit: tokens that the model accepts.
        cut: tokens at which longer rows are cut; None refuses rows beyond ``limit``.

    Raises:
        UserError: naming file, line and column, for a row that is longer than the model.
    """
    first = [row.text for row in rows]
    second = None if source.text2 is None else [row.text2 for row in rows]
    options: dict[str, Any] = {"padding": False, "truncation": False}
    if cut is not None:
        options |= {"truncation": True, "max_length": min(cut, limit)}
    encoded = tokenizer(first, second, **options)
    for i, row in enumerate(rows):
        size = len(encoded["input_ids"][i])
        if size > limit:
            columns = " + ".join(repr(c) for c in (source.text, source.text2) if c is not None)
            raise UserError(
                f"{source.path}, line {row.line}, column {columns}: has {size} tokens; accepted are {limit}, and "
                f"--max-length {limit} cuts longer texts"
            )
    return [
        Example(
            {key: encoded[key][i] for key in encoded},
            task,
            None if targets is None else targets[i],
        )
        for i in range(len(rows))
    ]


class Collator:
    """Pads a batch to its longest row."""

    def __init__(self, tokenizer: Any, names: Sequence[str | None]) -> None:
        self.tokenizer, self.names = tokenizer, tuple(names)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """``input_ids`` and the like [B, S]; ``labels`` [B]; ``names``, a task a row."""
        batch = dict(self.tokenizer.pad([example.inputs for example in examples], return_tensors="pt"))
        if examples[0].target is not None:
            regression = isinstance(examples[0].target, float)
            kind = torch.float32 if regression else torch.int64
            batch["labels"] = torch.tensor([example.target for example in examples], dtype=kind)
        batch["names"] = tuple(self.names[example.task] for example in examples)
        return batch


class TaskBatches(Sampler[list[int]]):
    """Batches of row numbers, in an order that seed and epoch alone decide, so that a resumed run has the same.

    Rows that may share a batch are shuffled; each run of 50 batches is sorted by length and cut into batches; the
    batches of all groups are shuffled together.

    Args:
        lengths: tokens of each row.
        groups: of each row; rows of different groups share no batch.
        batch_size: rows a batch; the last one of a group may have fewer.
        seed: of the order.
        epoch: read at the start of a pass, once: ``lambda`` of whoever counts them.
    """

    def __init__(
        self, lengths: Sequence[int], groups: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, epoch
        self.drop_last = False
        self._rows: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            self._rows.setdefault(group, []).append(row)

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for rows in self._rows.values())

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.epoch())
        batches: list[list[int]] = []
        for rows in self._rows.values():
            order = [rows[i] for i in _shuffled(len(rows), generator)]
            window = _WINDOW * self.batch_size
            for start in range(0, len(order), window):
                run = sorted(order[start : start + window], key=lambda row: self.lengths[row])
                batches += [run[i : i + self.batch_size] for i in range(0, len(run), self.batch_size)]
        for i in _shuffled(len(batches), generator):
            yield batches[i]


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    order: Tensor = torch.randperm(count, generator=generator)
    return order.tolist()
