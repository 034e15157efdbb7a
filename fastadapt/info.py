"""What ``fastadapt info`` prints: what is installed, what this machine has, and which backend runs here or why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import torch

from fastadapt import dispatch, proven
from fastadapt.environment import cpu_extensions, cpu_model, versions

# Where each backend has been run, by the tests and suites of this repository; not what it is hoped to do. The H100's
# tests stand in benchmarks/NOTES.md, "GPUs": of some 1,350 those that ended in the time there was.
PROVEN = {
    "reference": "CPU, in every test; it is what the others are compared with. H100, 2026-11-28, once: 1 of 267 tests "
    "failed; changed since, not run there again",
    "cpu": "x86-64 with AMX (bfloat16), AVX512-BF16, AVX-512 and AVX2; portable code forced there. float32 on AMX, in "
    "three bfloat16 parts: emulated tiles only, not yet a processor with AMX",
    "triton": "the interpreter on a CPU; compiled offline for sm_80 and sm_90; H100, 2026-11-28, once: 8 of 426 tests "
    "failed; changed since, not run there again",
    "cuda": "an emulator on a CPU that runs the same code; compiled offline for sm_80 and sm_90; H100, 2026-11-28, "
    "once: none of 404 tests failed",
}


def build_report() -> str:
    """How the C++ kernels came out when this copy was installed."""
    path = Path(__file__).with_name("build_report.json")
    if not path.is_file():
        return "not installed (running from a source tree)"
    return str(json.loads(path.read_text())["kernels"])


def backend_states() -> dict[str, str]:
    """{backend: "loads" or why it doesn't}."""
    states = {}
    for name in dispatch.BACKENDS:
        loaded = dispatch.load(name)
        states[name] = "loads" if isinstance(loaded, ModuleType) else str(loaded)
        if name == "cpu" and isinstance(loaded, ModuleType):
            with loaded.capability() as runs:
                states[name] += f"; runs {runs} of the instruction sets here: {', '.join(loaded.capabilities())}"
    return states


def tuned_launches() -> str:
    """For which GPUs `fastadapt tune` has left a table of launches."""
    if isinstance(dispatch.load("triton"), str):
        return "none, without the Triton backend"
    from fastadapt.backends.triton import launch, tuned

    return f"{', '.join(sorted(launch.TUNED)) or 'none'} ({tuned.path()})"


def text() -> str:
    """The whole of it, as aligned lines."""
    lines: list[tuple[str, str]] = []
    for name, version in versions().items():
        lines.append((name, version or "not installed"))
    lines.append(("C++ kernels", build_report()))
    lines.append(("CPU", f"{cpu_model()}, {os.cpu_count()} cores, {', '.join(cpu_extensions())}"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"))
    else:
        lines.append(("GPU", "none that this torch can use"))
    forced = dispatch.forced()
    lines.append(("tuned launches", tuned_launches()))
    lines.append(("forced backend", forced or "none (FASTADAPT_BACKEND or fa.backend forces one)"))
    for name, state in backend_states().items():
        lines.append((f"backend {name}", state))
        lines.append(("", f"run on: {PROVEN[name]}"))
        if name in proven.table():
            lines.append(("", f"proven on a GPU: {proven.devices(name) or 'none by a whole run of the GPU suite'}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in lines)
