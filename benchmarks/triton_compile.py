"""Compile every Triton kernel for GPUs that need not be here, and table what each costs: registers, spills, memory.

    python -m benchmarks.triton_compile                      # the whole table, written beside the other results
    python -m benchmarks.triton_compile --missing            # what the table doesn't hold yet, put into it
    python -m benchmarks.triton_compile --only bottleneck --hidden 768 --arch 90     # some of it, printed

The launches are recorded, not copied: the ops' own host functions run on meta tensors with the architecture set, and
what they would launch is specialised as Triton's JIT does (pointers and sizes divisible by 16, ones as constants).
Registers and spills are ptxas's report. Instructions are counted in PTX, where a loop's body stands once, and the
machine code (SASS) has to show the same kinds of them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastadapt.backends.triton import bottleneck, bottleneck_rows, launch, linear, lora, merge, mix, norm

TABLE = Path(__file__).parent / "results" / "triton_compile.json"
ARCHITECTURES = {80: launch.SM_80, 90: launch.SM_90}
HIDDEN = (384, 768, 1024)
BOTTLENECKS = (7, 16, 48, 64, 100, 256)
DTYPES = ("bfloat16", "float16", "float32")
ROWS = (512, 65536)  # a heuristic may choose small tiles for few rows
RANKS = (1, 4, 8, 12, 16, 48, 64, 128)
RANK_OF_FEW_ROWS = 8
BATCH_ROWS, SLOTS = 32, 8
AT_ONCE = 60  # cases between two writes of the table
# Of a multiprocessor of compute capability 8.0 and 9.0 (CUDA C++ Programming Guide, "Technical Specifications").
_WARPS, _PROGRAMS, _REGISTERS, _SHARED_BYTES = 64, 32, 65536, {80: 164 * 1024, 90: 228 * 1024}
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int64": "*i64", "int32": "*i32"}


@dataclass(frozen=True)
class Case:
    """One op at one shape; ``bottleneck`` is a LoRA's rank, and 0 where the op has neither.

    A merge is of all linears of twelve layers of this width; ``rows`` has no meaning for it.
    """

    op: str
    arch: int
    dtype: str
    hidden: int
    bottleneck: int
    rows: int


@dataclass(frozen=True)
class Usage:
    """What one kernel of a case takes. Bytes; registers a thread; shared memory a program.

    ``resident`` is how many of its programs a multiprocessor holds at once; ``matrix`` counts the matrix instructions
    in the kernel's code, ``loads`` the loads from global memory and ``wide_loads`` those of them that take 16 bytes.
    """

    op: str
    kernel: str
    arch: int
    dtype: str
    hidden: int
    bottleneck: int
    rows: int
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    resident: int
    matrix: int
    loads: int
    wide_loads: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.op, self.kernel, self.arch, self.dtype, self.hidden, self.bottleneck, self.rows


# -- what would be launched --------------------------------------------------------------------------------------


def _bottleneck(case: Case, forward: bool, training: bool, parameters: str | None = None) -> None:
    """``parameters``: their dtype where it is not the activations' (autocast)."""

    def new(*shape: int, dtype: str = parameters or case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    t, h, b = case.rows, case.hidden, case.bottleneck
    x, residual, dy, s = (new(t, h, dtype=case.dtype) for _ in range(4))
    z = new(t, b, dtype=case.dtype)
    w_down, w_up, vector = new(b, h), new(h, b), new(h)
    p, seed = (0.1, torch.empty((), dtype=torch.int64, device="meta")) if training else (0.0, None)
    if forward:
        bottleneck.forward(x, w_down, new(b), w_up, vector, "gelu", 1.0, None, True, residual, vector, vector, 1e-12,
                           p, seed, training)  # fmt: skip
    else:
        bottleneck.backward(dy, x, z, s, w_down, w_up, "gelu", 1.0, None, True, vector, 1e-12, p, seed, True, True,
                            True, True)  # fmt: skip


def _add_norm(case: Case, forward: bool) -> None:
    dtype = getattr(torch, case.dtype)
    x, y, z = (torch.empty((case.rows, case.hidden), dtype=dtype, device="meta") for _ in range(3))
    vector = torch.empty((case.hidden,), dtype=dtype, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    if forward:
        norm.forward(x, y, vector, vector, 1e-12, 0.1, seed, True)
    else:
        norm.backward(x, y, z, vector, 1e-12, 0.1, seed, True, True, True)


def _linear(case: Case, forward: bool) -> None:
    """The feed-forward network's first layer, four times as wide as it is deep."""
    dtype = getattr(torch, case.dtype)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    t, h = case.rows, case.hidden
    if forward:
        linear.forward(new(t, h), [new(4 * h, h)], [new(4 * h)], "gelu", 0.0, None, True)
    else:
        linear.backward(new(t, 4 * h), new(t, 4 * h), [new(4 * h, h)], "gelu", 0.0, None, True, True)


def _bottleneck_rows(case: Case, forward: bool) -> None:
    """SLOTS slots, the last without an adapter, the others with one of this width each."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")

    t, h, b, own = case.rows, case.hidden, case.bottleneck, SLOTS - 1
    rows = torch.empty(BATCH_ROWS, dtype=torch.int64, device="meta")
    w_down, w_up = [*(new(b, h) for _ in range(own)), None], [*(new(h, b) for _ in range(own)), None]
    norm = [new(h)] * SLOTS
    vectors, how = [None] * SLOTS, (["gelu"] * SLOTS, [1.0] * SLOTS, [True] * SLOTS, [False] * SLOTS, 1e-12,
                                    [0.1] * SLOTS, torch.empty((), dtype=torch.int64, device="meta"))  # fmt: skip
    x, residual, s = (new(t, h) for _ in range(3))
    if forward:
        b_down, b_up = [*(new(b) for _ in range(own)), None], [*(new(h) for _ in range(own)), None]
        bottleneck_rows.forward(x, residual, rows, w_down, b_down, w_up, b_up, vectors, norm, norm, *how, True)
    else:
        bottleneck_rows.backward(x, x, residual, new(t, b), s, rows, w_down, w_up, vectors, norm, *how, True, True,
                                 [True] * SLOTS, [True] * SLOTS)  # fmt: skip


def _mix(case: Case, forward: bool) -> None:
    """As many adapters as there are slots elsewhere."""
    dtype, width = getattr(torch, case.dtype), SLOTS * case.bottleneck
    sigma, t = (torch.empty((case.rows, n), dtype=dtype, device="meta") for n in (width, width + SLOTS))
    shift, seed = torch.empty(case.rows, dtype=dtype, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    if forward:
        mix.forward(sigma, t, shift, SLOTS, 0.1, seed)
    else:
        mix.backward(t, sigma, t, shift, SLOTS, 0.1, seed)


# The linears of a layer as (depth, widths) in hidden sizes.
LINEARS = {"square": (1, (1,)), "qkv": (1, (1, 1, 1)), "wide": (1, (4,)), "deep": (4, (1,))}


def _lora(case: Case, of: str, forward: bool, p: float = 0.0, slots: int = 1, parameters: str | None = None) -> None:
    """Every weight with a LoRA (of every slot); the wide one with GELU behind it."""

    def new(*shape: int, dtype: str = parameters or case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    depth, widths = LINEARS[of]
    k, outputs, t, r = depth * case.hidden, [n * case.hidden for n in widths], case.rows, case.bottleneck
    x, y = new(t, k, dtype=case.dtype), new(t, sum(outputs), dtype=case.dtype)
    weights = [new(n, k) for n in outputs]
    places = [(slot, weight) for slot in range(slots) for weight in range(len(outputs))]
    a, b = [new(r, k) for _ in places], [new(outputs[weight], r) for _, weight in places]
    rows = torch.empty(BATCH_ROWS, dtype=torch.int64, device="meta") if slots > 1 else None
    seeds = torch.empty(len(places), dtype=torch.int64, device="meta") if p else None
    how = ([1.0] * len(places), [weight for _, weight in places], [slot for slot, _ in places], rows,
           [p] * len(places), seeds, "gelu" if of == "wide" else "none", 0.0, None)  # fmt: skip
    if forward:
        lora.forward(x, weights, [new(n) for n in outputs] * slots, a, b, *how, True)
    else:
        s = new(t, r * len(outputs), dtype=case.dtype)
        lora.backward(y, x, new(*y.shape, dtype=case.dtype), s, weights, slots, a, b, *how, True, slots > 1, True)


def _merge(case: Case) -> None:
    """The kernels themselves: their host function reads what it merges."""
    tile = launch.merge_tile(ARCHITECTURES[case.arch])
    tiles = merge_weights(case) // (tile.rows * tile.cols)
    table, places, keys = (torch.empty(2**20, dtype=torch.int64, device="meta") for _ in range(3))
    matrix_of, listed = (torch.empty(2**20, dtype=torch.int32, device="meta") for _ in range(2))
    options = {"NAME": case.dtype, "ROWS": tile.rows, "COLS": tile.cols, "ALIGNED": True, "num_warps": tile.warps}
    merge.out_kernel[(tiles,)](table, matrix_of, **options)
    merge.check_kernel[(tiles,)](table, table, matrix_of, places, places, OUT=False, IN=True, **options)
    merge.in_kernel[(tiles,)](table, matrix_of, places, keys, listed, **options)


def merge_weights(case: Case) -> int:
    """The weights that a merge case goes over: twelve layers of four square linears, a wide and a deep one."""
    return 12 * 12 * case.hidden**2


OPS: dict[str, Callable[[Case], None]] = {
    "bottleneck inference": lambda case: _bottleneck(case, forward=True, training=False),
    "bottleneck training": lambda case: _bottleneck(case, forward=True, training=True),
    "bottleneck backward": lambda case: _bottleneck(case, forward=False, training=True),
    "bottleneck autocast training": lambda case: _bottleneck(case, True, True, "float32"),
    "bottleneck autocast backward": lambda case: _bottleneck(case, False, True, "float32"),
    "bottleneck rows training": lambda case: _bottleneck_rows(case, forward=True),
    "bottleneck rows backward": lambda case: _bottleneck_rows(case, forward=False),
    "mix training": lambda case: _mix(case, forward=True),
    "mix backward": lambda case: _mix(case, forward=False),
    "add_norm training": lambda case: _add_norm(case, forward=True),
    "add_norm backward": lambda case: _add_norm(case, forward=False),
    "linear training": lambda case: _linear(case, forward=True),
    "linear backward": lambda case: _linear(case, forward=False),
    "merge": _merge,
}
for _of, _forward in itertools.product(LINEARS, (True, False)):
    OPS[f"lora {_of} {'training' if _forward else 'backward'}"] = partial(_lora, of=_of, forward=_forward)
for _kind, _options in (("dropout", {"p": 0.1}), ("rows", {"slots": SLOTS}), ("autocast", {"parameters": "float32"})):
    for _forward in (True, False):
        OPS[f"lora qkv {_kind} {'training' if _forward else 'backward'}"] = partial(
            _lora, of="qkv", forward=_forward, **_options
        )


def cases() -> Iterator[Case]:
    """The whole table: few and many rows in 16-bit types, many in float32 and under autocast."""
    for op, arch, dtype, hidden, rows in itertools.product(OPS, ARCHITECTURES, DTYPES, HIDDEN, ROWS):
        if (dtype == "float32" or op == "merge") and rows != ROWS[-1]:
            continue
        if "autocast" in op and (dtype, rows) != ("bfloat16", ROWS[-1]):
            continue
        if op.startswith("mix") and hidden != 768:  # which has no side as long as H
            continue
        widths = (0,)
        if op.startswith(("bottleneck", "mix")):
            widths = BOTTLENECKS
        elif op == "merge":
            widths = RANKS
        elif op.startswith("lora"):
            widths = RANKS if rows == ROWS[-1] else (RANK_OF_FEW_ROWS,)
        for b in widths:
            yield Case(op, arch, dtype, hidden, b, rows)


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, the compiler's options and the programs along each axis."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


def recorded(case: Case) -> list[Launch]:
    """What the op would launch on the case's architecture."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {n: kwargs.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, arguments, options, grid))

    arch = ARCHITECTURES[case.arch]
    with patch.object(JITFunction, "run", record), patch.object(launch, "architecture", lambda x: arch):
        OPS[case.op](case)
    return launches


# -- what it costs -----------------------------------------------------------------------------------------------


def _source(recorded: Launch) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorded.kernel.params):
        name, value = parameter.name, recorded.arguments[parameter.name]
        as_it_is = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not as_it_is):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not as_it_is:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(recorded.kernel, signature, constants, attributes)


