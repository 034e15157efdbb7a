"""What a benchmark leaves behind: records, a table of at most 100 columns, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastadapt.bench.case import Case
from fastadapt.bench.measure import paired_ratio, percentile
from fastadapt.bench.methods import method
from fastadapt.bench.verify import Verdict
from fastadapt.config.lora import TARGETS
from fastadapt.console import table
from fastadapt.errors import UserError

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
