"""The GPU suite without a GPU: it says so, lists its cases, and its own check of the ops finds right and wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
import fastadapt as fa
from benchmarks.gpu_suite import __main__ as suite
from benchmarks.gpu_suite import check, measure, merging, models, must, ops, peers, sanitize
from fastadapt import dispatch


def test_a_dry_run_lists_every_test_file_and_case(capsys):
    assert suite.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    cases = [*ops.cases(), *merging.cases(), *models.cases()]
    assert len(listed) == len(set(listed)) == len(suite.TESTS) + len(cases)
    for tests in suite.TESTS:
        file, _, name = tests.partition("::")
        assert f"def {name or 'test_'}" in (suite.ROOT / file).read_text()


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite itself checks on a GPU")
@pytest.mark.parametrize("method", ["houlsby", "lora"])
@pytest.mark.parametrize("training", [False, True])
def test_its_check_of_a_model_finds_what_is_off(method, training, monkeypatch):
    case = models.ModelCase(method, 2, 16, training, compiled=False)
    assert models.wrong(case, "cpu", layers=1) is None
    right = dispatch.kernel

    def drifting(name, op):
        found = right(name, op)
        if name == "reference" or not op.startswith(("bottleneck_forward", "lora_forward")):
            return found
        return lambda *arguments: (found(*arguments)[0] * 1.1, *found(*arguments)[1:])

    monkeypatch.setattr(dispatch, "kernel", drifting)
    monkeypatch.setattr(dispatch, "native", lambda *_: None)  # which would pass it by
    assert models.wrong(case, "cpu", layers=1).startswith("error")


def test_a_case_that_fails_is_told_and_loses_no_other(monkeypatch):
    def refuse(case):
        raise RuntimeError("no memory")

    monkeypatch.setattr(merging, "wrong", refuse)
    assert check.checked(merging.MergeCase(8, "bfloat16")) == check.Verdict("RuntimeError: no memory", raised=True)


def _dies(case):
    if case.dtype == "bfloat16":
        os._exit(1)
    return check.Verdict(None)


def test_a_case_whose_process_dies_costs_no_other_its_verdict(monkeypatch):
    cases = [merging.MergeCase(8, "bfloat16"), merging.MergeCase(8, "float32"), merging.MergeCase(64, "float32")]
    monkeypatch.setattr(check, "checked", _dies)
    found = check.check_all(cases, workers=2)
    assert [found[case.name].wrong for case in cases] == ["the process died", None, None]


def test_the_tests_outcome_and_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "TESTS", ("tests",))
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_x.py"
    file.write_text("import pytest\n@pytest.mark.parametrize('a', ['a - b', 'c'])\ndef test_cuda(a): assert a == 'c'\n")
    told = suite.run_tests(120.0)
    assert (told["ok"], told["tests"], told["failed"]) == (False, 2, ["tests/test_x.py::test_cuda[a - b]"])
    file.write_text("def test_cuda(): pass\n")
    told = suite.run_tests(120.0)
    assert (told["ok"], told["tests"], told["failed"]) == (True, 1, [])


def test_tests_that_take_too_long_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "TESTS", ("tests",))
    assert suite.run_tests(0.1) == {"ok": False, "reason": "not finished after 0 s", "failed": []}


def test_a_process_whose_gpu_failed_leaves_the_other_cases_to_others(monkeypatch):
    def failed():
        raise RuntimeError("an illegal memory access was encountered")

    case = merging.MergeCase(8, "bfloat16")
    monkeypatch.setattr(merging, "wrong", lambda case: failed())
    monkeypatch.setattr(torch.cuda, "empty_cache", failed)
    monkeypatch.setattr(check, "_usable", True)
    assert check.checked(case).raised
    assert check.checked(case) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU every case fails")
def test_cases_are_checked_in_other_processes():
    cases = [merging.MergeCase(8, "bfloat16"), merging.MergeCase(8, "float32")]
    found = check.check_all(cases, workers=2)
    assert list(found) == [case.name for case in cases]
    assert all(verdict.raised and ("CUDA" in verdict.wrong or "NVIDIA" in verdict.wrong) for verdict in found.values())


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


# -- determinism, peers and sanitizers ---------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite itself checks on a GPU")
def test_a_repeat_that_differs_in_one_bit_is_found(monkeypatch):
    case = ops.OpCase("add_norm", 8, 64, 0, "bfloat16", training=True, compiled=False)
    assert ops.repeats(case, "cpu") is None
    right, calls = ops.ours, []

    def drifting(*arguments):
        calls.append(1)
        return right(*arguments) * (1.0 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(ops, "ours", drifting)
    assert ops.repeats(case, "cpu") == "result 0 differs between two runs"


def test_a_backward_alone_gives_the_training_steps_gradients():
    case = ops.OpCase("bottleneck", 8, 64, 16, "float32", training=True, compiled=False)
    alone = dataclasses.replace(case, backward_only=True)
    t = ops.tensors(case, "cpu")
    both = ops.step(case, lambda: ops.eager(case, t, 0.0), t)()
    backward = ops.step(alone, lambda: ops.eager(case, t, 0.0), t)
    for want, first, again in zip(both, backward(), backward(), strict=True):
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(again, want)
    assert alone.name.startswith("bottleneck backward rows=8")
    assert ops.work(alone) == (8.0 * 8 * 64 * 16, 5 * 8 * 64 * 4 + 8 * 16 * 4)


@pytest.mark.parametrize("name, op", [("peft", "lora"), ("adapterhub", "bottleneck")])
def test_a_peer_computes_the_op_and_its_gradients(name, op):
    if name == "peft":
        pytest.importorskip("peft")
    case = ops.OpCase(op, 16, 64, 8, "float32", training=True, compiled=False)
    t = ops.tensors(case, "cpu")
    setup = peers.OF[op][name]
    assert peers.wrong(case, t, setup) is None
    theirs = ops.step(case, setup(case, t, 0.0), t)()
    plain = ops.step(case, lambda: ops.eager(case, t, 0.0), t)()
    for mine, want in zip(theirs, plain, strict=True):
        torch.testing.assert_close(mine, want)
    assert peers.wrong(case, t, lambda *a: lambda: setup(*a)() * 1.1).startswith("y: error")


@pytest.mark.parametrize("name, op", [("liger", "add_norm"), ("unsloth", "lora"), ("lorafusion", "lora")])
def test_a_library_that_is_not_here_is_told_as_absent(name, op, monkeypatch):
    def nothing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(peers.importlib, "import_module", nothing)
    case = ops.OpCase(op, 4, 64, 8, "float32", training=False, compiled=False)
    with pytest.raises(peers.AbsentError, match="ImportError: No module named"):
        peers.OF[op][name](case, ops.tensors(case, "cpu"), 0.0)


@pytest.mark.skipif(isinstance(dispatch.load("cuda"), str), reason="the C++ kernels are not compiled")
def test_what_the_sanitizers_run_reaches_every_kernel():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert sanitize.exercise(device) == 3 * (3 * 2 + 5)


def test_a_sanitizer_that_is_not_here_is_no_failure_and_no_success(monkeypatch):
    monkeypatch.setattr(sanitize.dispatch, "load", lambda name: object())
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.run("memcheck") == {"ok": None, "reason": "compute-sanitizer is not on PATH"}


def test_a_finding_of_a_sanitizer_fails(monkeypatch, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$@"; exit 9\n')
    program.chmod(0o755)
    monkeypatch.setattr(sanitize.dispatch, "load", lambda name: object())
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(program))
    told = sanitize.run("racecheck")
    assert told["ok"] is False
    assert "--tool racecheck --error-exitcode 9" in told["output"] and "benchmarks.gpu_suite.sanitize" in told["output"]


def test_a_run_that_passed_is_written_down_as_proof(tmp_path, monkeypatch):
    path = tmp_path / "proven.json"
    path.write_text('{"cuda": {}, "triton": {}}')
    about = {"capability": "9.0", "device": "X", "date": "2026-01-02T03:04:05+00:00", "commit": "c"}
    result = {"tests": {"ok": True}, "sanitizer": {"memcheck": {"ok": None}}, "environment": about}
    for bad in ({"tests": {"ok": False}}, {"sanitizer": {"memcheck": {"ok": False}}}):
        assert suite.record_proof(result | bad, path) == []
    assert "triton" in suite.record_proof(result, path)
    entry = json.loads(path.read_text())["triton"]["sm_90"]
    assert (entry["device"], entry["date"]) == ("X", "2026-01-02")
    assert {"bottleneck_backward", "remerge_", "lora_forward"} <= set(entry["ops"]) and "refusal" not in entry["ops"]


# -- what has to be reached --------------------------------------------------------------------------------------


def _record(bench, system="ours", l2="warm", wrong=None, **fields):
    return {"bench": bench, "system": system, "l2": l2, "wrong": wrong, **fields}


def test_every_figure_names_a_case_of_the_suite():
    names = {c.name for c in [*ops.cases(), *merging.cases(), *models.cases()]}
    everything = [
        _record(name, system, l2, share_of_floor=0.5, ratio_to_eager=0.5, ratio_to_compiled=0.5, ratio_to_frozen=0.5,
                ratio_to_copy=2.0, ratio_to_adapterhub=0.5)
        for name in names for system in ("ours", "captured") for l2 in ("warm", "cold")
    ]  # fmt: skip
    assert all(row["value"] is not None for row in must.table(everything))


def test_without_records_all_but_the_spills_is_not_measured():
    table = must.table([])
    assert [row["figure"] for row in table if row["value"] is not None] == [must.FIGURES[-1].name]
    assert table[-1]["value"] == 0.0 and table[-1]["reached"]
    text = must.text([])
    assert text.count("not measured") == len(table) - 1 and "MISSED" not in text


def test_a_figure_is_reached_missed_or_of_a_wrong_row_unknown():
    bench = "bottleneck inference rows=65536 H=768 b=64 bfloat16"

    def first(**fields):
        return must.table([_record(bench, l2="cold", **fields)])[0]

    assert first(share_of_floor=0.76)["reached"] is True
    assert first(share_of_floor=0.74)["reached"] is False
    assert "MISSED" in must.text([_record(bench, l2="cold", share_of_floor=0.74)])
    assert first(share_of_floor=0.9, wrong="y: error")["reached"] is None
    training = [_record(f"bottleneck training rows={n} H=768 b=64 bfloat16", ratio_to_compiled=n / 1e5)
                for n in ops.COMPILED_ROWS]  # fmt: skip
    (row,) = [r for r in must.table(training) if "torch.compile" in r["figure"]]
    assert row["value"] == pytest.approx(0.65536)
    (row,) = [r for r in must.table(training[1:]) if "torch.compile" in r["figure"]]
    assert row["value"] is None


def test_the_table_of_a_written_result_is_printed_without_a_gpu(tmp_path, capsys):
    written = tmp_path / "result.json"
    written.write_text(json.dumps({"records": []}))
    assert suite.main(["--must", str(written)]) == 0
    assert "not measured" in capsys.readouterr().out


def test_a_models_operations_are_those_of_its_products():
    case = models.ModelCase("houlsby", 2, 128, training=False, compiled=False)
    linears = sum(2 * n * k for n, k in [(768, 768)] * 4 + [(3072, 768), (768, 3072)] + [(64, 768), (768, 64)] * 2)
    attention = 2 * 2 * 128 * 768
    assert models.work(case)[0] == 12 * 256 * (linears + attention)
