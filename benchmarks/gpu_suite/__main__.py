"""Run the GPU tests, then every benchmark, and write one JSON with the device, the versions and the date."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

import fastadapt as fa
from benchmarks.gpu_suite import check, measure, merging, models, must, ops, peers, sanitize
from fastadapt import dispatch, proven
from fastadapt.ops.schemas import CUDA_OPS

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/test_cuda_kernels.py", "tests/test_merge_ops.py", "tests/test_ops.py", "tests/test_lora_ops.py",
    "tests/test_rows_ops.py", "tests/test_mix_ops.py", "tests/test_dropout.py", "tests/test_dispatch.py",
    "tests/test_whole_graphs.py::test_trains_inside_graphed_callables",
)  # fmt: skip
TESTS_LIMIT_S = 240.0
NO_GPU = 2
# Systems that the others are also held against, beside eager code.
BASES = ("frozen", "merged", "copy", "compiled", "peft", "adapterhub", "captured")
Absences = dict[str, str]
Outcome = tuple[list[dict[str, Any]], Absences]


def environment() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "processors": device.multi_processor_count,
        "versions": {
            "fastadapt": fa.__version__, "torch": torch.__version__, "triton": triton.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        },
        "commit": commit.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def run_tests(limit_s: float) -> dict[str, Any]:
    """pytest on op tests and captured training; with a GPU visible, kernels are compiled instead of interpreted."""
    with tempfile.TemporaryDirectory() as folder:
        report, workers = Path(folder, "junit.xml"), max(1, (os.cpu_count() or 1) * 3 // 4)
        command = [sys.executable, "-m", "pytest", "-v", "-k", "cuda or graphed", "-n", str(workers), "--dist",
                   "worksteal", "--maxfail=40", "--tb=short", f"--junitxml={report}", *TESTS]  # fmt: skip
        begun = time.monotonic()
        run = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            output, _ = run.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # its workers too, which would disturb what is measured next
            output, _ = run.communicate()
            return {"ok": False, "reason": f"not finished after {limit_s:.0f} s", "failed": _failed(output)}
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
        counts = {} if suite is None else {n: int(suite.get(n, 0)) for n in ("tests", "failures", "errors", "skipped")}
        return {
            "ok": run.returncode == 0, **counts, "seconds": round(time.monotonic() - begun, 1),
            "failed": _failed(output), "output": output[-8000:],
        }  # fmt: skip


def _failed(output: str) -> list[str]:
    """The tests that failed, by pytest's progress."""
    return sorted(set(re.findall(r"^\[gw\d+\].* (?:FAILED|ERROR) (tests/.*?)\s*$", output, re.MULTILINE)))


def _rows(
    times: dict[str, measure.Times], about: dict[str, Any], floor_us: float | None, off: dict[str, str | None]
) -> list[dict[str, Any]]:
    found = []
    for system, taken in times.items():
        p20, p50, p80 = taken.percentiles
        row = about | {"system": system, "p20_us": p20, "p50_us": p50, "p80_us": p80}
        row["ratio_to_eager"] = measure.paired_ratio(taken, times["eager"])
        for base in BASES:
            if base in times:
                row[f"ratio_to_{base}"] = measure.paired_ratio(taken, times[base])
        row["share_of_floor"] = None if floor_us is None else floor_us / p50
        row["wrong"] = off.get(system)
        found.append(row)
    return found


