"""Fills the generated blocks of README.md from benchmarks/results/*.json, so that no figure is typed by hand.

    python benchmarks/readme.py           rewrite the blocks, and the plots in docs/
    python benchmarks/readme.py --check   exit 1 where README.md is not what the results say

A block lies between <!-- generated: NAME --> and <!-- end -->.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastadapt.bench import latency, op, plot, train
from fastadapt.bench.report import read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN_VERSIONS = ("torch", "transformers", "adapters", "openvino")
PLOTS = {"latency": "docs/latency.png", "train": "docs/train.png"}

Records = Sequence[dict[str, Any]]


def where(document: dict[str, Any]) -> str:
    """The conditions, in one sentence."""
    e, versions = document["environment"], document["environment"]["versions"]
    parts = [f"{e['device']} ({', '.join(e['cpu_extensions'])})", f"{e['threads']} threads"]
    parts += [f"{name} {versions[name]}" for name in SHOWN_VERSIONS if versions.get(name)]
    return f"{', '.join(parts)}, commit {e['commit']}, {e['date'][:10]}."


def output(document: dict[str, Any], rows: Callable[[Records], str]) -> str:
    """What the command printed."""
    return f"```text\n$ {document['command']}\n{rows(document['records'])}\n```\n\n{where(document)}\n"


def headline(document: dict[str, Any], _: Callable[[Records], str]) -> str:
    """Adapters on against stock without them and against AdapterHub, one row a dtype and batch."""
    records = document["records"]
    lines = [
        "| dtype, batch | stock, no adapters | AdapterHub | fastadapt, adapters on |",
        "| --- | --- | --- | --- |",
    ]
    for r in records:
        if r["system"] != "stock":
            continue
        cells = []
        for system in ("stock", "adapterhub", "fastadapt"):
            same = (row for row in records if row["system"] == system and row["p50_ms"] is not None)
            row = next((row for row in same if (row["dtype"], row["batch"]) == (r["dtype"], r["batch"])), None)
            cells.append("-" if row is None else f"{row['p50_ms']:.1f} ms ({(row['ratio_to_bare'] - 1) * 100:+.0f} %)")
        cells[0] = cells[0].partition(" (")[0]
        lines.append(f"| {r['dtype']} B={r['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, tuple[str, Callable[..., str], Callable[[Records], str]]] = {
    "headline": ("latency", headline, latency.rows),
    "latency": ("latency", output, latency.rows),
    "train": ("train", output, train.rows),
    "op": ("op", output, op.rows),
}


def filled(text: str) -> str:
    """``text`` with every block written anew; a block whose results do not exist yet says so."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise SystemExit(f"README.md: block {name!r}; accepted are {', '.join(BLOCKS)}")
        bench, write, rows = BLOCKS[name]
        path = RESULTS / f"{bench}.json"
        body = write(read_json(path), rows) if path.is_file() else "Not measured yet: `make bench-full`.\n"
        return match[1] + body + match[3]

    return BLOCK.sub(block, text)


def main(check: bool) -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = filled(before)
    if check:
        if before != after:
            print("README.md differs from benchmarks/results: run python benchmarks/readme.py", file=sys.stderr)
            return 1
        return 0
    readme.write_text(after)
    for bench, target in PLOTS.items():
        path = RESULTS / f"{bench}.json"
        if path.is_file():
            document = read_json(path)
            print(plot.draw(document["records"], ROOT / target, plot.caption(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
