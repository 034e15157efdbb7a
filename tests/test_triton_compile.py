"""The committed table of what the Triton kernels cost on sm_80 and sm_90: complete, without spills, and true."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
TABLE = json.loads((ROOT / "benchmarks" / "results" / "triton_compile.json").read_text())
ROWS = [dict(zip(TABLE["columns"], row, strict=True)) for row in TABLE["rows"]]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
KEY = ("op", "kernel", "arch", "dtype", "hidden", "bottleneck", "rows")
# Compiled anew by the test: one bottleneck a dtype and architecture, and an op without one.
SUBSET = [
    ("bottleneck training", 90, "bfloat16", 768, 64, 65536),
    ("bottleneck backward", 90, "float16", 1024, 256, 65536),
    ("bottleneck backward", 80, "bfloat16", 768, 48, 512),
    ("bottleneck autocast training", 80, "bfloat16", 768, 256, 65536),
    ("add_norm backward", 80, "float16", 768, 0, 65536),
    ("linear training", 90, "bfloat16", 1024, 0, 65536),
]


def _about(row):
    return " ".join(str(row[name]) for name in KEY)


def test_the_table_holds_every_shape():
    there = {tuple(row[n] for n in KEY) for row in ROWS}
    kernels = [("bottleneck inference", "forward"), ("bottleneck training", "forward")]
    kernels += [("bottleneck backward", kernel) for kernel in ("rows", "weights", "sum")]
    for (op, kernel), arch, dtype, hidden, b in itertools.product(
        kernels, (80, 90), ("bfloat16", "float16", "float32"), (384, 768, 1024), (16, 48, 64, 100, 256)
    ):
        for rows in (65536,) if dtype == "float32" else (512, 65536):
            assert (op, kernel, arch, dtype, hidden, b, rows) in there
        if dtype == "bfloat16":
            autocast = op.replace("inference", "training").replace(" ", " autocast ")
            assert (autocast, kernel, arch, dtype, hidden, b, 65536) in there
    assert len(there) == len(ROWS)


def test_sixteen_bit_kernels_spill_nothing():
    spilled = [_about(r) for r in ROWS if r["dtype"] != "float32" and (r["spill_stores"] or r["spill_loads"])]
    assert spilled == []


def test_every_kernel_fits_its_shared_memory():
    assert [_about(r) for r in ROWS if r["shared"] > SHARED_BYTES[r["arch"]]] == []


@pytest.fixture(scope="module")
def compiled():
    code = (
        "import dataclasses, json\n"
        "from benchmarks import triton_compile as t\n"
        f"cases = [t.Case(*case) for case in {SUBSET!r}]\n"
        "print(json.dumps([dataclasses.asdict(u) for case in cases for u in t.measure(case)]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fresh_compilation_spills_nothing_and_fits(compiled):
    assert {u["op"] for u in compiled} == {case[0] for case in SUBSET}
    for usage in compiled:
        assert usage["spill_stores"] == usage["spill_loads"] == 0, _about(usage)
        assert usage["shared"] <= SHARED_BYTES[usage["arch"]], _about(usage)


@pytest.mark.skipif(triton.__version__ != TABLE["triton"], reason=f"the table is of Triton {TABLE['triton']}")
def test_a_fresh_compilation_gives_the_table(compiled):
    written = {tuple(row[n] for n in KEY): row for row in ROWS}
    for usage in compiled:
        assert written[tuple(usage[n] for n in KEY)] == usage, _about(usage)
