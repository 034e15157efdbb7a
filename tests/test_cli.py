"""The command line: what it prints, and that what it refuses is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadapt import __version__
from fastadapt.bench import latency, report
from fastadapt.cli import main
from fastadapt.info import PROVEN
from tests.tasks import make_base


def refused(capsys, *argv: str) -> str:
    """The one line that ``argv`` is refused with."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_info_names_versions_and_every_backend(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert __version__ in text and torch.__version__.split("+")[0] in text
    for name in ("reference", "cpu", "triton", "cuda"):
        assert f"backend {name}" in text
    assert "float32 on AMX, in three bfloat16 parts: emulated tiles only" in text


def test_what_info_says_of_a_gpu_stands_in_the_notes():
    notes = (Path(__file__).parents[1] / "benchmarks" / "NOTES.md").read_text().split("## GPUs")[1]
    assert "one H100 80GB HBM3" in notes and "2026-11-28" in notes
    for name, tests in (
        ("reference", "267 of the"),
        ("triton", "426 of the Triton"),
        ("cuda", "404 tests of the CUDA"),
    ):
        assert tests in notes and "H100, 2026-11-28" in PROVEN[name]
        assert f"of {tests.split()[0]} tests failed" in PROVEN[name]


def test_explain_lists_the_sublayers(capsys):
    assert main(["explain", "bert-base", "--layers", "1", "--method", "pfeiffer"]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.0.output" in text and "bottleneck" in text


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["bench"],
        ["bench", "latency"],
        ["bench", "train"],
        ["bench", "merge"],
        ["bench", "methods"],
        ["bench", "op"],
        ["plot"],
        ["train"],
        ["predict"],
    ],
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "usage: fastadapt" in text
    if command not in ([], ["bench"]):
        assert "example" in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_help_of_tasks_says_that_a_row_has_one(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "latency", "--help"])
    assert "mixed in each batch (one a row, so no more than rows)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["bench", "latency", "--dtype", "fp8"], ["--dtype", "fp8", "fp32", "bf16"]),
        (["bench", "latency", "--batch", "0"], ["--batch", "'0'", "at least 1"]),
        (["bench", "latency", "--batch", "x"], ["--batch", "'x'"]),
        (["bench", "latency", "--budget", "-1"], ["--budget", "'-1'"]),
        (["bench", "latency", "--method", "nothing"], ["--method", "nothing", "houlsby"]),
        (["bench", "latency", "--targets", "query,gate"], ["--targets", "query,gate", "attention_output"]),
        (["bench", "latency", "--rank", "0"], ["--rank", "'0'", "at least 1"]),
        (["bench", "train", "--lora-dropout", "2"], ["--lora-dropout", "'2'", "from 0 to 1"]),
        (["bench", "merge", "--peers", "adapterhub"], ["--peers", "adapterhub", "peft"]),
        (["bench", "latency", "--peers", "nobody"], ["--peers", "nobody", "adapterhub"]),
        (["bench", "train", "--peers", "openvino"], ["--peers", "openvino", "adapterhub"]),
        (["bench", "latency", "--peers", "--model", "/nowhere"], ["--model", "/nowhere"]),
        (["bench", "latency", "--plot", "picture.gif"], ["--plot", ".gif", ".png"]),
        (["bench", "op", "--json", "/dev/null/x.json"], ["--json", "/dev/null"]),
        (["bench", "latency", "--layers", "1", "--peers", "--seq", "513", "--model", "tests"], ["--model", "tests"]),
        (["plot", "/nowhere.json"], ["/nowhere.json", "cannot be read"]),
        (["explain", "/nowhere"], ["error: MODEL: '/nowhere'"]),
        (["explain", "."], ["error: MODEL: cannot load '.'"]),
        (["teach"], ["invalid choice", "teach"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, parts):
    line = refused(capsys, *argv)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("argv", "name"),
    [(["explain", "no/such-model"], "MODEL"), (["bench", "latency", "--model", "no/such-model", "--peers"], "--model")],
    ids=["explain", "bench"],
)
def test_a_hub_that_is_not_there_is_one_line(argv, name):
    # In a process of its own: the hub's address is read, and the stream of its log chosen, when it is imported.
    code = f"import sys, time; time.sleep = lambda s: None; from fastadapt.cli import main; sys.exit(main({argv!r}))"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **nowhere})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"fastadapt: error: {name}: cannot load 'no/such-model'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused(capsys):
    assert "--device" in refused(capsys, "bench", "latency", "--device", "cuda")


