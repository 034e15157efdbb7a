"""The committed table of what the CUDA C++ kernels cost on sm_80 and sm_90: complete, without spills, and true."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import cuda_compile

VERSION, ROWS = cuda_compile.read()
BY_KEY = {row.key: row for row in ROWS}
TYPES = ("bfloat16", "float16", "float32")
needs_nvcc = pytest.mark.skipif(
    cuda_compile.nvcc() is None or cuda_compile.cuobjdump() is None, reason="needs nvcc and cuobjdump"
)


def test_the_table_holds_every_kernel():
    want = set(itertools.product(("bottleneck", "add_norm"), TYPES, (1, 2, 4), (80, 90)))
    want |= set(itertools.product(("remerge",), TYPES, (0,), (80, 90)))
    want |= set(itertools.product(("collect",), ("16 bits", "32 bits"), (0,), (80, 90)))
    want |= {("summarise", "-", 0, 80), ("summarise", "-", 0, 90)}
    assert {row.key for row in ROWS} == want and len(ROWS) == len(want)


def test_nothing_spills_and_memory_is_read_in_sixteen_bytes():
    assert cuda_compile.faults(ROWS) == []
    assert all(row.spill_stores == row.spill_loads == row.stack == 0 for row in ROWS)
    for row in ROWS:
        if row.kernel == "remerge":
            assert row.wide_stores >= 4, row.key  # the rows of a tile
        if row.kernel in ("remerge", "bottleneck"):
            assert row.fma > 100 and row.matrix == 0, row.key  # float32 sums by design


def test_a_fault_is_named():
    row = BY_KEY["remerge", "bfloat16", 0, 90]
    for change, said in (({"spill_stores": 4}, "spills"), ({"flushing": 1}, "denormals"), ({"wide_loads": 0}, "16 b")):
        (found,) = cuda_compile.faults([cuda_compile.Usage(**{**vars(row), **change})])
        assert said in found


@needs_nvcc
def test_a_fresh_compilation_gives_the_table():
    """The merge for one architecture, which takes a while; `make cuda-compile` holds all kernels on both."""
    rows = cuda_compile.table((90,), ("merge",))
    assert cuda_compile.faults(rows) == []
    merging = ("remerge", "summarise", "collect")
    assert {row.key for row in rows} == {key for key in BY_KEY if key[0] in merging and key[3] == 90}
    if cuda_compile.nvcc_version() == VERSION:
        assert rows == [BY_KEY[row.key] for row in rows]


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_compile, "nvcc", lambda: None)
    assert cuda_compile.main([]) == 0
    assert "no nvcc here" in capsys.readouterr().out
