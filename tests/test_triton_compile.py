"""The committed tables of what the Triton kernels cost on sm_80 and sm_90: complete, without spills, and true."""

from __future__ import annotations

import hashlib
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
OLDEST = json.loads((ROOT / "benchmarks" / "results" / "triton_compile_oldest.json").read_text())
ROWS, OLDEST_ROWS = ([dict(zip(t["columns"], row, strict=True)) for row in t["rows"]] for t in (TABLE, OLDEST))
EVERY_ROW = [*ROWS, *OLDEST_ROWS]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
KEY = ("op", "kernel", "arch", "dtype", "hidden", "bottleneck", "rows")
# Compiled anew by the test: of every kind of kernel the widest or the one that came closest to spilling.
CRITICAL = [
    ("bottleneck training", 90, "bfloat16", 768, 64, 65536),
    ("bottleneck backward", 90, "float16", 1024, 256, 65536),
    ("bottleneck autocast training", 80, "bfloat16", 768, 256, 65536),
    ("add_norm backward", 80, "float16", 768, 0, 65536),
    ("linear training", 90, "bfloat16", 1024, 0, 65536),
    ("lora square training", 90, "bfloat16", 768, 12, 65536),
    ("lora qkv dropout backward", 80, "bfloat16", 768, 8, 65536),
    ("lora qkv rows training", 90, "float16", 768, 48, 65536),
    ("bottleneck rows training", 90, "bfloat16", 768, 64, 65536),
    ("mix backward", 90, "bfloat16", 768, 64, 65536),
    ("merge", 90, "float16", 768, 8, 65536),
]


def _case_of(sources):
    """Another one whenever what is compiled changes, and only then, so that a commit passes on all days or on none."""
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    sixteen = sorted({tuple(row[n] for n in CASE) for row in ROWS if row["dtype"] != "float32"})
    return sixteen[int.from_bytes(digest.digest()) % len(sixteen)]


CASE = ("op", "arch", "dtype", "hidden", "bottleneck", "rows")
KERNELS = {file.name: file.read_text() for file in (ROOT / "fastadapt" / "backends" / "triton").glob("*.py")}
SUBSET = [*CRITICAL, _case_of(KERNELS)]


def _about(row):
    return " ".join(str(row[name]) for name in KEY)


def test_the_table_holds_every_shape():
    there = {tuple(row[n] for n in KEY) for row in ROWS}
    kernels = [("bottleneck inference", "forward"), ("bottleneck training", "forward")]
    kernels += [("bottleneck backward", kernel) for kernel in ("rows", "weights", "sum")]
    for (op, kernel), arch, dtype, hidden, b in itertools.product(
        kernels, (80, 90), ("bfloat16", "float16", "float32"), (384, 768, 1024), (7, 16, 48, 64, 100, 256)
    ):
        for rows in (65536,) if dtype == "float32" else (512, 65536):
            assert (op, kernel, arch, dtype, hidden, b, rows) in there
        if dtype == "bfloat16":
            autocast = op.replace("inference", "training").replace(" ", " autocast ")
            assert (autocast, kernel, arch, dtype, hidden, b, 65536) in there
    kernels = [("bottleneck rows training", "forward"), ("mix training", "forward"), ("mix backward", "backward")]
    kernels += [("bottleneck rows backward", kernel) for kernel in ("rows", "weights", "slot_sum", "sum")]
    for (op, kernel), arch, dtype, hidden, b in itertools.product(
        kernels, (80, 90), ("bfloat16", "float16", "float32"), (384, 768, 1024), (7, 16, 48, 64, 100, 256)
    ):
        if hidden == 768 or not op.startswith("mix"):  # a mix has no side as long as H
            for rows in (65536,) if dtype == "float32" else (512, 65536):
                assert (op, kernel, arch, dtype, hidden, b, rows) in there
    assert len(there) == len(ROWS)


def test_the_table_holds_every_linear_and_rank():
    there = {tuple(row[n] for n in KEY) for row in ROWS}
    linears, archs, dtypes = ("square", "qkv", "wide", "deep"), (80, 90), ("bfloat16", "float16", "float32")
    ranks = (1, 4, 8, 12, 16, 48, 64, 128)
    for of, arch, dtype, hidden, r in itertools.product(linears, archs, dtypes, (384, 768, 1024), ranks):
        # A small LoRA joins the product where a weight is alone with it and instructions multiply matrices.
        fused = r <= 16 and dtype != "float32"
        kernels = {"training": ["fused"] if fused else ["low", "product"]}
        kernels["backward"] = ["weights a", "weights b", "sum"]
        kernels["backward"] += ["fused"] if fused and of != "qkv" else ["low", "product"]
        for direction, named in kernels.items():
            for kernel in named:
                assert (f"lora {of} {direction}", kernel, arch, dtype, hidden, r, 65536) in there
    for kind, arch, dtype, hidden, r in itertools.product(("dropout", "rows"), archs, dtypes, (384, 768, 1024), ranks):
        for kernel in ("low", "product", "weights a", "weights b"):
            assert (f"lora qkv {kind} backward", kernel, arch, dtype, hidden, r, 65536) in there
    for kernel, arch, dtype, hidden, r in itertools.product(
        ("out", "check", "in"), archs, dtypes, (384, 768, 1024), ranks
    ):
        assert ("merge", kernel, arch, dtype, hidden, r, 65536) in there


