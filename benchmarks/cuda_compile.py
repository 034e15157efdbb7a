"""Compile the CUDA C++ kernels with nvcc alone, for GPUs that need not be here, and table what each costs.

    python -m benchmarks.cuda_compile             # compile all and hold them against the committed table
    python -m benchmarks.cuda_compile --update    # write the table
    python -m benchmarks.cuda_compile --link      # also link them with the binding against this torch, and load that

Registers, spills and stack are ptxas's own report; loads and arithmetic are counted in the machine code (SASS). Where
no nvcc is found it says so and exits with 0. cuobjdump is taken from PATH, from beside nvcc, or from Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "results" / "cuda_compile.json"
SOURCES = ("few", "merge", "gpu")
ARCHITECTURES = (80, 90)
FLAGS = ("-O3", "-std=c++17")  # as setup.py has them, but for line numbers
_TYPES = {"Single": "float32", "Brain": "bfloat16", "Half": "float16", "j": "32 bits", "t": "16 bits"}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes. ``rows`` are those of a block where the kernel comes in several, else 0.

    ``wide_loads`` and ``wide_stores`` are global accesses of 16 bytes; ``fma`` and ``matrix`` count FFMA and HMMA,
    ``flushing`` arithmetic that flushes denormals, which would change a merge's bits.
    """

    kernel: str
    dtype: str
    rows: int
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    fma: int
    matrix: int
    flushing: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.kernel, self.dtype, self.rows, self.arch


def nvcc() -> str | None:
    """The compiler: from PATH or CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    beside = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    return beside or shutil.which("nvcc")


def nvcc_version() -> str:
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"nvcc tells no version: {said!r}")
    return found[1]


def cuobjdump() -> str | None:
    """The disassembler."""
    places = [shutil.which("cuobjdump"), shutil.which("cuobjdump", path=str(Path(str(nvcc())).parent))]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        places.append(shutil.which("cuobjdump", path=str(bundled)))
    return next((place for place in places if place), None)


def _named(mangled: str) -> tuple[str, str, int] | None:
    """(kernel, dtype, rows a block) of a mangled name."""
    found = re.search(r"\d+(\w+?)_kernel(?:I(?:NS\w*?_\d+(Single|Brain|Half)E|([jt]))(?:Li(\d+)E)?E)?", mangled)
    if found is None:
        return None
    kernel, store, word, rows = found.groups()
    return (
        re.sub(r"^.*?(remerge|summarise|collect|bottleneck|add_norm)$", r"\1", kernel),
        _TYPES.get(store or word or "", "-"),
        int(rows or 0),
    )


def _reports(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(mangled name, numbers) of each kernel in ptxas's report."""
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        numbers = {
            key: int(found[1]) if (found := re.search(pattern, part)) else 0
            for key, pattern in (
                ("stack", r"(\d+) bytes stack frame"), ("spill_stores", r"(\d+) bytes spill stores"),
                ("spill_loads", r"(\d+) bytes spill loads"), ("registers", r"Used (\d+) registers"),
                ("shared", r"(\d+) bytes smem"),
            )
        }  # fmt: skip
        if not numbers["registers"]:
            raise RuntimeError(f"ptxas reported no registers for {name}: {part!r}")
        yield name, numbers


