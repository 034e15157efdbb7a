"""What is learnt from the rows of a task: classes or a number, and the score that counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError
from fastadapt.training import metrics
from fastadapt.training.data import Row, Source

KINDS = ("classification", "regression")
METRICS = (*metrics.CLASSIFICATION, *metrics.REGRESSION)
_MANY = 20  # more numbers than this are a scale, not classes


@dataclass(frozen=True)
class Task:
    """A task, as it is kept beside a trained adaptation.

    Attributes:
        name: of the adaptation.
        kind: ``classification`` or ``regression``.
        labels: of the classes, in the order of the head's outputs; none of a regression.
        metric: which score decides about the best weights; higher is better for all.
        text, text2, label: columns, as in :class:`~fastadapt.training.data.Source`.
        encoding, format: of the training file, as there; they and the columns are what ``predict`` takes unless told.
        max_length: tokens at which texts are cut; None where longer ones are refused.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    metric: str
    text: str
    text2: str | None
    label: str | None
    encoding: str
    format: str | None
    max_length: int | None

    @property
    def width(self) -> int:
        """Outputs of its head."""
        return len(self.labels) if self.kind == "classification" else 1

    @property
    def classes(self) -> int | None:
        return len(self.labels) if self.kind == "classification" else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Task:
        return cls(**{**content, "labels": tuple(content["labels"])})


def number(text: str) -> float | None:
    """The finite number that ``text`` is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def detect(rows: Sequence[Row]) -> str:
    """A regression where all labels are numbers and one has a fraction, or there are more than 20 different ones."""
    values = [number(row.label) for row in rows]
    if any(value is None for value in values):
        return "classification"
    fraction = any(not value.is_integer() for value in values)
    return "regression" if fraction or len(set(values)) > _MANY else "classification"


def make_task(
    name: str, rows: Sequence[Row], source: Source, *, kind: str | None, metric: str | None, max_length: int | None
) -> Task:
    """The task of a training file's rows.

    Raises:
        UserError: naming file, line and column, for labels that are no numbers, or all the same.
    """
    kind = detect(rows) if kind is None else kind
    labels: tuple[str, ...] = ()
    different = {row.label for row in rows}
    if len(different) < 2:
        raise UserError(
            f"{source.path}, lines {rows[0].line} to {rows[-1].line}, column {source.label!r}: all labels are "
            f"{rows[0].label!r}; accepted are two different ones or more"
        )
    if kind == "classification":
        if len(different) > max(2, len(rows) // 2):
            raise UserError(
                f"{source.path}, column {source.label!r}: has {len(different)} different labels in {len(rows)} rows; "
                "accepted are classes that rows share (--label names the column, --task-type regression takes numbers)"
            )
        whole = all((value := number(label)) is not None and value.is_integer() for label in different)
        labels = tuple(sorted(different, key=lambda label: (float(label), label)) if whole else sorted(different))
    else:
        _check_numbers(rows, source)
    accepted = metrics.CLASSIFICATION if kind == "classification" else metrics.REGRESSION
    if metric is not None and metric not in accepted:
        raise UserError(f"--metric: got {metric!r}, but {name!r} is a {kind}; accepted are {', '.join(accepted)}")
    default = "accuracy" if kind == "classification" else "spearman"
    return Task(
        name=name,
        kind=kind,
        labels=labels,
        metric=metric or default,
        text=source.text,
        text2=source.text2,
        label=source.label,
        encoding=source.encoding,
        format=source.format,
        max_length=max_length,
    )


def targets(task: Task, rows: Sequence[Row], source: Source, train: Path) -> list[int] | list[float]:
    """A class's number or a score for each row; ``train`` is the file whose labels are known."""
    if task.kind == "regression":
        _check_numbers(rows, source)
        return [float(row.label) for row in rows]
    numbers = {label: i for i, label in enumerate(task.labels)}
    for row in rows:
        if row.label not in numbers:
            known = ", ".join(map(repr, task.labels[:10])) + (", ..." if len(task.labels) > 10 else "")
            raise UserError(
                f"{source.path}, line {row.line}, column {source.label!r}: got {row.label!r}, which is no label of "
                f"{train}; accepted are {known}"
            )
    return [numbers[row.label] for row in rows]


def _check_numbers(rows: Sequence[Row], source: Source) -> None:
    for row in rows:
        if number(row.label) is None:
            raise UserError(
                f"{source.path}, line {row.line}, column {source.label!r}: got {row.label!r}; accepted in a "
                "regression is a finite number"
            )
