"""A run that was killed goes on to the same numbers, to the last bit; a failed write costs no earlier checkpoint."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tasks
import torch

from fastadapt.cli import main
from fastadapt.training import fit, watch

# In a process of its own, which is killed where the first argument says, at the step of the second.
KILLER = """
import os, signal, sys
from fastadapt.cli import main
from fastadapt.training import checkpoints, watch

where, step = sys.argv[1], int(sys.argv[2])
after_step, seal = watch.Watch.on_step_end, checkpoints.seal

def kill_after_step(self, args, state, control, **more):
    after_step(self, args, state, control, **more)
    if state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)

def kill_before_seal(folder, run):
    if folder.name == f"checkpoint-{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, run)

if where == "step":
    watch.Watch.on_step_end = kill_after_step
else:
    checkpoints.seal = kill_before_seal
sys.exit(main(sys.argv[3:]))
"""
STEPS = 18  # 3 epochs of 6


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("room")
    tasks.make_base(where / "bert")
    for name, rows, seed in (("mood", 96, 0), ("mood-dev", 32, 1)):
        tasks.write_mood(where, name, rows, seed)
    for name, rows, seed in (("topic", 60, 0), ("topic-dev", 32, 1)):
        tasks.write_topic(where, name, rows, seed)
    return where


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(room: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(room / "bert"), "--train", str(room / "mood.tsv"), "--dev", str(room / "mood-dev.tsv"),
        "--name", "mood", "--output", str(output), "--epochs", "3", "--batch", "16", "--lr", "3e-3", "--dtype", "fp32",
        "--device", "cpu", "--threads", "1", "--eval-steps", "4", "--seeds", "0", *more,
    ]  # fmt: skip


def joint(room: Path, output: Path, *more: str) -> list[str]:
    argv = command(room, output, *more)
    at = argv.index("--train")
    argv[at : at + 6] = [
        "--task", f"mood={room / 'mood.tsv'}", "--dev", f"mood={room / 'mood-dev.tsv'}",
        "--task", f"topic={room / 'topic.tsv'}", "--dev", f"topic={room / 'topic-dev.tsv'}",
        "--text", "topic=2", "--label", "topic=1",
    ]  # fmt: skip
    return argv


def run(monkeypatch, argv: list[str]) -> dict:
    """What the last stage's trainer is left with: optimizer, schedule and random numbers."""
    found: dict = {}

    class Recorded(fit.TaskTrainer):
        def train(self, *args, **kwargs):
            done = super().train(*args, **kwargs)
            found.update(
                optimizer=self.optimizer.state_dict(), scheduler=self.lr_scheduler.state_dict(),
                random=torch.get_rng_state(), steps=self.state.global_step,
                now={key: p.detach().clone() for key, p in self.model.named_parameters()},
            )  # fmt: skip
            return done

    with monkeypatch.context() as patch:
        patch.setattr(fit, "TaskTrainer", Recorded)
        assert main(argv) == 0
    return found


class Stopped(BaseException):
    """Nothing catches it."""


