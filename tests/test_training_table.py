"""The training table's command on small files in the publishers' formats, and its figures by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tasks

from benchmarks.training import cells as cells_module
from benchmarks.training import figures
from benchmarks.training.__main__ import main
from benchmarks.training.data import files
from benchmarks.training.variants import FIXED, FULL, SIZED, VARIANTS, read_rates
from fastadapt.errors import UserError
from fastadapt.training import data as reader

NAMES = ("full", "houlsby-8", "masked")


def sentence(rng: random.Random, good: bool) -> str:
    words = [rng.choice(tasks.FILL) for _ in range(rng.randint(3, 7))]
    return " ".join([*words, rng.choice(tasks.GOOD if good else tasks.BAD)])


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A tiny model, and a few rows of each task as its publisher writes them."""
    where = tmp_path_factory.mktemp("room")
    tasks.make_base(where / "bert")
    rng = random.Random(0)
    for side, count in (("train", 40), ("dev", 16)):
        lines: dict[str, list[str]] = {"CoLA": [], "SST-2": ["sentence\tlabel"], "TREC": [],
                                       "STS-B": ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
                                                 "sentence1\tsentence2\tscore"]}  # fmt: skip
        for i in range(count):
            text, label = sentence(rng, i % 2 == 0), i % 2
            lines["CoLA"].append(f"gj04\t{label}\t{'*' if label else ''}\t{text}")
            lines["SST-2"].append(f"{text} \t{label}")
            lines["STS-B"].append(f"{i}\tmain\tMSR\t2012\t{i}\tnone\tnone\t{text}\t{sentence(rng, True)}\t{i % 6}.250")
            lines["TREC"].append(f"{('DESC', 'HUM', 'LOC')[i % 3]}:x {text} caf\xe9 ?")
        for name, rows in lines.items():
            (where / name).mkdir(exist_ok=True)
            target = f"TREC.{'train' if side == 'train' else 'test'}" if name == "TREC" else f"{side}.tsv"
            (where / name / target).write_bytes(("\n".join(rows) + "\n").encode("latin-1"))
    return where


def run(room: Path, out: Path, *argv: str) -> int:
    same = ["--data", str(room), "--model", str(room / "bert"), "--out", str(out), "--json", str(out / "out.json"),
            "--rates", str(room / "rates.json"), "--threads", "1", "--dtype", "fp32", "--batch", "8"]  # fmt: skip
    return main([*same, *argv])


def table(room: Path, out: Path, *argv: str) -> int:
    return run(room, out, "--epochs", "1", "--tasks", "cola", "stsb", "--methods", *NAMES, "--seeds", "0", "1",
               "--time-steps", "2", "--time-dtypes", "fp32", *argv)  # fmt: skip


@pytest.mark.parametrize("name", ["cola", "sst2", "stsb", "trec"])
def test_the_publishers_formats(room, tmp_path, name):
    found = files(name, room, tmp_path)
    rows, _ = reader.read(found.train, labelled=True)
    assert len(rows) == 40 and all(row.text and (row.text2 is not None) == (name == "stsb") for row in rows)
    labels = {row.label for row in rows}
    expected = {"cola": {"0", "1"}, "sst2": {"0", "1"}, "trec": {"DESC", "HUM", "LOC"}}
    assert labels == expected.get(name, {f"{i}.250" for i in range(6)})
    assert name != "trec" or rows[0].text.endswith("café ?")


