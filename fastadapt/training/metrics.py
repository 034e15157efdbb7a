"""Scores of predictions, from their definitions, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman")


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """float64 [classes, classes]: how many rows of label i were predicted as j."""
    flat = labels.long() * classes + predicted.long()
    return torch.bincount(flat, minlength=classes * classes).reshape(classes, classes).double()


def accuracy(table: Tensor) -> float:
    """Share of rows that are right."""
    return float(table.trace() / table.sum())


def f1(table: Tensor) -> float:
    """2TP / (2TP + FP + FN): of the second class where there are two, else the mean over classes; 0 for 0 / 0."""
    hit = table.diagonal()
    total = table.sum(0) + table.sum(1)
    each = torch.where(total > 0, 2 * hit / total.clamp(min=1), torch.zeros_like(hit))
    return float(each[1] if len(each) == 2 else each.mean())


def matthews(table: Tensor) -> float:
    """Matthews' correlation, for any number of classes (Gorodkin 2004, eq. 8); 0 where one side is constant."""
    n, hit = table.sum(), table.trace()
    true, predicted = table.sum(1), table.sum(0)
    scale = torch.sqrt((n * n - (predicted * predicted).sum()) * (n * n - (true * true).sum()))
    return 0.0 if scale == 0 else float((hit * n - (true * predicted).sum()) / scale)


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of values; 0 where one side is constant."""
    x, y = predicted.double() - predicted.double().mean(), labels.double() - labels.double().mean()
    scale = torch.sqrt((x * x).sum() * (y * y).sum())
    return 0.0 if scale == 0 else float((x * y).sum() / scale)


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def scores(logits: Tensor, labels: Tensor, *, classes: int | None) -> dict[str, float]:
    """Every metric of a task.

    Args:
        logits: [N, classes], or [N, 1] of a regression.
        labels: [N], int64 or float.
        classes: None for a regression.
    """
    if classes is None:
        predicted = logits.reshape(-1).float()
        return {"pearson": pearson(predicted, labels), "spearman": spearman(predicted, labels)}
    table = confusion(logits.argmax(-1), labels, classes)
    by_name: dict[str, Callable[[Tensor], float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
    return {name: metric(table) for name, metric in by_name.items()}