def stop(monkeypatch, step: int, argv: list[str]) -> None:
    """Run until the end of a step and no further."""
    after_step = watch.Watch.on_step_end

    def stop_after_step(self, args, state, control, **more):
        after_step(self, args, state, control, **more)
        if state.global_step == step:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(watch.Watch, "on_step_end", stop_after_step)
        main(argv)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_same(first: Path, second: Path) -> None:
    """Every stored tensor, score and loss of two runs is the same."""
    files = sorted(path.relative_to(first) for path in (first / "seeds").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    one, two = (json.loads((path / "report.json").read_text()) for path in (first, second))
    for a, b in zip(one["stages"], two["stages"], strict=True):
        for key in ("loss", "dev", "scores", "steps", "checksums"):
            assert a[key] == b[key], key


@pytest.mark.parametrize(
    ("where", "make", "more"),
    [
        ("step", joint, ("--method", "houlsby", "--bottleneck", "8", "--set", "drop=mode=robust")),
        ("save", command, ("--method", "masked", "--bottleneck", "8", "--accumulate", "2")),
        ("stop", command, ("--method", "lora", "--set", "dropout=0.2", "--seeds", "3", "4")),
        ("stop", command, ("--method", "full", "--lr", "3e-4")),
    ],
)
def test_a_killed_run_goes_on_to_the_same_numbers(room, tmp_path, monkeypatch, where, make, more):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = run(monkeypatch, make(room, whole, *more))
    step = 8 if where == "save" else random.Random().randrange(5, expected["steps"])
    if where == "stop":  # as a kill, for the folder: nothing is cleaned up
        stop(monkeypatch, step, make(room, killed, *more))
    else:
        argv = [sys.executable, "-c", KILLER, where, str(step), *make(room, killed, *more)]
        assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    sealed = sorted((killed / "checkpoints").rglob("complete.json"))
    assert len(sealed) == 1, f"killed at step {step}"
    got = run(monkeypatch, [*make(room, killed, *more), "--resume"])
    for part in ("steps", "scheduler", "random", "now", "optimizer"):
        assert same(expected[part], got[part]), f"{part}, killed at step {step}"
    check_same(whole, killed)
    assert json.loads((killed / "report.json").read_text())["stages"][0]["steps"] == expected["steps"]


def test_a_finished_run_is_not_trained_again(room, tmp_path, monkeypatch):
    output = tmp_path / "mood"
    run(monkeypatch, command(room, output))
    before = (output / "adapter.safetensors").read_bytes()
    assert run(monkeypatch, command(room, output, "--resume")) == {}
    assert (output / "adapter.safetensors").read_bytes() == before


def test_early_stopping_stops_and_keeps_the_best(room, tmp_path):
    output = tmp_path / "mood"
    assert main([*command(room, output), "--epochs", "40", "--lr", "1e-9", "--patience", "2"]) == 0
    stage = json.loads((output / "report.json").read_text())["stages"][0]
    assert stage["steps"] < 200
    assert stage["scores"]["mood"]["step"] <= stage["steps"]


def test_the_last_step_is_evaluated(room, tmp_path):
    output = tmp_path / "mood"
    assert main([*command(room, output), "--eval-steps", "1000"]) == 0
    stage = json.loads((output / "report.json").read_text())["stages"][0]
    assert [step for step, _ in stage["dev"]["mood"]] == [STEPS]


@pytest.mark.parametrize("more", [("--epochs", "1"), ("--epochs", "40", "--lr", "1e-9", "--patience", "2")])
def test_a_run_stopped_between_its_last_step_and_its_result_is_not_trained_on(room, tmp_path, monkeypatch, more):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*command(room, whole), *more]) == 0
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(fit.TaskTrainer, "keep_best", lambda self: (_ for _ in ()).throw(Stopped))
        main([*command(room, stopped), *more])
    assert main([*command(room, stopped, "--resume"), *more]) == 0
    check_same(whole, stopped)


def refused(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, lines
    return lines[0]


def test_another_runs_folder_is_refused(room, tmp_path, capsys):
    output = tmp_path / "mood"
    assert main(command(room, output)) == 0
    assert "--resume goes on" in refused(capsys, command(room, output))
    line = refused(capsys, [*command(room, output, "--resume"), "--lr", "1e-4"])
    assert "another run" in line and "lr" in line and "0.003" in line and "0.0001" in line
    changed = tasks.write_mood(tmp_path, "changed", 40, 9)
    argv = command(room, output, "--resume")
    argv[argv.index("--train") + 1] = str(changed)
    line = refused(capsys, argv)
    assert "another run" in line and "tasks mood train" in line
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    assert "something else" in refused(capsys, command(room, stranger))


def test_a_checkpoint_of_another_run_is_refused(room, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    for output, more in ((first, ("--seeds", "1")), (second, ("--seeds", "2"))):
        stop(monkeypatch, 9, command(room, output, *more))
    (second / "checkpoints").rename(second / "old")
    (first / "checkpoints").rename(second / "checkpoints")
    (second / "checkpoints" / "seed-1").rename(second / "checkpoints" / "seed-2")
    line = refused(capsys, command(room, second, "--seeds", "2", "--resume"))
    assert "checkpoint-8" in line and "another run" in line


def test_a_disk_that_is_full_is_told_and_earlier_checkpoints_stay(room, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole", tmp_path / "mood"
    assert main(command(room, whole)) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    after_step = watch.Watch.on_step_end

    def fill(self, args, state, control, **more):
        after_step(self, args, state, control, **more)
        if state.global_step == 6:  # from here on no file may be larger than this
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "on_step_end", fill)
        try:
            line = refused(capsys, command(room, output))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-8" in line and "cannot be written" in line and "--resume" in line
    left = [path.name for path in (output / "checkpoints").rglob("checkpoint-*")]
    assert left == ["checkpoint-4"]
    assert main(command(room, output, "--resume")) == 0
    check_same(whole, output)
