"""What the Triton kernels would take on GPUs that need not be here, from their bytes, their operations and the table.

    python -m benchmarks.roofline                              # training and inference at BERT-base's width
    python -m benchmarks.roofline --op "lora qkv" --hidden 1024 --rows 512

A kernel takes the longer of its bytes at the memory's published bandwidth and its operations at the published peak,
the latter stretched to whole waves of programs: a device runs processors x resident of them at once, ``resident`` from
the table of `benchmarks/triton_compile.py`. Bytes are the tensors of a launch, each once; operations are those of the
padded products, as the tiles execute them. Not in it: launches, elementwise arithmetic (GELU, Philox), tensors that
still lie in L2, products left to the vendor's library. So it is a bound to hold a measurement against, and no
measurement.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import triton_compile
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


def work(one: Launch, rank: int) -> Work:
    """Of a recorded launch: every tensor once (of a linear's output only the columns it writes), products as padded.

    ``rank`` is every LoRA's; without meaning for other kernels.
    """
    given, moved = one.arguments, 0
    tensors = {id(x): (name, x) for name, x in given.items() if isinstance(x, torch.Tensor)}
    for name, x in tensors.values():
        elements = x.shape[0] * given["N"] if name in ("y", "z") and "K" in given and x.dim() == 2 else x.numel()
        moved += elements * x.element_size()
    return Work(moved, _operations(one.kernel.__name__, given, rank), math.prod(one.grid))


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
    """(the time of a launch, what bounds it)."""
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
        time, bound = seconds(device, case.dtype, work(one, case.bottleneck), table[key].resident)
        found.append((key[1], time, bound))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="", help="ops whose name starts like this")
    parser.add_argument("--dtype", default="bfloat16", choices=triton_compile.DTYPES)
    parser.add_argument("--hidden", type=int, default=768, choices=triton_compile.HIDDEN)
    parser.add_argument("--rows", type=int, default=triton_compile.ROWS[-1], choices=triton_compile.ROWS)
    chosen = parser.parse_args(arguments)
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