def test_the_oldest_supported_triton_has_the_same_table():
    """Both versions compile the same launches."""
    newest, oldest = ({tuple(row[n] for n in KEY) for row in rows} for rows in (ROWS, OLDEST_ROWS))
    assert oldest == newest and len(oldest) == len(OLDEST_ROWS)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"triton>={OLDEST["triton"].removesuffix(".0")}; ' in project
    assert OLDEST["triton"] != TABLE["triton"]


def test_products_in_sixteen_bits_use_matrix_instructions_and_wide_loads():
    products = ("forward", "fused", "low", "product", "weights a", "weights b")
    for row in EVERY_ROW:
        if row["dtype"] != "float32" and row["kernel"] in products and not row["op"].startswith(("add_norm", "mix")):
            assert row["matrix"] > 0, _about(row)
            assert row["wide_loads"] > 0, _about(row)


def test_a_multiprocessor_holds_a_program_of_every_kernel():
    assert [_about(row) for row in EVERY_ROW if row["resident"] < 1] == []


def test_sixteen_bit_kernels_spill_nothing():
    spilled = [_about(r) for r in EVERY_ROW if r["dtype"] != "float32" and (r["spill_stores"] or r["spill_loads"])]
    assert spilled == []


def test_every_kernel_fits_its_shared_memory():
    assert [_about(r) for r in EVERY_ROW if r["shared"] > SHARED_BYTES[r["arch"]]] == []


def test_the_changing_case_is_told_by_the_kernels_alone():
    assert _case_of(dict(reversed(KERNELS.items()))) == SUBSET[-1]
    assert len({_case_of(KERNELS | {"norm.py": f"# {n}"}) for n in range(99)}) > 90