def _instructions(sass: str) -> dict[str, dict[str, int]]:
    """{mangled name: counts} of a disassembly."""
    found = {}
    for part in sass.split("Function : ")[1:]:
        code = "\n".join(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", part, re.MULTILINE))
        counts = {
            "loads": r"\bLDG\b", "wide_loads": r"\bLDG\.E\S*\.128\b", "stores": r"\bSTG\b",
            "wide_stores": r"\bSTG\.E\S*\.128\b", "fma": r"\bFFMA\b", "matrix": r"\b[HI]G?MMA\b",
            "flushing": r"\bF(?:FMA|ADD|MUL)\.FTZ\b",
        }  # fmt: skip
        found[part.split("\n", 1)[0].strip()] = {n: len(re.findall(p, code)) for n, p in counts.items()}
    return found


def compiled(source: str, arch: int) -> list[Usage]:
    """Compile csrc/cuda/<source>.cu for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [str(nvcc()), *FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", "-I", str(ROOT / "csrc"), "-cubin",
                   str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(cubin)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc could not compile {source}.cu for sm_{arch}:\n{done.stderr}")
        reports = list(_reports(done.stderr))
        if not reports:
            return []  # host code alone
        tool = cuobjdump()
        if tool is None:
            raise RuntimeError("no cuobjdump is here; it comes with CUDA and with the Triton package")
        sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts, rows = _instructions(sass), []
    for name, numbers in reports:
        kernel = _named(name)
        if kernel is None:
            raise RuntimeError(f"{source}.cu holds a kernel of an unknown name: {name}")
        rows.append(Usage(*kernel, arch, **numbers, **counts[name]))
    return rows


def table(architectures: Iterable[int] = ARCHITECTURES, sources: Iterable[str] = SOURCES) -> list[Usage]:
    """Every kernel on every architecture, in one order."""
    jobs = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for found in pool.map(lambda job: compiled(*job), jobs) for row in found]
    return sorted(rows, key=lambda row: row.key)


def linked() -> None:
    """Build the whole extension as setup.py would with CUDA, against whatever torch is here, and load it without a GPU.

    Raises ``RuntimeError`` with the compiler's or the loader's words.
    """
    from torch.utils import cpp_extension

    cuda = Path(os.path.realpath(_real_nvcc())).parents[1]
    library = next((p for p in (cuda / "lib64", cuda / "lib") if p.is_dir()), cuda / "lib64")
    includes = [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    own = ["-I", str(ROOT / "csrc"), *FLAGS[1:], "-O1"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{name}.o")) for name in (*SOURCES, "binding", "emulated")]
        commands = [
            [str(nvcc()), *own, "-gencode", "arch=compute_80,code=sm_80", "-Xcompiler", "-fPIC", "-c",
             str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", target]
            for source, target in zip(SOURCES, objects, strict=False)
        ]  # fmt: skip
        for name in ("binding", "emulated"):
            source = str(ROOT / "csrc" / "cuda" / f"{name}.cpp")
            commands.append(["c++", *own, *includes, "-fPIC", "-w", "-DFASTADAPT_CUDA", "-c", source, "-o",
                             str(Path(folder, f"{name}.o"))])  # fmt: skip
        target, paths = str(Path(folder, "kernels.so")), [*cpp_extension.library_paths(), str(library)]
        commands.append(["c++", "-shared", "-o", target, *objects, "-Wl,--no-undefined",
                         *(f"-L{path}" for path in paths), *(f"-Wl,-rpath,{path}" for path in paths),
                         "-ltorch", "-ltorch_cpu", "-lc10", "-lcudart"])  # fmt: skip
        code = (
            "import torch, fastadapt.ops.schemas\n"
            f"torch.ops.load_library({target!r})\n"
            "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
            "names = fastadapt.ops.schemas.CUDA_OPS\n"
            "assert all(has(f'fastadapt_cuda::{name}', 'CUDA') for name in names), 'no kernel under the key CUDA'\n"
        )
        for command in [*commands, [sys.executable, "-c", code]]:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-4000:]}")


def _real_nvcc() -> str:
    """nvcc itself, where the one on PATH is a script that calls it."""
    said = subprocess.run([str(nvcc()), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r"_HERE_=(\S+)", said)
    return f"{found[1]}/nvcc" if found else str(nvcc())


def read(path: Path = TABLE) -> tuple[str, list[Usage]]:
    """nvcc's version of the written table, and its rows."""
    written = json.loads(path.read_text())
    return written["nvcc"], [Usage(*row) for row in written["rows"]]


def write(rows: list[Usage], path: Path = TABLE) -> None:
    written: dict[str, Any] = {"nvcc": nvcc_version(), "columns": list(asdict(rows[0]))}
    lines = ",\n".join("  " + json.dumps(list(asdict(row).values())) for row in rows)
    path.write_text(json.dumps(written)[:-1] + f',\n "rows": [\n{lines}\n]}}\n')


def faults(rows: list[Usage]) -> list[str]:
    """What no kernel may have, in words."""
    found = []
    for row in rows:
        about = f"{row.kernel} {row.dtype} rows={row.rows} sm_{row.arch}"
        if row.dtype != "float32" and (row.spill_stores or row.spill_loads or row.stack):
            found.append(f"{about} spills {row.spill_stores}/{row.spill_loads} bytes, stack {row.stack}")
        if row.flushing and row.kernel == "remerge":  # elsewhere it is inside square roots and quotients
            found.append(f"{about} flushes denormals")
        if row.kernel in ("remerge", "bottleneck", "add_norm") and not row.wide_loads:
            found.append(f"{about} loads nothing in 16 bytes")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--link", action="store_true", help="also build the extension against this torch and load it")
    chosen = parser.parse_args(arguments)
    if nvcc() is None:
        print("cuda_compile: no nvcc here (PATH, CUDA_HOME), so the CUDA kernels were not compiled")
        return 0
    rows = table()
    print(*asdict(rows[0]))
    for row in rows:
        print(*(str(value).replace(" ", "_") for value in asdict(row).values()))
    wrong = faults(rows)
    if chosen.update:
        write(rows)
        print(f"wrote {TABLE}")
    else:
        version, known = read()
        if version == nvcc_version():
            wrong += [f"not as in the table: {row}" for row in rows if row not in known]
        else:
            print(f"the table is of nvcc {version}, this is {nvcc_version()}: not compared")
    print("\n".join(wrong) or f"{len(rows)} kernels compiled")
    if chosen.link:
        linked()
        print("linked with the binding against this torch, and loaded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