def run_op(case: ops.OpCase, wrong: str | None, ceilings: measure.Ceilings, rounds: int) -> Outcome:
    off: dict[str, str | None] = {"ours": wrong}
    absent: Absences = {}
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    t = ops.tensors(case)
    with fa.backend("triton"):
        graphs = {"ours": measure.captured(ops.step(case, lambda: ops.ours(case, t, case.p, seed), t))}
    graphs["eager"] = measure.captured(ops.step(case, lambda: ops.eager(case, t, case.p), t))
    if f"{case.op}_forward" in CUDA_OPS and not case.training and case.rows <= 1024:
        loaded = dispatch.load("cuda")
        if isinstance(loaded, str):
            absent["cuda"] = loaded
        else:
            with fa.backend("cuda"):
                graphs["cuda"] = measure.captured(ops.step(case, lambda: ops.ours(case, t, case.p, seed), t))
            off["cuda"] = ops.repeats(case, backend="cuda")
    if case.lora:
        plain = ("x",) if case.training else ()
        graphs["frozen"] = measure.captured(ops.step(case, lambda: ops.frozen(case, t), t, plain))
    if case.compiled:
        compiled = torch.compile(ops.eager, mode="max-autotune-no-cudagraphs", dynamic=False)
        graphs["compiled"] = measure.captured(ops.step(case, lambda: compiled(case, t, case.p), t))
    for name, setup in peers.OF[case.op].items():
        try:
            off[name] = peers.wrong(case, t, setup)
            graphs[name] = measure.captured(ops.step(case, setup(case, t, case.p), t))
        except peers.AbsentError as reason:
            absent[name] = str(reason)
        except Exception as error:  # another library's kernel that fails is its own result, not the end of the case
            absent[name] = f"failed: {type(error).__name__}: {error}"
    floor = ceilings.floor_us(*ops.work(case), case.dtype)
    rows = []
    for cold in (False, True):
        times = measure.in_turns({n: g.replay for n, g in graphs.items()}, rounds, cold=cold)
        rows += _rows(times, {"bench": case.name, "l2": "cold" if cold else "warm"}, floor, off)
    return rows, absent


def run_merge(case: merging.MergeCase, wrong: str | None, ceilings: measure.Ceilings, rounds: int) -> Outcome:
    """The host's work included: a merge is checked before anything is written."""
    off: dict[str, str | None] = {"ours": wrong}
    calls = merging.systems(case)
    if "cuda" in calls:
        with fa.backend("cuda"):
            off["cuda"] = merging.wrong(case)
    for call in calls.values():
        for _ in range(3):
            call()
    floor = ceilings.floor_us(*merging.work(case), case.dtype)
    absent = {} if "cuda" in calls else {"cuda": str(dispatch.load("cuda"))}
    return _rows(measure.in_turns(calls, rounds, cold=False), {"bench": case.name, "l2": "warm"}, floor, off), absent


def run_model(case: models.ModelCase, wrong: str | None, ceilings: measure.Ceilings, rounds: int) -> Outcome:
    """Launches included: a whole model is timed as a user runs it."""
    calls, absent = models.systems(case)
    for call in calls.values():
        for _ in range(3):
            call()
    floor = None if case.training else ceilings.floor_us(*models.work(case), "bfloat16")
    about = {"bench": case.name, "l2": "warm"}
    off = dict.fromkeys(("ours", "captured"), wrong)
    return _rows(measure.in_turns(calls, rounds, cold=False), about, floor, off), absent


def prove(cases: list[check.Case], tests_limit_s: float | None) -> tuple[dict[str, Any], dict[str, check.Verdict]]:
    """(the outcome of the tests and sanitizers, the verdict on every case), all at once: nothing is measured yet.

    Without a limit for the tests, only the cases are checked.
    """
    with ThreadPoolExecutor() as beside:
        jobs: dict[str, Any] = {}
        if tests_limit_s is not None:
            jobs = {tool: beside.submit(sanitize.run, tool) for tool in sanitize.TOOLS}
            jobs["tests"] = beside.submit(run_tests, tests_limit_s)
        verdicts = check.check_all(cases)
        found = {name: job.result() for name, job in jobs.items()}
    if not found:
        return {}, verdicts
    tests = found.pop("tests")
    print(f"tests: {'passed' if tests['ok'] else 'FAILED'} {tests.get('reason', '')}".rstrip(), flush=True)
    print("".join(f"  {name}\n" for name in tests["failed"]), end="", flush=True)
    for tool, told in found.items():
        state = told["reason"] if told["ok"] is None else "passed" if told["ok"] else "FAILED"
        print(f"compute-sanitizer {tool}: {state}", flush=True)
    return {"tests": tests, "sanitizer": found}, verdicts


def passed(result: dict[str, Any]) -> bool:
    """Whether what was run of the tests and sanitizers passed."""
    outcomes = [result.get("tests", {}), *result.get("sanitizer", {}).values()]
    return not any(outcome.get("ok") is False for outcome in outcomes)


