"""Builds the C++ kernels where that can be done and says plainly, once, where it can't.

FASTADAPT_BUILD=0 leaves them out; FASTADAPT_BUILD=1 makes a failed build an error; unset, a failed build falls back to
pure Python. The outcome is written to fastadapt/build_report.json, which `fastadapt info` shows.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
REPORT = "build_report.json"

CPU_SOURCES: list[str] = [
    "csrc/binding.cpp",
    "csrc/merge_binding.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/pack_cache.cpp",
    "csrc/cpu/pool.cpp",
    "csrc/cpu/isa_portable.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_avx512_bf16.cpp",
    "csrc/cpu/isa_amx.cpp",
    "csrc/cpu/isa_amx_emulated.cpp",
    "csrc/cuda/binding.cpp",
    "csrc/cuda/emulated.cpp",
]
CUDA_SOURCES: list[str] = [
    "csrc/cuda/few.cu",
    "csrc/cuda/gpu.cu",
    "csrc/cuda/merge.cu",
]

CPU_FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-g0"]
# No fast math: it flushes denormals, and a merge has to come out the same to the bit in every backend.
CUDA_FLAGS = ["-O3", "-std=c++17", "-lineinfo"]
# Where TORCH_CUDA_ARCH_LIST names none; never those of a GPU that happens to be here.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"

# What the errors below tell the reader to do about it.
REMEDY = "Everything works without them, slower. Build them with: pip install --no-build-isolation -e ."


def wanted() -> str:
    """FASTADAPT_BUILD: "0" never, "1" or fail, "" where it can be done."""
    value = os.environ.get("FASTADAPT_BUILD", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"FASTADAPT_BUILD: got {value!r}; accepted are 0 (pure Python), 1 (build or fail) and unset")
    return value


def compiler() -> str | None:
    """The C++ compiler that torch's build would call, if it is there."""
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "c++") or shutil.which("g++")


def obstacle() -> str | None:
    """Why no kernel can be compiled here; None where nothing stands in the way."""
    if wanted() == "0":
        return "FASTADAPT_BUILD=0"
    if not CPU_SOURCES + CUDA_SOURCES:
        return "this source tree lists no C++ sources"
    missing = [source for source in CPU_SOURCES + CUDA_SOURCES if not (ROOT / source).is_file()]
    if missing:
        return f"source file missing: {missing[0]}"
    if compiler() is None:
        return f"no C++ compiler found ({os.environ.get('CXX') or 'c++, g++'})"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error})"
    return None


def write_report(folder: Path, outcome: str, key: str = "") -> None:
    """{"kernels": "compiled", or why not}, for `fastadapt info`; no library of an earlier build outlives a refusal."""
    folder.mkdir(parents=True, exist_ok=True)
    if outcome != "compiled":
        for stale in folder.glob("_C*.so"):
            stale.unlink()
    (folder / REPORT).write_text(json.dumps({"kernels": outcome, "key": key}) + "\n")


class PurePython(build_py):
    """Writes beside the Python files why there are no kernels."""

    outcome: str = ""

    def run(self) -> None:
        super().run()
        write_report(ROOT / "fastadapt" if self.editable_mode else Path(self.build_lib) / "fastadapt", self.outcome)


@contextlib.contextmanager
def last_lines(count: int) -> Iterator[collections.deque[str]]:
    """Pass everything this process and its children print through, and keep the last lines of it."""
    kept: collections.deque[str] = collections.deque(maxlen=count)
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    read_end, write_end = os.pipe()

    def pump() -> None:
        with os.fdopen(read_end, errors="replace") as lines:
            for line in lines:
                kept.append(line.rstrip("\n"))
                os.write(before[0], line.encode())

    thread = threading.Thread(target=pump)
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)
    thread.start()
    try:
        yield kept
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, number in zip(before, (1, 2), strict=True):
            os.dup2(saved, number)
        thread.join()
        for saved in before:
            os.close(saved)


def build_key() -> str:
    """Of everything that the compiled library depends on: sources, flags, torch, compiler, machine."""
    import torch

    version = subprocess.run([compiler() or "c++", "--version"], capture_output=True, text=True).stdout
    variables = [os.environ.get(name) for name in ("CXX", "CFLAGS", "CXXFLAGS")]
    machine = (torch.__version__, version, platform.machine())
    settings = (CPU_SOURCES, CUDA_SOURCES, CPU_FLAGS, CUDA_FLAGS, variables, machine)
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def up_to_date(key: str) -> bool:
    """Whether the source tree holds the library that this build would make."""
    report = ROOT / "fastadapt" / REPORT
    if not report.is_file() or not (ROOT / "fastadapt" / "_C.so").is_file():
        return False
    return json.loads(report.read_text()) == {"kernels": "compiled", "key": key}


def say(message: str) -> None:
    print(f"fastadapt: {message}", file=sys.stderr, flush=True)


def extension_commands() -> tuple[list, dict]:
    """(extensions, command classes) of a build with kernels."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class BuildKernels(BuildExtension):
        """Compiles the kernels; a failure ends in pure Python unless FASTADAPT_BUILD=1."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, no_python_abi_suffix=True, use_ninja=shutil.which("ninja") is not None, **kwargs)

        def run(self) -> None:
            outcome, in_place, key = "compiled", bool(self.inplace or self.editable_mode), build_key()
            if in_place and up_to_date(key):
                self.extensions = []
                say("the C++ kernels in the source tree are up to date")
                return
            with last_lines(12) as printed:
                try:
                    super().run()
                except Exception as error:
                    # distutils, ninja and torch each raise another kind; all of them mean "not compiled".
                    if wanted() == "1":
                        raise
                    outcome = "the C++ compiler failed"
                    self.extensions = []  # so that nothing later looks for their outputs
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
            if outcome != "compiled":
                say("the C++ kernels could not be compiled; installing pure Python. The compiler's last lines:")
                for line in printed:
                    print(f"    {line}", file=sys.stderr)
                say(REMEDY)
            write_report(ROOT / "fastadapt" if in_place else Path(self.build_lib) / "fastadapt", outcome, key)

    with_cuda = bool(CUDA_SOURCES and torch.version.cuda and CUDA_HOME)
    flags = {"cxx": CPU_FLAGS + (["-DFASTADAPT_CUDA"] if with_cuda else [])}
    if with_cuda:
        flags["nvcc"] = CUDA_FLAGS
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "fastadapt._C",
        CPU_SOURCES + (CUDA_SOURCES if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
    )
    return [extension], {"build_ext": BuildKernels}


def main() -> None:
    reason = obstacle()
    if reason is None:
        extensions, commands = extension_commands()
    else:
        if wanted() == "1":
            raise SystemExit(f"fastadapt: FASTADAPT_BUILD=1, but the C++ kernels cannot be built: {reason}")
        extensions, commands = [], {"build_py": PurePython}
        PurePython.outcome = f"not compiled: {reason}"
        if {"build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
            say(f"installing pure Python, without C++ kernels: {reason}. {REMEDY}")
    setup(ext_modules=extensions, cmdclass=commands)


if __name__ == "__main__":
    main()