@pytest.mark.parametrize(
    "text", ["not json", "[]", "{}", '{"records": []}', '{"records": [{"bench": "latency"}]}'], ids=str
)
def test_plot_refuses_what_is_no_result(tmp_path, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert str(path) in refused(capsys, "plot", str(path))


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("FASTADAPT_DEBUG", "1")
    with pytest.raises(Exception, match="cannot be read"):
        main(["plot", "/nowhere.json"])


def test_latency_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "deep" / "out.json", tmp_path / "out.png"
    argv = ["bench", "latency", "--layers", "1", "--batch", "1", "2", "--seq", "8", "--dtype", "fp32", "--budget", "0"]
    assert main([*argv, "--peers", "--threads", "1", "--json", str(path), "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "take turns" in shown.err
    assert max(map(len, shown.out.splitlines()[:-3])) <= 100
    document = json.loads(path.read_text())
    records = document["records"]
    assert [(r["system"], r["batch"]) for r in records] == [(s, b) for b in (1, 2) for s in latency.ALWAYS]
    for row in records:
        assert list(row)[: len(report.FIELDS)] == list(report.FIELDS)
        assert row["correct"] and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["ratio_to_bare"] > 0 and row["peak_bytes"] > 0
        assert len(row["samples_ms"]) >= 5
    assert records[0]["ratio_to_bare"] == 1.0
    assert {"device", "threads", "versions", "commit", "date"} <= set(document["environment"])
    assert document["environment"]["threads"] == 1
    assert document["command"].startswith("fastadapt bench latency --layers 1 --batch 1 2 ")
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.svg"
    assert main(["plot", str(path), "--out", str(again)]) == 0
    assert "<svg" in again.read_text()


@pytest.fixture
def small(monkeypatch):
    """bert-base of another size, and turns as short as they get."""
    from fastadapt.bench import case, measure

    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    monkeypatch.setitem(case.RANDOM_MODELS, "bert-base", shape)
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)


SMALL = ("--layers", "2", "--batch", "1", "--seq", "8", "--dtype", "fp32", "--budget", "0", "--threads", "1")


def test_merge_end_to_end(tmp_path, capsys, small):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["bench", "merge", *SMALL, "--rank", "2", "--targets", "all", "query,value", "--cycles", "2", "--peers"]
    assert main([*argv, "--json", str(path), "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines()[:-3])) <= 100
    records = json.loads(path.read_text())["records"]
    for row in records:
        assert list(row)[: len(report.FIELDS)] == list(report.FIELDS)
        assert row["bench"] == "merge" and row["correct"] in (True, None)
    phases = {phase: [r for r in records if r["phase"] == phase] for phase in ("forward", "merge", "drift")}
    forwards = ["stock", "bare", "fastadapt", "fastadapt-merged", "fastadapt-swapped"]
    assert [r["system"] for r in phases["forward"]] == forwards * 2
    assert [r["step"] for r in phases["merge"]] == ["copy", "merge", "swap", "unmerge"] * 2
    assert {r["layers"] for r in phases["merge"]} == {3}  # as many as the model has
    assert {r["matrices"] for r in phases["merge"]} == {18, 6}
    assert [(r["cycles"], r["bits_changed"]) for r in phases["drift"]] == [(2, 0)]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ranks_are_cells_and_merged_forms_join(tmp_path, capsys, small):
    path = tmp_path / "out.json"
    argv = ["bench", "latency", *SMALL, "--method", "lora", "--rank", "2", "4", "--targets", "output,key", "--peers"]
    assert main([*argv, "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    systems = ["stock", "bare", "fastadapt", "fastadapt-merged"]
    assert [(r["rank_or_bottleneck"], r["system"]) for r in records] == [(n, s) for n in (2, 4) for s in systems]
    assert all(r["targets"] == ["key", "output"] and r["correct"] for r in records)
    assert "÷ merged" in capsys.readouterr().out


QUICK = ("--batch", "1", "--seq", "8", "--dtype", "fp32", "--budget", "0", "--threads", "1")


@pytest.mark.parametrize(
    ("command", "layers"),
    [
        (("train", "--method", "lora", "--rank", "2", "--peers"), {2}),
        (("train", "--method", "adapterdrop", "--drop", "1", "--bottleneck", "4", "--peers"), {2}),
        (("methods", "--methods", "adapterdrop"), {2}),
        (("merge", "--rank", "2", "--cycles", "1", "--peers"), {2, 1}),  # the drift is of one layer
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_a_folder_of_two_layers_is_measured_as_it_is(tmp_path, command, layers, small):
    folder, path = make_base(tmp_path / "tiny", taught=False), tmp_path / "out.json"
    assert main(["bench", *command, *QUICK, "--model", str(folder), "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert {r["layers"] or 2 for r in records} == layers
    assert all(r["correct"] is not False for r in records)
    kept = [r["saved_bytes_per_layer"] for r in records if "saved_bytes_per_layer" in r]
    assert (command[0] == "merge") == (not kept) and all(kept)


def test_methods_end_to_end(tmp_path, capsys, small):
    path = tmp_path / "out.json"
    argv = ["bench", "methods", *SMALL, "--methods", "pfeiffer", "bitfit"]
    assert main([*argv, "--json", str(path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table[:-2])) <= 100
    assert any("bitfit: every bias" in line for line in table)
    records = json.loads(path.read_text())["records"]
    assert {(r["method"], r["job"]) for r in records} == {
        (method, job) for method in ("pfeiffer", "bitfit") for job in ("inference", "training", "switch")
    }
    step = next(r for r in records if r["job"] == "training" and r["system"] == "fastadapt")
    total = [sum(each) for each in zip(*step["steps_ms"].values(), strict=True)]
    assert list(step["steps_ms"]) == ["forward", "backward", "update"]
    assert total == pytest.approx(step["samples_ms"], abs=1e-3)


@pytest.mark.parametrize(("layers", "dropped"), [(None, 5), (12, 5), (4, 1), (2, 0)])
def test_methods_drop_no_more_layers_than_a_model_has(layers, dropped):
    from fastadapt.bench.case import Case
    from fastadapt.bench.compare import jobs

    (job,) = jobs(["adapterdrop"], Case(layers=layers), [1], ["fp32"], 1.0)
    assert job.args[0].drop == dropped


def test_a_wrong_system_is_printed_as_wrong_and_never_timed(tmp_path, capsys, monkeypatch):
    from fastadapt.bench.peers import Inference, fused

    honest = fused.adapted

    def wrong(setup):
        system = honest(setup)

        def call():
            output = system.call().clone()
            output[0, 0] *= 1.01  # one token, one per cent
            return output

        return Inference(call, system.hidden)

    monkeypatch.setattr(fused, "adapted", wrong)
    path = tmp_path / "out.json"
    argv = ["bench", "latency", "--layers", "1", "--batch", "2", "--seq", "8", "--dtype", "fp32", "--budget", "0"]
    assert main([*argv, "--peers", "--threads", "1", "--json", str(path)]) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.out.splitlines() if "houlsby" in line]
    assert "WRONG" in line
    row = next(r for r in json.loads(path.read_text())["records"] if r["system"] == "fastadapt")
    assert row["correct"] is False
    assert row["p50_ms"] is None and row["ratio_to_bare"] is None and row["samples_ms"] is None