def record_proof(result: dict[str, Any], path: Path = proven.TABLE) -> list[str]:
    """Write down what the tests of this run prove on this GPU; the backends it was written for."""
    if not passed(result):
        return []
    about = result["environment"]
    architecture = "sm_" + about["capability"].replace(".", "")
    entry = {"device": about["device"], "date": about["date"][:10], "commit": about["commit"]}
    written = []
    for backend in ("cuda", "triton"):
        module = dispatch.load(backend)
        if isinstance(module, str):
            continue
        names = CUDA_OPS if backend == "cuda" else sorted(n for n in vars(module) if n.endswith(("ward", "remerge_")))
        fresh = entry | {"sources": proven.sources(backend), "ops": list(names)}
        proven.record(backend, architecture, fresh, path)
        written.append(backend)
    return written


def report(row: dict[str, Any]) -> str:
    share = "" if row["share_of_floor"] is None else f"  {row['share_of_floor']:.0%} of floor"
    told = f"WRONG {row['wrong']}" if row["wrong"] else f"{row['ratio_to_eager']:.2f} of eager{share}"
    return f"{row['bench']:62} {row['l2']} {row['system']:9} {row['p50_us']:10.1f} us  {told}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=50, help="measurements of each case")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose names match alone, and no tests")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds after which no further case begins")
    parser.add_argument("--tests-limit", type=float, default=TESTS_LIMIT_S, help="seconds for the tests")
    parser.add_argument(
        "--must", type=Path, nargs="+", metavar="JSON", help="only print what has to be reached, from results"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the tests and cases, and run none")
    chosen = parser.parse_args(arguments)
    cases: list[tuple[Callable[..., Outcome], Any]] = [
        *((run_op, case) for case in ops.cases()), *((run_merge, case) for case in merging.cases()),
        *((run_model, case) for case in models.cases()),
    ]  # fmt: skip
    cases = [(run, case) for run, case in cases if re.search(chosen.only, case.name)]
    if chosen.no_compile:
        cases = [(run, replace(case, compiled=False) if hasattr(case, "compiled") else case) for run, case in cases]
    cases.sort(key=lambda each: must.rank(each[1].name))  # first what has to be reached, should the budget not do
    if chosen.dry_run:
        print("\n".join([*(() if chosen.only else TESTS), *(case.name for _, case in cases)]))
        return 0
    if chosen.must is not None:
        print(must.text([row for file in chosen.must for row in json.loads(file.read_text())["records"]]))
        return 0
    if not torch.cuda.is_available():
        print("gpu_suite: no CUDA GPU is visible here, so nothing was tested or measured", file=sys.stderr)
        return NO_GPU
    if chosen.json is None:
        parser.error("--json FILE is needed")

    begun = time.monotonic()
    result: dict[str, Any] = {"environment": environment(), "records": [], "not_run": [], "absent": {}}
    proof, verdicts = prove([case for _, case in cases], None if chosen.only else chosen.tests_limit)
    result |= proof
    if proof:
        result["proven"] = record_proof(result)
    print(f"checked {len(cases)} cases after {time.monotonic() - begun:.0f} s", flush=True)
    ceilings = measure.ceilings()
    result["ceilings"] = {"copy_bytes_per_s": ceilings.copy, "product_flops": ceilings.product}
    for run, case in cases:
        name = case.name
        if time.monotonic() - begun > chosen.budget:
            result["not_run"].append({"bench": name, "reason": f"the budget of {chosen.budget:.0f} s was spent"})
            continue
        if verdicts[name].raised:
            result["not_run"].append({"bench": name, "reason": verdicts[name].wrong})
            print(f"{name}: {verdicts[name].wrong}", flush=True)
            continue
        try:
            rows, absent = run(case, verdicts[name].wrong, ceilings, chosen.rounds)
        except Exception as error:  # one case that fails must not lose the others' results
            result["not_run"].append({"bench": name, "reason": f"{type(error).__name__}: {error}"})
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        result["records"] += rows
        result["absent"] |= absent
        print("\n".join(report(row) for row in rows), flush=True)
        chosen.json.write_text(json.dumps(result, indent=1))
        torch.cuda.empty_cache()
    result["seconds"] = round(time.monotonic() - begun, 1)
    result["must"] = must.table(result["records"])
    chosen.json.write_text(json.dumps(result, indent=1))
    for name, reason in result["absent"].items():
        print(f"not here: {name} ({reason})")
    print(must.text(result["records"]))
    failed = result["not_run"] or any(row["wrong"] for row in result["records"])
    return 1 if failed or not passed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
