"""The four tasks of the table, from their publishers' files, as ``fastadapt train`` reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastadapt.errors import UserError
from fastadapt.training.data import Source
from fastadapt.training.options import Files


@dataclass(frozen=True)
class Dataset:
    """One task.

    Attributes:
        train, dev: files below ``--data``. Rows of ``dev`` choose the best epoch and, of CoLA and TREC, the learning
            rates, and give the table's score.
        fields: a line of them -> its label and texts.
        header: whether their first line is one.
        metric: the score that decides.
        rows: of the training file that the table takes; None is all.
        encoding: of the files.
    """

    train: str
    dev: str
    fields: Callable[[str], list[str]]
    header: bool
    metric: str
    rows: int | None = None
    encoding: str = "utf-8"


def _columns(*numbers: int) -> Callable[[str], list[str]]:
    def fields(line: str) -> list[str]:
        cells = line.split("\t")
        return [cells[i] for i in numbers]

    return fields


def _coarse(line: str) -> list[str]:
    kind, _, question = line.partition(" ")
    return [kind.partition(":")[0], question]


DATASETS: dict[str, Dataset] = {
    "cola": Dataset("CoLA/train.tsv", "CoLA/dev.tsv", _columns(1, 3), False, "matthews"),
    "sst2": Dataset("SST-2/train.tsv", "SST-2/dev.tsv", _columns(1, 0), True, "accuracy", rows=10_000),  # of 67,349
    "stsb": Dataset("STS-B/train.tsv", "STS-B/dev.tsv", _columns(9, 7, 8), True, "spearman"),
    "trec": Dataset("TREC/TREC.train", "TREC/TREC.test", _coarse, False, "accuracy", encoding="latin-1"),
}


def files(name: str, folder: Path, out: Path) -> Files:
    """Task ``name``, its rows written into ``out`` as label, text and, of pairs, second text.

    Raises:
        UserError: for a file that is missing or has other columns.
    """
    dataset = DATASETS[name]
    sides = []
    for side, path in (("train", folder / dataset.train), ("dev", folder / dataset.dev)):
        try:
            lines = path.read_text(encoding=dataset.encoding).rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data: {path} cannot be read ({error})") from error
        start = 1 if dataset.header else 0
        rows = []
        for number, line in enumerate(lines[start:], start=start + 1):
            try:
                rows.append([cell.strip() for cell in dataset.fields(line)])
            except IndexError:
                raise UserError(f"{path}, line {number}: has {line.count(chr(9)) + 1} columns, too few") from None
        target = out / f"{name}.{side}.tsv"
        out.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")  # another process may be reading the file
        part.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(part, target)
        sides.append(Source(target, "2", "3" if len(rows[0]) == 3 else None, "1"))
    return Files(name, *sides, "regression" if dataset.metric == "spearman" else "classification", dataset.metric)
