"""What the kernels would take on GPUs that need not be here, from their bytes, their operations and the tables.

    python -m benchmarks.roofline                              # training and inference at BERT-base's width
    python -m benchmarks.roofline --op "lora qkv" --hidden 1024 --rows 512
    python -m benchmarks.roofline --json benchmarks/results/roofline.json       # every kernel of both tables

A kernel takes the longer of its bytes at the memory's published bandwidth and its operations at the published peak,
the latter stretched to whole waves of programs: a device runs processors x resident of them at once, ``resident`` from
the tables of `benchmarks/triton_compile.py` and `benchmarks/cuda_compile.py`. Bytes are the tensors of a launch, each
once; operations are those of the padded products, as the tiles execute them. Not in it: launches, elementwise
arithmetic (GELU, Philox), tensors that still lie in L2, products left to the vendor's library. So it is a bound to hold
a measurement against, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_compile, triton_compile
from benchmarks.triton_compile import Case, Launch, Usage


@dataclass(frozen=True)
class Device:
    """Bytes a second; dense operations a second with float32 sums (float32: without tensor cores)."""

    name: str
    arch: int
    processors: int
    bandwidth: float
    sixteen_bit: float
    float32: float

    def peak(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.sixteen_bit


# Datasheets "NVIDIA A100 Tensor Core GPU" (80 GB SXM), "NVIDIA H100 Tensor Core GPU" (SXM) and "NVIDIA H200 Tensor Core
# GPU" (SXM), whose 16-bit peaks with sparsity are twice the dense ones here; multiprocessors from NVIDIA's whitepapers
# on the Ampere and the Hopper architecture.
DEVICES = (
    Device("A100", 80, 108, 2.039e12, 312e12, 19.5e12),
    Device("H100", 90, 132, 3.35e12, 989.5e12, 67e12),
    Device("H200", 90, 132, 4.8e12, 989.5e12, 67e12),
)


@dataclass(frozen=True)
class Work:
    """What one launch moves and computes, on how many programs."""

    bytes: int
    operations: int
    programs: int


def work(one: Launch, case: Case) -> Work:
    """Of a recorded launch: every tensor once (of a linear's output only the columns it writes), products as padded."""
    if case.op == "merge":
        writes = one.kernel.__name__ != "check_kernel"
        return replace(merging(case, writes), programs=math.prod(one.grid))
    given, moved = one.arguments, 0
    tensors = {id(x): (name, x) for name, x in given.items() if isinstance(x, torch.Tensor)}
    for name, x in tensors.values():
        elements = x.shape[0] * given["N"] if name in ("y", "z") and "K" in given and x.dim() == 2 else x.numel()
        moved += elements * x.element_size()
    return Work(moved, _operations(one.kernel.__name__, given, case.bottleneck), math.prod(one.grid))


def merging(case: Case, writes: bool = True) -> Work:
    """One pass over the weights: each read, and written with its code; the factors are small beside them."""
    weights, size = triton_compile.merge_weights(case), torch.finfo(getattr(torch, case.dtype)).bits // 8
    factors = 4 * case.bottleneck * 12 * 18 * case.hidden
    return Work(weights * ((2 * size + 1) if writes else size) + factors, 2 * weights * case.bottleneck, 1)


def _operations(kernel: str, given: dict[str, Any], rank: int) -> int:
    if "ADAPTERS" in given:  # no product
        return 0
    if kernel in ("forward_kernel", "rows_kernel") and "B" in given:  # down and up; da and dx
        rows = (given["x"] if kernel == "forward_kernel" else given["dy"]).shape[0]
        return 4 * rows * given["H"] * given["WIDTH"]
    if kernel == "weights_kernel" and "WIDEST" in given:  # a row is of one slot
        return 4 * given["x"].shape[0] * given["H"] * given["BLOCKS"] * given["WIDTH"]
    if kernel == "weights_kernel" and "B" in given:
        width = -(-given["B"] // given["WIDTH"]) * given["WIDTH"]
        return (4 if given["NEED_DOWN"] else 2) * given["x"].shape[0] * given["H"] * width
    if kernel == "forward_kernel" and "N" in given:
        return 2 * given["x"].shape[0] * given["N"] * given["K"]
    if kernel == "fused_kernel":  # every column tile makes s anew
        rows, n, k, width = given["source"].shape[0], given["N"], given["K"], given["RANK"]
        return 2 * rows * (n * k + -(-n // given["COLS"]) * k * width + n * width)
    if kernel not in ("low_kernel", "product_kernel", "weights_kernel"):
        return 0
    # A row goes through all LoRAs of its slot; in y's product through those of one weight.
    through = -(-rank // given["RANK"]) * given["RANK"] * (given["low"].shape[1] // rank)
    if kernel == "product_kernel":
        through = through // given["WEIGHTS"] if given["FORWARD"] else through
        return 2 * given["source"].shape[0] * given["N"] * (given["K"] + through)
    wide = given["source" if kernel == "low_kernel" else "wide"]
    return 2 * wide.shape[0] * (given["COLUMNS"] or wide.shape[1]) * through


def seconds(device: Device, dtype: str, what: Work, resident: int) -> tuple[float, str]:
    """(the time of a launch, what bounds it). ``dtype``: in which it multiplies."""
    at_once = device.processors * resident
    waves = what.programs / at_once
    arithmetic = what.operations / device.peak(dtype) * (math.ceil(waves) / waves)
    memory = what.bytes / device.bandwidth
    return max((memory, "memory"), (arithmetic, "arithmetic"))


def predicted(case: Case, device: Device, table: dict[tuple, Usage]) -> list[tuple[str, float, str]]:
    """(kernel, seconds, bound) of every launch of a case."""
    found = []
    for one in triton_compile.recorded(case):
        key = (case.op, triton_compile.kernel_name(one), case.arch, case.dtype, case.hidden, case.bottleneck, case.rows)
        multiplied = "float32" if case.op == "merge" else case.dtype
        time, bound = seconds(device, multiplied, work(one, case), table[key].resident)
        found.append((key[1], time, bound))
    return found


# -- the CUDA C++ kernels ----------------------------------------------------------------------------------------

FEW_ROWS = (1, 16, 128, 512)


@dataclass(frozen=True)
class FewCase:
    """A launch of csrc/cuda/few.h (``bottleneck`` 0: add + LayerNorm) or, with no rows, of its merge."""

    op: str
    dtype: str
    hidden: int
    bottleneck: int
    rows: int


def few_cases() -> Iterator[FewCase]:
    for dtype in triton_compile.DTYPES:
        for hidden in triton_compile.HIDDEN:
            for rows in FEW_ROWS:
                yield FewCase("add_norm", dtype, hidden, 0, rows)
                for b in triton_compile.BOTTLENECKS:
                    yield FewCase("bottleneck", dtype, hidden, b, rows)
            for rank in triton_compile.RANKS:
                yield FewCase("remerge", dtype, hidden, rank, 0)


def predicted_cuda(case: FewCase, device: Device, table: dict[tuple, cuda_compile.Usage]) -> tuple[float, str]:
    """(seconds, bound) of the one launch; sums are in float32 whatever the type."""
    t, h, b, size = case.rows, case.hidden, case.bottleneck, torch.finfo(getattr(torch, case.dtype)).bits // 8
    if case.op == "remerge":
        usage, threads, shared = table[case.op, case.dtype, 0, device.arch], 96, 0
        what = merging(Case("merge", device.arch, case.dtype, h, b, 0))
        weights = triton_compile.merge_weights(Case("merge", device.arch, case.dtype, h, b, 0))
        what = replace(what, programs=weights // (4 * threads * 16 // size))
    else:
        a_block = 1 if t <= device.processors else 2 if t <= 2 * device.processors else 4
        usage, threads = table[case.op, case.dtype, a_block, device.arch], 256
        shared = 4 * a_block * (-(-h // 256) * 256 + -(-b // 64) * 64) + 256 * 144  # as csrc/cuda/kernels.h has it
        # Blocks that run at once share one reading of the matrices out of memory, the others find them in L2.
        what = Work(3 * t * h * size + 2 * b * h * size, 4 * t * h * b, -(-t // a_block))
    resident = triton_compile._resident(device.arch, threads // 32, usage.registers, usage.shared + shared)
    return seconds(device, "float32", what, resident)


def _figure(time: float) -> float:
    """Microseconds, four digits of them."""
    return float(f"{1e6 * time:.4g}")


def _together(launches: list[tuple[str, float, str]]) -> dict[str, tuple[float, str]]:
    """{kernel: (seconds of all its launches, what bounds the longest)}."""
    found: dict[str, tuple[float, str]] = {}
    for kernel, time, bound in sorted(launches, key=lambda launch: launch[1]):
        found[kernel] = (found.get(kernel, (0.0, ""))[0] + time, bound)
    return {kernel: found[kernel] for kernel, _, _ in launches}


def whole() -> list[list[Any]]:
    """Every kernel of both tables: [backend, op, kernel, dtype, hidden, bottleneck, rows, (µs, bound) a device ...]."""
    table = {row.key: row for row in triton_compile.read()[1]}
    rows = []
    for case in triton_compile.cases():
        if case.arch != DEVICES[0].arch:
            continue
        each = [_together(predicted(replace(case, arch=device.arch), device, table)) for device in DEVICES]
        for kernel in each[0]:
            told = [value for of in each for value in (_figure(of[kernel][0]), of[kernel][1])]
            rows.append(["triton", case.op, kernel, case.dtype, case.hidden, case.bottleneck, case.rows, *told])
    cuda = {row.key: row for row in cuda_compile.read()[1]}
    for few in few_cases():
        each = [predicted_cuda(few, device, cuda) for device in DEVICES]
        told = [value for time, bound in each for value in (_figure(time), bound)]
        rows.append(["cuda", few.op, few.op, few.dtype, few.hidden, few.bottleneck, few.rows, *told])
    return rows


def write(path: Path) -> None:
    columns = ["backend", "op", "kernel", "dtype", "hidden", "bottleneck", "rows"]
    columns += [f"{device.name} {what}" for device in DEVICES for what in ("us", "bound")]
    lines = ",\n".join("  " + json.dumps(row) for row in whole())
    path.write_text(f'{{"columns": {json.dumps(columns)},\n "rows": [\n{lines}\n]}}\n')


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="", help="ops whose name starts like this")
    parser.add_argument("--dtype", default="bfloat16", choices=triton_compile.DTYPES)
    parser.add_argument("--hidden", type=int, default=768, choices=triton_compile.HIDDEN)
    parser.add_argument("--rows", type=int, default=triton_compile.ROWS[-1], choices=triton_compile.ROWS)
    parser.add_argument("--json", type=Path, help="write every kernel's time there instead of printing some")
    chosen = parser.parse_args(arguments)
    if chosen.json is not None:
        write(chosen.json)
        print(f"wrote {chosen.json}")
        return 0
    _, rows = triton_compile.read()
    table = {row.key: row for row in rows}
    print(f"microseconds, {chosen.dtype}, H={chosen.hidden}, {chosen.rows} rows")
    print(f"{'op':32} {'b, r':>5}  " + "  ".join(f"{device.name:>9}" for device in DEVICES) + "  kernels (on the last)")
    for case in triton_compile.cases():
        if (case.dtype, case.hidden, case.rows) != (chosen.dtype, chosen.hidden, chosen.rows) or case.arch != 80:
            continue
        if not case.op.startswith(chosen.op):
            continue
        times, told = [], ""
        for device in DEVICES:
            on_device = Case(case.op, device.arch, case.dtype, case.hidden, case.bottleneck, case.rows)
            launches = predicted(on_device, device, table)
            times.append(1e6 * sum(time for _, time, _ in launches))
            told = ", ".join(f"{kernel} {1e6 * time:.1f} {bound}" for kernel, time, bound in launches)
        print(f"{case.op:32} {case.bottleneck:5}  " + "  ".join(f"{time:9.1f}" for time in times) + f"  {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
