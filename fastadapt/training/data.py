"""Rows of TSV, CSV and JSONL files. What is wrong with one is told with its file, line and column."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError

FORMATS = ("tsv", "csv", "jsonl")
TEXT_DEFAULTS, LABEL_DEFAULT = ("text", "sentence"), "label"
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Source:
    """A file and how it is to be read.

    Attributes:
        path: of the file.
        text, text2, label: columns: names, or numbers counted from 1 in a file without a header. A ``text`` or
            ``label`` of None is found by its usual name; a ``text2`` of None is none.
        encoding: of the characters; any that has ASCII in it. Of rows to predict, None is the training file's.
        format: one of :data:`FORMATS`; None is told by the file's suffix, and TSV where that says nothing.
        task: another column, which names the task that a row is for; None is none.
    """

    path: Path
    text: str | None = None
    text2: str | None = None
    label: str | None = None
    encoding: str | None = "utf-8"
    format: str | None = None
    task: str | None = None

    @property
    def columns(self) -> dict[str, str | None]:
        """Option -> its column."""
        return {"--text": self.text, "--text2": self.text2, "--label": self.label, "--task-column": self.task}

    def kind(self) -> str:
        return self.format or _SUFFIXES.get(self.path.suffix.lower(), "tsv")


@dataclass(frozen=True)
class Row:
    """One row. ``line`` counts from 1; of a CSV row with line breaks it is the last one's."""

    line: int
    text: str
    text2: str | None
    label: str | None
    task: str | None = None


def read(source: Source, *, labelled: bool) -> tuple[list[Row], Source]:
    """(all rows, the source with the columns that were found).

    Raises:
        UserError: naming file, line and column, for what cannot be read.
    """
    records = _records(source)
    try:
        first_line, first = next(records)
    except StopIteration:
        raise UserError(f"{source.path}: is empty; accepted is a file with rows") from None
    named = isinstance(first, dict)  # JSONL
    if named:
        source = _with_columns(source, list(first), labelled, first_line)
        rows = [(first_line, first), *records]
    elif _numbered(source):
        source = _with_numbers(source, labelled)
        rows = [(first_line, _by_number(first)), *((line, _by_number(fields)) for line, fields in records)]
    else:
        source = _with_columns(source, first, labelled, first_line)
        doubled = next((n for n in first if first.count(n) > 1 and n in source.columns.values()), None)
        if doubled is not None:
            raise UserError(f"{source.path}, line {first_line}: has two columns {doubled!r}; accepted is one")
        rows = []
        for line, fields in records:
            if len(fields) != len(first):
                raise UserError(
                    f"{source.path}, line {line}: has {len(fields)} fields; accepted are {len(first)}, as in line "
                    f"{first_line}"
                )
            rows.append((line, dict(zip(first, fields, strict=True))))
    if not rows:
        raise UserError(f"{source.path}: has a header and no rows; accepted is a file with rows")
    return [_row(source, line, record, labelled) for line, record in rows], source


def _numbered(source: Source) -> bool:
    given = [c for c in source.columns.values() if c is not None]
    return bool(given) and all(c.isdecimal() for c in given)


def _with_numbers(source: Source, labelled: bool) -> Source:
    for option, column in source.columns.items():
        if column == "0":
            raise UserError(f"{option}: got 0; accepted are columns counted from 1, or names")
        if column is None and (option == "--text" or (option == "--label" and labelled)):
            raise UserError(f"{option}: got none beside columns given as numbers; accepted is a number too")
    return source


def _with_columns(source: Source, header: Sequence[str], labelled: bool, line: int) -> Source:
    """``source`` with every column's name, each of which ``header`` has."""
    text = source.text or next((name for name in TEXT_DEFAULTS if name in header), TEXT_DEFAULTS[0])
    label = (source.label or LABEL_DEFAULT) if labelled else source.label
    found = replace(source, text=text, label=label)
    for option, column in found.columns.items():
        if option == "--label" and not labelled:
            continue
        if column is not None and column not in header:
            known = ", ".join(map(repr, header))
            raise UserError(f"{source.path}, line {line}: has no column {column!r} ({option}); it has {known}")
    return found


def _by_number(fields: Sequence[str]) -> dict[str, str]:
    return {str(i): field for i, field in enumerate(fields, start=1)}


def _row(source: Source, line: int, record: dict[str, Any], labelled: bool) -> Row:
    def field(column: str) -> Any:
        if column not in record:
            what = f"{len(record)} fields" if _numbered(source) else "none of this name"
            raise UserError(f"{source.path}, line {line}, column {column}: is missing; the line has {what}")
        return record[column]

    def words(column: str) -> str:
        value = field(column)
        if not isinstance(value, str):
            raise UserError(f"{source.path}, line {line}, column {column!r}: got {value!r}; accepted is a text")
        if not value.strip():
            raise UserError(f"{source.path}, line {line}, column {column!r}: is empty; accepted is a text")
        return value

    label = None
    if labelled:
        value = field(source.label)
        if value is None or isinstance(value, (list, dict)) or not str(value).strip():
            raise UserError(f"{source.path}, line {line}, column {source.label!r}: got {value!r}; accepted is a label")
        label = str(value).strip() if not isinstance(value, bool) else str(value).lower()
    text2, task = (None if column is None else words(column) for column in (source.text2, source.task))
    return Row(line, words(source.text), text2, label, task)


# -- formats -----------------------------------------------------------------------------------------------------


def _records(source: Source) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    """(line, fields) of every row, the header's too; JSONL gives mappings."""
    lines = _lines(source)
    kind = source.kind()
    if kind == "jsonl":
        return _json_records(source, lines)
    if kind == "csv":
        return _csv_records(source, lines)
    return ((number, line.split("\t")) for number, line in enumerate(lines, start=1))


def _lines(source: Source) -> list[str]:
    """The file's lines without their ends; split at line feeds alone, because texts have other separators inside."""
    path = source.path
    try:
        codecs.lookup(source.encoding)
    except LookupError:
        raise UserError(f"--encoding: got {source.encoding!r}, which Python does not know; utf-8 is one") from None
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; accepted is a file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for mark, name in _MARKS.items():
        if content.startswith(mark) and not content.startswith(codecs.BOM_UTF32_LE):
            raise UserError(
                f"{path}, line 1: is {name}; accepted is a file in utf-8, or an --encoding with ASCII in it"
            )
    content = content.removeprefix(codecs.BOM_UTF8)
    lines: list[str] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            lines.append(raw.removesuffix(b"\r").decode(source.encoding))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: byte {error.start + 1} ({raw[error.start]:#04x}) is not {source.encoding}; "
                "--encoding names another, such as latin-1"
            ) from None
        except (UnicodeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: cannot be read as {source.encoding} ({error})") from None
        if "\0" in lines[-1]:
            raise UserError(f"{path}, line {number}: has a zero byte; accepted is a text file")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip() and source.kind() != "csv":
            raise UserError(f"{path}, line {number}: is blank; accepted are rows up to the end of the file")
    return lines


def _csv_records(source: Source, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{source.path}, line {reader.line_num}: is not CSV ({error})") from None


def _json_records(source: Source, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{source.path}, line {number}: is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{source.path}, line {number}: got {type(record).__name__}; accepted is a JSON object")
        yield number, record
