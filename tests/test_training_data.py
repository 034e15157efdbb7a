"""Files that are read, and everything that may be wrong with one: told with file, line and column, before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import tasks

from fastadapt.cli import main
from fastadapt.errors import UserError
from fastadapt.training import data
from fastadapt.training.batches import TaskBatches
from fastadapt.training.data import Row, Source
from fastadapt.training.task import detect, make_task


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path, *columns: str | None, **options) -> list[Row]:
    return data.read(Source(path, *columns, **options), labelled=True)[0]


def test_tsv_keeps_quotes_and_separators_inside(tmp_path):
    path = put(tmp_path, "a.tsv", 'sentence\tlabel\r\n"Wow, said " he\u2028then\t1\r\nit\'s "\t0\r\n')
    assert rows(path) == [Row(2, '"Wow, said " he\u2028then', None, "1"), Row(3, "it's \"", None, "0")]


def test_columns_by_number_are_of_a_file_without_a_header(tmp_path):
    path = put(tmp_path, "a.tsv", "gj04\t1\t\tThe sailors\nbc01\t0\t*\tThe weights\n")
    assert rows(path, "4", None, "2") == [Row(1, "The sailors", None, "1"), Row(2, "The weights", None, "0")]


def test_csv_has_quotes_and_line_breaks(tmp_path):
    path = put(tmp_path, "a.csv", 'text,label\n"one, ""two""\nthree",x\nfour,y\n')
    assert rows(path) == [Row(3, 'one, "two"\nthree', None, "x"), Row(4, "four", None, "y")]


def test_jsonl(tmp_path):
    path = put(tmp_path, "a.jsonl", '{"a": "x", "b": "y", "n": 1.5}\n{"a": "z", "b": "w", "n": true}\n')
    assert rows(path, "a", "b", "n") == [Row(1, "x", "y", "1.5"), Row(2, "z", "w", "true")]


def test_other_encodings_and_marks(tmp_path):
    path = put(tmp_path, "a.tsv", "text\tlabel\ncafé\t1\n".encode("latin-1"))
    assert rows(path, encoding="latin-1")[0].text == "café"
    assert rows(put(tmp_path, "b.tsv", b"\xef\xbb\xbftext\tlabel\nx\t1\n"))[0].text == "x"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.tsv", "", ["a.tsv", "is empty"]),
        ("a.tsv", "\n\n", ["a.tsv", "is empty"]),
        ("a.tsv", "sentence\tlabel\n", ["a.tsv", "a header and no rows"]),
        ("a.tsv", "words\tlabel\nx\t1\n", ["a.tsv, line 1", "no column 'text'", "'words', 'label'"]),
        ("a.tsv", "text\tclass\nx\t1\n", ["a.tsv, line 1", "no column 'label'", "'text', 'class'"]),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", ["a.tsv, line 3", "1 fields", "accepted are 2"]),
        ("a.tsv", "text\tlabel\nx\t1\n\ny\t0\n", ["a.tsv, line 3", "is blank"]),
        ("a.tsv", "text\tlabel\nx\t1\n \t0\n", ["a.tsv, line 3, column 'text'", "is empty"]),
        ("a.tsv", "text\tlabel\nx\t \n", ["a.tsv, line 2, column 'label'", "accepted is a label"]),
        ("a.tsv", "text\ttext\tlabel\nx\ty\t1\n", ["a.tsv, line 1", "two columns 'text'"]),
        ("a.tsv", b"text\tlabel\nx\t1\ncaf\xe9\t1\n", ["a.tsv, line 3", "byte 4", "0xe9", "--encoding"]),
        ("a.tsv", "text\tlabel\n".encode("utf-16"), ["a.tsv, line 1", "utf-16"]),
        ("a.tsv", b"text\tlabel\nx\0\t1\n", ["a.tsv, line 2", "zero byte"]),
        ("a.csv", 'text,label\n"x,1\n', ["a.csv, line", "is not CSV"]),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', ["a.jsonl, line 2", "is not JSON"]),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', ["a.jsonl, line 2", "got list"]),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', ["a.jsonl, line 2, column label", "is missing"]),
        ("a.jsonl", '{"text": 7, "label": 1}\n', ["a.jsonl, line 1, column 'text'", "got 7"]),
        ("a.jsonl", '{"text": "x", "label": null}\n', ["a.jsonl, line 1, column 'label'", "None"]),
    ],
)
def test_bad_files_are_told_with_their_line(tmp_path, name, content, parts):
    with pytest.raises(UserError) as error:
        rows(put(tmp_path, name, content))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_bad_sources(tmp_path):
    path = put(tmp_path, "a.tsv", "x\t1\ny\n")
    for source, part in (
        (Source(tmp_path / "none.tsv"), "cannot be read"),
        (Source(tmp_path), "is a folder"),
        (Source(path, encoding="klingon"), "klingon"),
        (Source(path, "1", None, "2"), "line 2, column 2: is missing"),
        (Source(path, "0", None, "2"), "counted from 1"),
        (Source(path, "1"), "--label"),
    ):
        with pytest.raises(UserError, match=part):
            data.read(source, labelled=True)


def labelled(*labels: str) -> list[Row]:
    return [Row(i, "x", None, label) for i, label in enumerate(labels, start=1)]


def test_what_a_task_is_shows_in_its_labels():
    assert detect(labelled("0", "1", "2")) == "classification"
    assert detect(labelled("0", "1.5")) == "regression"
    assert detect(labelled("1.0", "2.0")) == "classification"
    assert detect(labelled("nan", "0.5")) == "classification"
    assert detect(labelled(*map(str, range(30)))) == "regression"
    source = Source(Path("a.tsv"), "text", None, "label")
    options = {"kind": None, "metric": None, "max_length": None}
    assert make_task("t", labelled("10", "9", "10", "9"), source, **options).labels == ("9", "10")
    assert make_task("t", labelled("b", "a", "b", "a"), source, **options).labels == ("a", "b")
    with pytest.raises(UserError, match="all labels are '1'"):
        make_task("t", labelled("1", "1"), source, **options)
    with pytest.raises(UserError, match="different labels in 6 rows"):
        make_task("t", labelled(*"abcdef"), source, **options)
    with pytest.raises(UserError, match=r"line 2, column 'label': got 'x'"):
        make_task("t", labelled("1", "x"), source, **{**options, "kind": "regression"})
    with pytest.raises(UserError, match="--metric: got 'spearman'"):
        make_task("t", labelled("1", "2", "1"), source, **{**options, "metric": "spearman"})


def test_batches_have_every_row_once_and_the_order_of_seed_and_epoch():
    lengths, groups = [i % 7 + 3 for i in range(50)], [i % 2 for i in range(50)]
    epoch = 0
    batches = TaskBatches(lengths, groups, 8, seed=1, epoch=lambda: epoch)
    first = list(batches)
    assert sorted(row for batch in first for row in batch) == list(range(50)) and len(first) == len(batches) == 8
    assert all(len({groups[row] for row in batch}) == 1 for batch in first)
    assert list(batches) == first
    epoch = 1
    assert list(batches) != first
    assert list(TaskBatches(lengths, groups, 8, seed=2, epoch=lambda: 0)) != first
    spread = [max(lengths[r] for r in batch) - min(lengths[r] for r in batch) for batch in first]
    assert sum(spread) / len(spread) < 4  # rows of like length are together; of random ones it is nearly 6


# -- the command: one line, and nothing is trained -----------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("room")
    tasks.make_base(where / "bert", taught=False)
    tasks.write_mood(where, "mood", 24, 0)
    put(where, "unseen.tsv", "sentence\tlabel\nfilm is fine\t1\nso dull\t2\n")
    put(where, "long.tsv", "sentence\tlabel\nso dull\t0\n" + "film " * 60 + "\t1\n")
    put(where, "latin.tsv", b"sentence\tlabel\nso caf\xe9\t0\nfilm\t1\n")
    put(where, "one.tsv", "sentence\tlabel\nso dull\t1\nfilm\t1\n")
    return where


def argv(room: Path, **options: str) -> list[str]:
    given = {"model": room / "bert", "train": room / "mood.tsv", "dev": room / "mood.tsv", "output": room / "out"}
    given |= {"device": "cpu", "epochs": "1", "seeds": "0"} | options
    return ["train", *(text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"dev": "unseen.tsv"}, ["unseen.tsv, line 3, column 'label'", "'2'", "mood.tsv", "'0', '1'"]),
        ({"train": "long.tsv"}, ["long.tsv, line 3, column 'sentence'", "62 tokens", "40", "--max-length 40"]),
        ({"dev": "long.tsv"}, ["long.tsv, line 3", "62 tokens"]),
        ({"train": "latin.tsv"}, ["latin.tsv, line 2", "byte 7", "--encoding"]),
        ({"train": "one.tsv"}, ["one.tsv, lines 2 to 3", "all labels are '1'"]),
        ({"train": "none.tsv"}, ["none.tsv", "cannot be read"]),
        ({"text": "words"}, ["mood.tsv, line 1", "no column 'words' (--text)", "'sentence', 'label'"]),
        ({"text2": "other"}, ["no column 'other' (--text2)"]),
        ({"label": "4", "text": "3"}, ["mood.tsv, line 1, column", "is missing"]),
        ({"metric": "bleu"}, ["--metric", "bleu", "matthews"]),
        ({"task_type": "ranking"}, ["--task-type", "ranking", "regression"]),
        ({"format": "xml"}, ["--format", "xml", "jsonl"]),
        ({"model": "/nowhere"}, ["--model", "/nowhere"]),
        ({"method": "fusion"}, ["--method fusion", "one task", "--adapters"]),
        ({"adapters": "somewhere"}, ["--adapters", "houlsby", "fusion"]),
        ({"set": "width=3"}, ["--method houlsby", "width"]),
        ({"bottleneck": "0"}, ["--bottleneck", "'0'"]),
        ({"lr": "0"}, ["--lr", "'0'", "above 0"]),
        ({"seeds": "-1"}, ["--seeds"]),
        ({"name": "a.b"}, ["--name", "'a.b'"]),
        ({"task": "x=y"}, ["--train, --task"]),
        ({"output": "mood.tsv"}, ["--output", "is a file"]),
    ],
)
def test_bad_requests_are_one_line_and_train_nothing(room, monkeypatch, capsys, options, parts):
    monkeypatch.chdir(room)
    try:
        code = main(argv(room, **options))
    except SystemExit as left:
        code = left.code
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("[")]
    assert code == 2 and len(lines) == 1, lines
    assert all(part in lines[0] for part in parts), lines[0]
    assert not (room / "out").exists()


def test_a_missing_package_is_told_before_training(room, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    assert main([*argv(room), "--tensorboard"]) == 2
    line = capsys.readouterr().err.strip()
    assert "--tensorboard: needs tensorboard: pip install tensorboard" in line and not (room / "out").exists()


def test_tasks_and_their_settings_are_told_apart(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    base = ["train", "--model", "bert", "--output", "out", "--task", "a=mood.tsv", "--task", "b=mood.tsv"]
    for more, parts in (
        (["--dev", "a=mood.tsv"], ["--dev", "'b'", "b=FILE"]),
        (["--dev", "a=mood.tsv", "--dev", "a=mood.tsv", "--dev", "b=mood.tsv"], ["--dev", "two for the task 'a'"]),
        (["--dev", "mood.tsv", "--dev", "other.tsv"], ["--dev", "'mood.tsv' and 'other.tsv'"]),
        (["--dev", "mood.tsv", "--text", "b=words"], ["no column 'words'"]),
        (["--dev", "mood.tsv", "--method", "full"], ["--method full", "several tasks"]),
        (["--dev", "mood.tsv", "--task", "a=mood.tsv"], ["--task", "'a' twice"]),
        (["--dev", "mood.tsv", "--task", "nothing"], ["--task", "NAME=FILE"]),
    ):
        assert main([*base, *more]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in line for part in parts), line


def test_bad_predictions_are_one_line(room, tmp_path, capsys):
    folder = put(tmp_path, "task.json", '{"task": 1}').parent
    for more, parts in (
        (["--adapters", str(room)], ["--adapters", "task.json"]),
        (["--adapters", str(folder)], ["--adapters", "not what"]),
        (["--adapters", str(folder), "--output", "labels.xml"], ["--output", ".tsv, .jsonl"]),
        (["--adapters", str(folder), "--output", "/nowhere/at/all.tsv"], ["--output", "is no folder"]),
    ):
        assert main(["predict", "--input", str(room / "mood.tsv"), *more]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in line for part in parts), line
