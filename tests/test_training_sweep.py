"""``fastadapt train --sweep``: every point as it would be alone, however often the sweep is stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tasks

from fastadapt.cli import main
from fastadapt.training import sweep as module
from fastadapt.training.sweep import Sweep

pytest.importorskip("optuna")
AXES = ("lr=1e-3,1e-2", "size=4,8", "seed=0,1")
FAST = ("--epochs", "3", "--batch", "16", "--dtype", "fp32", "--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("room")
    tasks.make_base(where / "bert")
    tasks.write_mood(where, "mood", 64, 0)
    tasks.write_mood(where, "mood-dev", 48, 1)
    return where


def run(room: Path, output: Path, *argv: str) -> int:
    files = ["--train", str(room / "mood.tsv"), "--dev", str(room / "mood-dev.tsv"), "--name", "mood"]
    return main(["train", "--model", str(room / "bert"), *files, "--output", str(output), *FAST, *argv])


def points(output: Path) -> dict[str, dict]:
    found = {p.parent.name: json.loads(p.read_text()) for p in output.glob("points/*/result.json")}
    for result in found.values():
        result.pop("seconds_a_step")
    return found


@pytest.fixture(scope="module")
def whole(room) -> Path:
    assert run(room, room / "whole", "--sweep", *AXES) == 0
    return room / "whole"


def test_the_grid_is_trained_and_the_best_is_the_result(room, whole, capsys):
    report = json.loads((whole / "sweep.json").read_text())
    found = points(whole)
    assert len(found) == 8 and len(report["cells"]) == 4
    assert {(c["lr"], c["size"]) for c in report["cells"]} == {(lr, b) for lr in (1e-3, 1e-2) for b in (4, 8)}
    scores = {key: result["scores"]["mood"]["score"] for key, result in found.items()}
    best = report["best"]
    assert best["score"] == max(scores.values()) == scores[f"lr-{best['lr']:g}_size-{best['size']}_seed-{best['seed']}"]
    for cell in report["cells"]:
        keys = [f"lr-{cell['lr']:g}_size-{cell['size']}_seed-{seed}" for seed in (0, 1)]
        assert cell["mean"] == pytest.approx(sum(scores[k] for k in keys) / 2)
        assert cell["scores"] == {str(seed): scores[k] for seed, k in zip((0, 1), keys, strict=True)}
    assert len({json.dumps(r["loss"]) for r in found.values()}) == 8  # no point is another's copy
    assert (whole / "sweep.png").stat().st_size > 5000 and "best single training" in (whole / "sweep.md").read_text()
    out = room / "out.tsv"
    argv = ["--adapters", str(whole), "--input", str(room / "mood-dev.tsv"), "--text", "sentence"]
    assert main(["predict", *argv, "--device", "cpu", "--output", str(out)]) == 0
    rows = (room / "mood-dev.tsv").read_text().splitlines()[1:]
    predicted = [line.split("\t") for line in out.read_text().splitlines()]
    column = predicted[0].index("label")
    right = sum(p[column] == row.split("\t")[1] for p, row in zip(predicted[1:], rows, strict=True))
    assert right / len(rows) == pytest.approx(best["score"])


def test_a_point_is_what_train_alone_makes(room, whole, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what transformers 4 leaves behind it after bfloat16
    assert run(room, room / "alone", "--bottleneck", "8", "--lr", "1e-2", "--seeds", "1") == 0
    stage = json.loads((room / "alone" / "report.json").read_text())["stages"][0]
    point = points(whole)["lr-0.01_size-8_seed-1"]
    assert point["loss"] == stage["loss"] and point["scores"] == stage["scores"]


class Killed(BaseException):
    """As SIGKILL does, it passes by every handler."""


@pytest.mark.parametrize("when", ["between", "within"])
def test_a_stopped_sweep_goes_on(room, whole, when, monkeypatch):
    """Points that are done are read back, and one that was under way goes on from its checkpoint."""
    output = room / when
    finish, train = Sweep.finish, module.SweepTrainer.train
    calls, steps = [], []

    def stops(self, point, result):
        calls.append(point)
        if len(calls) == 4:
            raise Killed
        finish(self, point, result)
        if len(calls) == 3 and when == "between":
            raise Killed

    def saves_once(self, *args, **kwargs):
        if len(calls) == 3:
            original = self._save_checkpoint

            def save(*a, **k):
                original(*a, **k)
                raise Killed

            self._save_checkpoint = save
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Sweep, "finish", stops)
    if when == "within":
        monkeypatch.setattr(module.SweepTrainer, "train", saves_once)
    with pytest.raises(Killed):
        run(room, output, "--sweep", *AXES)
    monkeypatch.undo()
    assert len(points(output)) == 3

    def counted(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        steps.append(result.metrics["train_runtime"])
        return result

    monkeypatch.setattr(module.SweepTrainer, "train", counted)
    assert run(room, output, "--sweep", *AXES) == 2  # without --resume nothing is touched
    assert run(room, output, "--sweep", *AXES, "--resume") == 0
    assert len(steps) == 5
    assert points(output) == points(whole)


def test_other_methods_and_bad_axes(room, capsys):
    for method in ("lora", "full"):
        size = ["size=2,4"] if method == "lora" else []
        assert run(room, room / method, "--method", method, "--sweep", "lr=1e-3,1e-2", *size) == 0
        assert len(points(room / method)) == 2 * max(1, 2 * len(size))
    assert run(room, room / "bad", "--method", "bitfit", "--sweep", "size=2") == 2
    assert "bitfit has none" in capsys.readouterr().err
    assert run(room, room / "bad", "--sweep", "lr=1e-3", "lr=1e-2") == 2
    assert "--sweep: got an axis twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(room, room / "bad", "--sweep", "rate=1e-3")
    assert "accepted are lr=" in capsys.readouterr().err
    assert not (room / "bad").exists()
