"""Scores against their definitions, written out row by row."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastadapt.training import metrics


def rows(classes: int, count: int = 60, seed: int = 0) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    labels = [rng.randrange(classes) for _ in range(count)]
    return [label if rng.random() < 0.6 else rng.randrange(classes) for label in labels], labels


def scored(predicted: list[int], labels: list[int], classes: int) -> dict[str, float]:
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    return metrics.scores(logits, torch.tensor(labels), classes=classes)


def test_two_classes():
    predicted, labels = rows(2)
    pairs = list(zip(predicted, labels, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    found = scored(predicted, labels, 2)
    assert found["accuracy"] == pytest.approx((tp + tn) / len(pairs))
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(matthews)


def test_several_classes():
    predicted, labels = rows(4, seed=3)
    each = []
    for c in range(4):
        tp = sum(p == c == t for p, t in zip(predicted, labels, strict=True))
        each.append(2 * tp / (predicted.count(c) + labels.count(c)))
    found = scored(predicted, labels, 4)
    assert found["f1"] == pytest.approx(sum(each) / 4)
    # Matthews' is Pearson's correlation of the one-hot matrices, summed over classes.
    p, t = (torch.nn.functional.one_hot(torch.tensor(x), 4).double() for x in (predicted, labels))
    p, t = p - p.mean(0), t - t.mean(0)
    assert found["matthews"] == pytest.approx(float((p * t).sum() / torch.sqrt((p * p).sum() * (t * t).sum())))


def test_one_predicted_class_has_no_correlation():
    found = scored([1, 1, 1, 1], [0, 1, 1, 1], 2)
    assert found == {"accuracy": 0.75, "f1": pytest.approx(6 / 7), "matthews": 0.0}


def test_correlations_and_ties():
    x, y = [1.0, 2.0, 2.0, 4.0, 10.0], [3.0, 1.0, 4.0, 4.0, 9.0]

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]

    def correlation(a: list[float], b: list[float]) -> float:
        u, v = ([e - sum(s) / len(s) for e in s] for s in (a, b))
        return sum(p * q for p, q in zip(u, v, strict=True)) / math.sqrt(sum(p * p for p in u) * sum(q * q for q in v))

    found = metrics.scores(torch.tensor(x).unsqueeze(1), torch.tensor(y), classes=None)
    assert found["pearson"] == pytest.approx(correlation(x, y))
    assert found["spearman"] == pytest.approx(correlation(ranks(x), ranks(y)))
    assert metrics.spearman(torch.ones(5), torch.tensor(y)) == 0.0