def test_the_command_and_its_interruption(room, tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    assert table(room, tmp_path / "early") == 2 and "--find-rates" in capsys.readouterr().err
    few = ["--find-rates", "--rate-rows", "16", "--rate-epochs", "1", "--rate-tasks", "cola", "--methods", *NAMES]
    assert run(room, tmp_path / "sweep", *few) == 0
    content = json.loads((room / "rates.json").read_text())
    assert set(content["rates"]) == {"full", "houlsby-64", "masked"}
    for name, row in content["rates"].items():
        scores = row["scores"]["cola"]
        assert [float(rate) for rate in scores] == list(VARIANTS[name].rates)
        assert scores[f"{row['lr']:g}"] == max(scores.values())
    assert read_rates(room / "rates.json")["houlsby-8"] == content["rates"]["houlsby-64"]["lr"]

    train, calls = cells_module.run.train, []

    def stops(options, progress):
        calls.append(options.output.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(options, progress)

    monkeypatch.setattr(cells_module.run, "train", stops)
    assert table(room, tmp_path / "out") == 130
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["cells"]) == 3
    monkeypatch.setattr(cells_module.run, "train", lambda o, p: calls.append(o.output.name) or train(o, p))
    capsys.readouterr()
    assert table(room, tmp_path / "out") == 0
    assert calls.count(calls[3]) == 2 and len(set(calls)) == 12 == len(calls) - 1
    found = json.loads((tmp_path / "out" / "out.json").read_text())
    assert len(found["cells"]) == 12 and {row["variant"] for row in found["times"]} == set(NAMES)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(NAMES) and len({line.count("|") for line in lines}) == 1
    assert printed.count("must") == 4 and "missing" in printed  # no bf16 was timed
    left = list((tmp_path / "out" / "cells").iterdir())
    assert left and all(path.suffix == ".lock" for path in left)  # weights are not kept
    assert table(room, tmp_path / "out", "--rows", "8") == 2 and "another folder" in capsys.readouterr().err


def test_every_variant_has_its_own_epochs_unless_told(room, tmp_path):
    def epochs(name: str, **given: float) -> float:
        plan = cells_module.Plan(room, tmp_path, "bert", **given)
        return plan.options("cola", name, 0, tmp_path / "cell", 1e-3).epochs

    assert (epochs("full"), epochs(FIXED)) == (5, 8)
    assert (epochs("full", epochs=1), epochs(FIXED, epochs=1)) == (1, 1)


def test_what_another_process_is_at_is_left_to_it(room, tmp_path, capsys):
    rates, out = tmp_path / "rates.json", tmp_path / "out"
    rates.write_text(json.dumps({"rates": {"full": {"lr": 1e-3}}}))
    command = ["--rates", str(rates), "--epochs", "1", "--tasks", "cola", "--methods", "full", "--seeds", "0", "1",
               "--time-dtypes"]  # fmt: skip
    with cells_module.claim(out / "cells" / "cola-full-0.lock") as ours:
        assert ours
        assert run(room, out, *command) == 0
    assert "under way in other processes: 1" in capsys.readouterr().err
    assert [c["seed"] for c in json.loads((out / "table.json").read_text())["cells"]] == [1]
    assert run(room, out, *command) == 0  # the other has died, and its cell is free again
    assert [c["seed"] for c in json.loads((out / "table.json").read_text())["cells"]] == [1, 0]


def test_a_rate_that_another_process_looks_for_is_left_to_it(room, tmp_path, capsys):
    pytest.importorskip("optuna")
    rates, out = tmp_path / "rates.json", tmp_path / "out"
    few = ["--rates", str(rates), "--find-rates", "--rate-rows", "8", "--rate-epochs", "1", "--rate-tasks", "cola"]
    with cells_module.claim(out / "rates" / "full.lock"):
        assert run(room, out, *few, "--methods", "full", "head") == 0
    assert "under way in another process" in capsys.readouterr().err
    assert set(json.loads(rates.read_text())["rates"]) == {"head"}


def cell(task: str, name: str, seed: int, score: float) -> dict:
    return {"task": task, "variant": name, "seed": seed, "score": score, "lr": 1e-3, "head_lr": None, "epochs": 8.0,
            "base": 1000, "parameters": {"own": 10}}  # fmt: skip


def test_figures_by_hand():
    scores = {  # seeds 0 and 1
        ("cola", FULL): (0.50, 0.52), ("cola", "houlsby-8"): (0.40, 0.41), ("cola", FIXED): (0.49, 0.50),
        ("cola", "houlsby-128"): (0.50, 0.51), ("trec", FULL): (0.95, 0.96), ("trec", "houlsby-8"): (0.96, 0.97),
        ("trec", FIXED): (0.95, 0.95), ("trec", "houlsby-128"): (0.90, 0.91),
    }  # fmt: skip
    cells = [cell(t, n, s, pair[s]) for (t, n), pair in scores.items() for s in (0, 1)]
    cells.append(cell("cola", FULL, 2, 0.1))  # a seed that is not complete counts nowhere
    assert figures.best_sizes(cells, [0, 1]) == {"cola": "houlsby-128", "trec": "houlsby-8"}
    # Seed 0: (0 + 1) / 2 points; seed 1: (-1 + 1) / 2.
    assert figures.differences(cells) == pytest.approx([0.5, 0.0])
    mean, half = figures.paired([0.5, 0.0])
    assert (mean, half) == pytest.approx((0.25, 12.706 * 0.25), rel=1e-6)  # sd/√2 = 0.25
    assert figures.fixed_below_best(cells) == pytest.approx((1 + 1 + 1 + 2) / 4)
    times = [{"variant": FIXED, "dtype": "bf16", "peer": "adapterhub", "task": "sst2", "steps_an_epoch": 9,
              "seconds": {"ours": [1.0, 2.0], "peer": [2.0, 4.0], "full": [4.0, 4.0]}}]  # fmt: skip
    found = figures.figures(cells, times)
    assert [f.measured for f in found] == pytest.approx([0.25 + 12.706 * 0.25, 1.25, 0.5, 0.375])
    assert [f.verdict for f in found] == ["goal", "FAIL", "goal", "goal"]
    one = figures.figures([c for c in cells if c["seed"] == 1], [])
    assert one[0].measured == pytest.approx(0.0) and "no interval" in one[0].text and one[2].verdict == "missing"
    text = figures.markdown({"cells": cells, "times": times})
    assert "| Houlsby b=64 | 1.00 % | 0.001 | 8 | 49.5 ± 0.7 | 95.0 ± 0.0 |" in text
    assert "| 1500.0 | 3000.0 (adapterhub) | 0.50 | 0.38 |" in text
    assert len(SIZED) == 3


def test_who_was_trained_where():
    def row(name: str, seed: int, machine: str, dtype: str = "bf16") -> dict:
        return {**cell("cola", name, seed, 0.5), "machine": machine, "dtype": dtype}

    times = [{"variant": name, "machine": "A"} for name in (FULL, FIXED)]
    cells = [row(FULL, 0, "A"), row(FULL, 1, "A"), row(FIXED, 0, "A")]
    once = figures.machines({"cells": cells, "times": times})
    assert once == "Timed on A. Trained under bf16 autocast on A."
    cells += [row(FIXED, 1, "B", "fp32"), row("lora", 0, "B", "fp32")]
    assert figures.machines({"cells": cells, "times": times}) == (
        "Timed on A. Trained under bf16 autocast on A: full fine-tuning, Houlsby b=64 (seed 0). "
        "Trained in fp32 on B: Houlsby b=64 (seed 1), LoRA r=8 on q, v."
    )


def test_a_head_with_a_rate_of_its_own():
    own = {**cell("cola", FULL, 0, 0.5), "head_lr": 1e-2}
    assert "| 0.001, head 0.01 | 8 |" in figures.markdown({"cells": [own], "times": []})


def test_bad_input(room, tmp_path, capsys):
    with pytest.raises(UserError, match=r"cannot be read"):
        files("cola", tmp_path, tmp_path)
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "train.tsv").write_text("gj04\t1\t\tfine\nonly one column\n")
    (tmp_path / "CoLA" / "dev.tsv").write_text("gj04\t1\t\tfine\n")
    with pytest.raises(UserError, match=r"train.tsv, line 2: has 1 columns"):
        files("cola", tmp_path, tmp_path / "out")