@pytest.fixture(scope="module")
def compiled():
    code = (
        "import dataclasses, json, os\n"
        "from benchmarks import triton_compile as t\n"
        f"cases = [t.Case(*case) for case in {SUBSET!r}]\n"
        "print(json.dumps([dataclasses.asdict(u) for u in t.table(cases, os.cpu_count())]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fresh_compilation_spills_nothing_and_fits(compiled):
    assert {tuple(u[n] for n in CASE) for u in compiled} == set(SUBSET)
    for usage in compiled:
        assert usage["spill_stores"] == usage["spill_loads"] == 0, _about(usage)
        assert usage["shared"] <= SHARED_BYTES[usage["arch"]], _about(usage)


@pytest.mark.skipif(triton.__version__ != TABLE["triton"], reason=f"the table is of Triton {TABLE['triton']}")
def test_a_fresh_compilation_gives_the_table(compiled):
    written = {tuple(row[n] for n in KEY): row for row in ROWS}
    for usage in compiled:
        assert written[tuple(usage[n] for n in KEY)] == usage, _about(usage)


def test_machine_code_without_what_ptx_has_is_an_error():
    code = (
        "from benchmarks import triton_compile as t\n"
        "t._hold_against_machine_code('both', 2, 1, ' HGMMA.64x64x16.F32 R1; LDGSTS.E.BYPASS.LTC128B.128 [R2]')\n"
        "t._hold_against_machine_code('neither', 0, 0, ' FFMA R1; LDG.E.64 R2')\n"
        "for matrix, wide, sass in ((1, 0, 'FFMA R1'), (0, 1, 'LDG.E.64 R2'), (0, 0, 'HMMA.16816.F32 R1')):\n"
        "    try:\n"
        "        t._hold_against_machine_code('a kernel', matrix, wide, sass)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a kernel: 1 matrix instructions in PTX, 0 in the machine code",
        "a kernel: 1 16-byte loads in PTX, 0 in the machine code",
        "a kernel: 0 matrix instructions in PTX, 1 in the machine code",
    ]


# -- the model of bytes and operations ---------------------------------------------------------------------------


def _predicted(cases):
    """{case: [(kernel, seconds, bound, bytes, operations)] on an H200}."""
    code = (
        "import json\n"
        "from benchmarks import roofline as r, triton_compile as t\n"
        "table = {row.key: row for row in t.read()[1]}\n"
        f"cases = [t.Case(*case) for case in {cases!r}]\n"
        "def told(case):\n"
        "    works = [r.work(one, case) for one in t.recorded(case)]\n"
        "    launches = r.predicted(case, r.DEVICES[2], table)\n"
        "    return [(*l, w.bytes, w.operations) for l, w in zip(launches, works, strict=True)]\n"
        "print(json.dumps([told(case) for case in cases]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_model_counts_bytes_and_operations():
    t, h = 65536, 768
    (adapter,), (fused,), product, backward = _predicted([
        ("bottleneck inference", 90, "bfloat16", h, 64, t),
        ("lora square training", 90, "bfloat16", h, 16, t),
        ("lora square training", 90, "bfloat16", h, 48, t),
        ("lora square backward", 90, "bfloat16", h, 16, t),
    ])  # fmt: skip
    kernel, seconds, bound, bytes_, operations = adapter
    assert (kernel, bound) == ("forward", "memory") and operations == 4 * t * h * 64
    assert bytes_ == pytest.approx(2 * 3 * t * h, rel=0.01)  # x, residual, y; the weights are small beside them
    assert seconds == pytest.approx(bytes_ / 4.8e12)

    kernel, seconds, bound, bytes_, operations = fused
    assert (kernel, bound) == ("fused", "arithmetic")
    assert operations == 2 * t * (h * h + 6 * h * 16 + h * 16)  # six column tiles make s
    assert bytes_ == pytest.approx(2 * (2 * t * h + t * 16 + h * h), rel=0.01)
    assert operations / 989.5e12 <= seconds <= 1.1 * operations / 989.5e12  # 3,072 programs are 23.3 waves

    assert [launch[0] for launch in product] == ["low", "product"]
    assert [launch[4] for launch in product] == [2 * t * h * 64, 2 * t * h * (h + 64)]
    names = [launch[0] for launch in backward]
    assert names == ["fused", "weights a", "weights b", "sum"]
    assert [launch[2] for launch in backward[1:]] == ["memory"] * 3


def test_the_written_model_is_that_of_the_tables():
    """Some rows made anew, and every kernel of both tables there; times are positive and grow with the rows."""
    written = json.loads((ROOT / "benchmarks" / "results" / "roofline.json").read_text())
    columns, rows = written["columns"], written["rows"]
    by_key = {tuple(row[:7]): dict(zip(columns, row, strict=True)) for row in rows}
    assert len(by_key) == len(rows)
    triton_rows = {(r["op"], r["kernel"], r["dtype"], r["hidden"], r["bottleneck"], r["rows"]) for r in ROWS}
    assert {key[1:] for key in by_key if key[0] == "triton"} == triton_rows
    cuda = json.loads((ROOT / "benchmarks" / "results" / "cuda_compile.json").read_text())["rows"]
    launched = {row[0] for row in cuda} - {"summarise", "collect"}  # which go over counts, not over weights
    assert {key[1] for key in by_key if key[0] == "cuda"} == launched
    for row in by_key.values():
        times = [row[f"{device} us"] for device in ("A100", "H100", "H200")]
        assert all(time > 0 for time in times) and times[0] >= times[2], row
    cases = [("bottleneck backward", 90, "bfloat16", 768, 64, 65536), ("merge", 90, "bfloat16", 768, 8, 65536)]
    for case, launches in zip(cases, _predicted(cases), strict=True):
        for kernel in {launch[0] for launch in launches}:
            mine = [launch for launch in launches if launch[0] == kernel]
            row = by_key["triton", case[0], kernel, *case[2:]]
            assert row["H200 us"] == pytest.approx(1e6 * sum(launch[1] for launch in mine), rel=1e-3)
            assert row["H200 bound"] == max(mine, key=lambda launch: launch[1])[2]
    few, many = (by_key["cuda", "bottleneck", "bottleneck", "bfloat16", 768, 64, n]["H200 us"] for n in (128, 512))
    assert few < many
    # A merge reads and writes 85 million weights of two bytes and one byte of code each.
    assert by_key["cuda", "remerge", "remerge", "bfloat16", 768, 8, 0]["H200 us"] == pytest.approx(
        12 * 12 * 768**2 * 5 / 4.8e12 * 1e6, rel=0.02
    )


def test_the_model_prints_a_row_for_each_op():
    command = [sys.executable, "-m", "benchmarks.roofline", "--op", "lora", "--rows", "512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "microseconds, bfloat16, H=768, 512 rows"
    kinds = ("square", "qkv", "wide", "deep", "qkv dropout", "qkv rows")
    assert {line[:32].strip() for line in lines[2:]} == {
        f"lora {of} {direction}" for of in kinds for direction in ("training", "backward")
    }