def _compiled(one: Launch, arch: int) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said of it, in the very call with which Triton assembles it."""
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(_source(one), target=GPUTarget("cuda", arch, 32), options=one.options)
    return compiled, log.getvalue()


def _reported(log: str) -> tuple[int, int, int]:
    """Registers, spill stores and spill loads in ptxas's report; raises where it gives none."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas reported no resources: {log!r}")
    return int(registers[1]), int(spills[1]), int(spills[2])


def _resident(arch: int, warps: int, registers: int, shared: int) -> int:
    """Programs a multiprocessor holds: threads, registers (allotted in 256 a warp) and shared memory (1 KiB kept)."""
    by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    return min(_WARPS // warps, by_registers, _PROGRAMS, _SHARED_BYTES[arch] // (shared + 1024))


def _instructions(ptx: str) -> tuple[int, int, int]:
    """Matrix instructions, loads from global memory, and those of 16 bytes."""
    matrix = len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", ptx))
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    plain = re.findall(r"ld\.global(?:\.[a-z0-9_:]+)*?(?:\.v([248]))?\.[bfsu](\d+)", ptx)
    bytes_ = [int(size, 0) for size in copies] + [int(n or 1) * int(bits) // 8 for n, bits in plain]
    return matrix, len(bytes_), sum(size >= 16 for size in bytes_)


def _hold_against_machine_code(name: str, matrix: int, wide_loads: int, sass: str) -> None:
    """Raises where ptxas made something else of matrix instructions or 16-byte loads than PTX says."""
    for what, counted, pattern in (
        ("matrix instructions", matrix, r"\bHG?MMA\."),
        ("16-byte loads", wide_loads, r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b"),
    ):
        found = len(re.findall(pattern, sass))
        if bool(counted) != bool(found):
            raise RuntimeError(f"{name}: {counted} {what} in PTX, {found} in the machine code")


def kernel_name(one: Launch) -> str:
    """A launch's name in the table."""
    name = one.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    if "OF_A" in one.arguments:  # two launches of one kernel
        name += " a" if one.arguments["OF_A"] else " b"
    return name


def _measured(case: Case, one: Launch) -> Usage:
    compiled, log = _compiled(one, case.arch)
    registers, stores, loads = _reported(log)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    matrix, global_loads, wide_loads = _instructions(compiled.asm["ptx"])
    _hold_against_machine_code(kernel_name(one), matrix, wide_loads, compiled.asm["sass"])
    return Usage(
        case.op, kernel_name(one), case.arch, case.dtype, case.hidden, case.bottleneck, case.rows, warps,
        compiled.metadata.num_stages, registers, stores, loads, shared,
        _resident(case.arch, warps, registers, shared), matrix, global_loads, wide_loads,
    )  # fmt: skip


def _distinct(found: list[Usage]) -> list[Usage]:
    """One row a kernel: where a case launches it in several forms, the one that takes most."""
    worst: dict[tuple[Any, ...], Usage] = {}
    for usage in sorted(found, key=lambda u: (u.spill_stores + u.spill_loads, u.registers, u.shared, u.loads)):
        worst[usage.key] = usage
    return [worst[key] for key in dict.fromkeys(usage.key for usage in found)]


def measure(case: Case) -> list[Usage]:
    """Compile every kernel of a case."""
    return _distinct([_measured(case, one) for one in recorded(case)])


def _measure_launch(job: tuple[Case, int]) -> Usage:
    case, number = job
    return _measured(case, recorded(case)[number])


def _identity(case: Case, one: Launch) -> str:
    """Equal for launches that compile to the same code."""
    source = _source(one)
    described = (one.kernel.__name__, case.arch, source.signature, source.constants, source.attrs, one.options)
    return repr(described)


def table(chosen: list[Case], processes: int) -> list[Usage]:
    """The rows of all cases; what several of them launch alike is compiled once."""
    identities = {case: [_identity(case, one) for one in recorded(case)] for case in chosen}
    jobs: dict[str, tuple[Case, int]] = {}
    for case, names in identities.items():
        for number, name in enumerate(names):
            jobs.setdefault(name, (case, number))
    measured: dict[str, Usage] = {}
    with ProcessPoolExecutor(processes) as pool:
        for number, (name, usage) in enumerate(zip(jobs, pool.map(_measure_launch, jobs.values()), strict=True), 1):
            measured[name] = usage
            print(f"\r{number}/{len(jobs)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return [
        usage
        for case, names in identities.items()
        for usage in _distinct([replace(measured[name], **asdict(case)) for name in names])
    ]


def read(path: Path = TABLE) -> tuple[str, list[Usage]]:
    """The Triton version of a written table, and its rows."""
    written = json.loads(path.read_text())
    return written["triton"], [Usage(*row) for row in written["rows"]]


def write(rows: list[Usage], path: Path = TABLE) -> None:
    """In the order of :func:`cases`, whatever the order in which the rows were made."""
    order = {case: number for number, case in enumerate(cases())}
    names = [field.name for field in fields(Case)]
    rows = sorted(rows, key=lambda row: order[Case(*(getattr(row, name) for name in names))])
    columns = ", ".join(f'"{name}"' for name in asdict(rows[0]))
    lines = ",\n".join("  " + json.dumps(list(asdict(row).values())) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}",\n "columns": [{columns}],\n "rows": [\n{lines}\n]}}\n')


def missing(wanted: list[Case], known: list[Usage]) -> list[Case]:
    """Cases of which the table lacks a kernel."""
    there = {row.key for row in known}

    def keys(case: Case) -> Iterator[tuple[Any, ...]]:
        for one in recorded(case):
            yield case.op, kernel_name(one), case.arch, case.dtype, case.hidden, case.bottleneck, case.rows

    return [case for case in wanted if not there.issuperset(keys(case))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops whose name starts like this")
    parser.add_argument("--arch", type=int, choices=sorted(ARCHITECTURES))
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--hidden", type=int, choices=HIDDEN)
    parser.add_argument("--bottleneck", type=int, choices=sorted({*BOTTLENECKS, *RANKS}), help="or a LoRA's rank")
    parser.add_argument("--update", action="store_true", help="put the chosen rows into the table")
    parser.add_argument("--missing", action="store_true", help="of the chosen what the table lacks, and put it there")
    parser.add_argument("--table", type=Path, default=TABLE, help="another file than the one of the newest Triton")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    wanted = [
        c
        for c in cases()
        if c.op.startswith(chosen.only)
        and all(
            v is None or v == getattr(c, n)
            for n, v in vars(chosen).items()
            if n in ("arch", "dtype", "hidden", "bottleneck")
        )
    ]
    if chosen.update or chosen.missing:
        version, known = read(chosen.table) if chosen.table.exists() else (triton.__version__, [])
        if version != triton.__version__:
            parser.error(f"the table is of Triton {version}, not {triton.__version__}: write it whole")
        if chosen.missing:
            wanted = missing(wanted, known)
        rows = []
        for start in range(0, len(wanted), AT_ONCE):  # written in between: a whole table takes an hour
            rows += table(wanted[start : start + AT_ONCE], chosen.processes)
            fresh = {row.key: row for row in rows}
            write([row for row in known if row.key not in fresh] + rows, chosen.table)
        print(f"updated {len(rows)} rows of {chosen.table}")
    elif len(wanted) == len(list(cases())):
        rows = table(wanted, chosen.processes)
        write(rows, chosen.table)
        print(f"wrote {chosen.table}")
    else:
        rows = table(wanted, chosen.processes)
        print(*(field.name for field in fields(Usage)))
        for row in rows:
            print(*(str(v).replace(" ", "_") for v in asdict(row).values()))
    spilled = [row for row in rows if row.spill_stores or row.spill_loads]
    large = [row for row in rows if row.shared > ARCHITECTURES[row.arch].shared_bytes]
    for name, wrong in (("spill", spilled), ("do not fit shared memory", large)):
        print(f"{len(wrong)} of {len(rows)} kernels {name}")
        for row in wrong:
            print(" ", row)
    return 1 if large or any(row.dtype != "float32" for row in spilled) else 0


if __name__ == "__main__":
    sys.exit(main())
