"""The GPU suite without a GPU: it says so, lists its cases, and its own check of the ops finds right and wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
import fastadapt as fa
from benchmarks.gpu_suite import __main__ as suite
from benchmarks.gpu_suite import measure, merging, models, ops


def test_a_dry_run_lists_every_test_file_and_case(capsys):
    assert suite.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    cases = [*ops.cases(), *merging.cases(), *models.cases()]
    assert len(listed) == len(set(listed)) == len(suite.TESTS) + len(cases)
    for file in suite.TESTS:
        assert (suite.ROOT / file).is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path):
    written = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--json", str(written)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not written.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite itself checks on a GPU")
@pytest.mark.parametrize("op", ["bottleneck", "add_norm", "linear", "lora", "lora rows"])
def test_its_check_passes_what_is_right_and_names_what_is_wrong(op, monkeypatch):
    width = 16 if op == "bottleneck" or op.startswith("lora") else 0
    case = ops.OpCase(op, 64, 64, width, "bfloat16", training=True, compiled=False)
    assert ops.wrong(case, "cpu") is None
    right = ops.ours
    monkeypatch.setattr(ops, "ours", lambda *arguments: right(*arguments) * 1.1)
    assert ops.wrong(case, "cpu").startswith("y: error")


def test_a_training_step_gives_the_gradient_of_all_that_trains():
    case = ops.OpCase("bottleneck", 8, 64, 16, "float32", training=True, compiled=False)
    t = ops.tensors(case, "cpu")
    gradients = ops.step(case, lambda: ops.eager(case, t, 0.0), t)()
    assert [g.shape for g in gradients] == [t[name].shape for name in ops.TRAINED["bottleneck"]]
    inference = dataclasses.replace(case, training=False)
    assert not ops.step(inference, lambda: ops.eager(case, t, 0.0), t)().requires_grad


@pytest.mark.parametrize("op", ["lora", "lora dropout", "lora rows"])
def test_a_lora_is_held_against_the_linear_it_stands_at(op):
    case = ops.OpCase(op, 64, 64, 8, "float32", training=True, compiled=False)
    t = ops.tensors(case, "cpu")
    seed = torch.zeros((), dtype=torch.int64)
    gradients = ops.step(case, lambda: ops.ours(case, t, case.p, seed), t)()
    assert [g.shape for g in gradients] == [t[name].shape for name in ops.TRAINED[op]]
    (dx,) = ops.step(case, lambda: ops.frozen(case, t), t, ("x",))()
    torch.testing.assert_close(dx, t["dy"] @ t["w"])
    operations, bytes_ = ops.work(case)
    assert operations > 4 * 64**3 and bytes_ == 5 * 64 * 64 * 4


@pytest.mark.skipif(not hasattr(fa.ops, "merge_"), reason="there is no merge here")
def test_its_check_of_a_merge_finds_lost_bits(monkeypatch):
    case = merging.MergeCase(8, "bfloat16")
    assert merging.wrong(case, "cpu", layers=1) is None
    monkeypatch.setattr(fa.ops, "unmerge_", lambda *arguments: None)
    assert merging.wrong(case, "cpu", layers=1).endswith("weights changed after unmerging")


def test_a_model_case_holds_peft_to_the_same_six_linears():
    peft = pytest.importorskip("peft")
    model = models._peft()
    targets = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(targets) == 6 * 12


def test_percentiles_ratios_and_floors():
    mine, other = measure.Times((2.0, 4.0, 3.0, 5.0, 1.0)), measure.Times((4.0, 4.0, 6.0, 5.0, 4.0))
    assert mine.percentiles == (2.0, 3.0, 4.0)
    assert measure.paired_ratio(mine, other) == 0.5
    ceilings = measure.Ceilings(copy=1e12, product={"bfloat16": 1e15})
    assert ceilings.floor_us(flops=1e9, bytes_=4e6, dtype="bfloat16") == pytest.approx(4.0)
