"""What a benchmark leaves behind: records, a table of at most 100 columns, JSON, and the environment it ran in."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import fastadapt
from fastadapt.bench.case import TARGETS, Case, UserError
from fastadapt.bench.measure import paired_ratio, percentile
from fastadapt.bench.methods import method
from fastadapt.bench.verify import Verdict

# The columns every row has, in the order of the public contract; a row may have more.
FIELDS = (
    "bench", "model", "method", "system", "dtype", "device", "batch", "seq", "rank_or_bottleneck", "p20_ms", "p50_ms",
    "p80_ms", "ratio_to_bare", "peak_bytes",
)  # fmt: skip

Record = dict[str, Any]


def record(
    bench: str,
    case: Case,
    system: str,
    label: str,
    *,
    verdict: Verdict | None,
    samples: Sequence[float] | None,
    base: Sequence[float] | None,
    peak_bytes: int | None = None,
    **more: Any,
) -> Record:
    """One row. ``samples`` are milliseconds a round; a wrong system has none, so it has no time and no ratio."""
    how = method(case.method)
    times: dict[str, float | None] = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "ratio_to_bare"))
    if samples:
        times = {f"p{round(share * 100)}_ms": percentile(samples, share) for share in (0.2, 0.5, 0.8)}
        times["ratio_to_bare"] = paired_ratio(samples, base) if base else None
    return {
        "bench": bench,
        "model": case.model,
        "method": case.method,
        "system": system,
        "dtype": case.dtype,
        "device": case.device,
        "batch": case.batch,
        "seq": case.seq,
        "rank_or_bottleneck": how.size(case),
        **times,
        "peak_bytes": peak_bytes,
        "label": label,
        "layers": case.layers,
        "correct": None if verdict is None else verdict.correct,
        "error": None if verdict is None else verdict.error,
        "tolerance": None if verdict is None else verdict.tolerance,
        "samples_ms": None if not samples else [round(ms, 5) for ms in samples],
        **how.extra(case),
        **more,
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what the benchmarks touch; None where it is absent."""
    found: dict[str, str | None] = {"fastadapt": fastadapt.__version__}
    for name in ("torch", "transformers", "adapters", "peft", "triton", "openvino", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_extensions() -> list[str]:
    """What decides about kernels here: those of AVX2, AVX-512, AVX512-BF16 and AMX that this processor has."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is None:  # before torch 2.12
        return [torch.backends.cpu.get_cpu_capability().lower()]
    found = query()
    return [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(name)]


def commit() -> str | None:
    """The source tree's commit, with ``-dirty`` where it has changes; None outside a checkout."""
    root = Path(fastadapt.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str) -> dict[str, Any]:
    """Everything a figure depends on beside the code."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cpu_extensions": cpu_extensions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: str | Path, document: dict[str, Any]) -> Path:
    """``{"environment": ..., "command": ..., "records": [...]}``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return target


def read_json(path: str | Path) -> dict[str, Any]:
    """A file of :func:`write_json`.

    Raises:
        UserError: where it can't be read or isn't one.
    """
    try:
        document = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    rows = document.get("records") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: holds no records; accepted is what `fastadapt bench ... --json` writes")
    missing = [field for field in FIELDS if any(field not in row for row in rows)]
    if missing:
        raise UserError(f"{path}: its records lack {', '.join(missing)}")
    return document


def megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str] | None]) -> str:
    """Aligned text, the first column to the left and the others to the right; a None row is a rule."""
    filled = [row for row in rows if row is not None]
    widths = [max(len(line[i]) for line in (headers, *filled)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(headers), rule, *(rule if row is None else line(row) for row in rows)])


def cells(records: Sequence[Record]) -> Callable[[Record], str]:
    """What tells the cells of ``records`` apart, as the start of a table's row: dtype, batch and what else varies."""

    def targets(r: Record) -> str:
        return "+".join(r["targets"]) if 0 < len(r.get("targets", ())) < len(TARGETS) else "all"

    several = {"method": lambda r: r["method"], "size": lambda r: f"{r['rank_or_bottleneck']:<3}", "targets": targets}
    shown = [text for text in several.values() if len({text(r) for r in records}) > 1]
    return lambda r: " ".join([r["dtype"], *(text(r) for text in shown), f"B={r['batch']:<3}"])


def system_name(r: Record) -> str:
    """What a table calls the system of ``r``: fastadapt with the method that it ran."""
    return r["label"] if r["system"] != "fastadapt" else f"{r['label']}, {method(r['method']).describe(r)}"


def times(r: Record, digits: int) -> list[str]:
    """p20, p50 and p80."""
    return [f"{r[f'p{p}_ms']:.{digits}f}" for p in (20, 50, 80)]


def cell_table(
    headers: Sequence[str],
    records: Sequence[Record],
    *,
    cell: Callable[[Record], str],
    name: Callable[[Record], str],
    figures: Callable[[Record], list[str]],
) -> str:
    """A row a record, a rule between cells; a wrong system shows its error in place of its times."""
    lines: list[list[str] | None] = []
    before = None
    for r in records:
        here = cell(r)
        if before not in (None, here):
            lines.append(None)
        before = here
        shown = figures(r) if r["correct"] is not False else ["WRONG", f"{r['error']:.0e}", f">{r['tolerance']:.0e}"]
        lines.append([f"{here} {name(r)}", *shown, *["-"] * (len(headers) - 1 - len(shown))])
    return table(headers, lines)


class Progress:
    """Where a run stands, on stderr: one line that rewrites itself on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.started = time.perf_counter()
        self._width = 0

    def step(self, text: str) -> None:
        """A stage begins; stays on the screen."""
        self._show(f"[{time.perf_counter() - self.started:6.1f} s] {text}", end="\n")

    def tick(self, text: str) -> None:
        """Something moves within a stage; terminals only."""
        if self.live:
            self._show(f"           {text}", end="\r")

    def _show(self, text: str, end: str) -> None:
        self.stream.write(text.ljust(self._width) + end)
        self.stream.flush()
        self._width = len(text) if end == "\r" else 0
