"""Fills the generated blocks of README.md from benchmarks/results/*.json, so that no figure is typed by hand.

    python benchmarks/readme.py           rewrite the blocks, and the plots in docs/
    python benchmarks/readme.py --check   exit 1 where README.md is not what the results say

A block lies between <!-- generated: NAME --> and <!-- end -->.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastadapt.bench import compare, latency, merge, op, plot, train
from fastadapt.bench.report import read_json
from fastadapt.training import checkpoints

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN_VERSIONS = ("torch", "transformers", "adapters", "peft", "openvino")
PLOTS = {"latency": "docs/latency.png", "train": "docs/train.png", "merge": "docs/merge.png"}
MEMORY_SINCE = "2026-11-30T10"  # PyTorch's profiler is told what the CPU kernels' own pool gives out

Records = Sequence[dict[str, Any]]


def where(document: dict[str, Any]) -> str:
    """The conditions, in one sentence."""
    e = document["environment"]
    return f"{e['device']} ({', '.join(e['cpu_extensions'])}), {e['threads']} threads, {what(document)}"


def what(document: dict[str, Any]) -> str:
    """Versions, commit and date."""
    e, versions = document["environment"], document["environment"]["versions"]
    parts = [f"{name} {versions[name]}" for name in SHOWN_VERSIONS if versions.get(name)]
    return f"{', '.join(parts)}, commit {e['commit']}, {e['date'][:10]}."


def output(document: dict[str, Any], rows: Callable[[Records], str]) -> str:
    """What the command printed, but for memory that was counted wrong."""
    records, note = document["records"], ""
    if document["environment"]["date"] < MEMORY_SINCE:
        records = [_without_memory(r) if _is_ours(r["system"]) else r for r in records]
        if records != document["records"]:
            note = " This run counted the memory of fastadapt's kernels too low: it is left out."
    return f"```text\n$ {document['command']}\n{rows(records)}\n```\n\n{where(document)}{note}\n"


def _is_ours(system: str) -> bool:
    return system.startswith("fastadapt") or system in ("bare", "undropped")


def _without_memory(r: dict[str, Any]) -> dict[str, Any]:
    return {key: None if key in ("peak_bytes", "kept_bytes_per_weight") else value for key, value in r.items()}


def compared(systems: dict[str, str]) -> Callable[..., str]:
    """A block with a row a dtype, batch and size, and a column for each of ``systems``; the first one is the base."""

    def cells_of(r: dict[str, Any], records: Records) -> Iterator[str]:
        for system in systems:
            same = (row for row in records if row["system"] == system and row["p50_ms"] is not None)
            row = next((row for row in same if all(row[key] == r[key] for key in KEYS)), None)
            change = "" if row is None or system == r["system"] else f" ({(row['ratio_to_bare'] - 1) * 100:+.0f} %)"
            yield "-" if row is None else f"{row['p50_ms']:.1f} ms{change}"

    def block(document: dict[str, Any], _: Callable[[Records], str]) -> str:
        records = document["records"]
        bases = [r for r in records if r["system"] == next(iter(systems))]
        several = len({r["rank_or_bottleneck"] for r in bases}) > 1
        lines = [f"| dtype, {'rank, ' if several else ''}batch | {' | '.join(systems.values())} |"]
        lines.append("| --- " * (len(systems) + 1) + "|")
        for r in bases:
            size = f"r={r['rank_or_bottleneck']} " if several else ""
            cell = f"{r['dtype']} {size}B={r['batch']}"
            lines.append(f"| {cell} | {' | '.join(cells_of(r, records))} |")
        return "\n".join(lines) + "\n"

    return block


KEYS = ("dtype", "batch", "rank_or_bottleneck")
HEADLINE = {"stock": "stock, no adapters", "adapterhub": "AdapterHub", "fastadapt": "fastadapt, adapters on"}
LORA = {
    "stock": "stock, no LoRA",
    "peft": "PEFT",
    "peft-merged": "PEFT, merged",
    "fastadapt": "fastadapt",
    "fastadapt-merged": "fastadapt, merged",
}


def headline(document: dict[str, Any], rows: Callable[[Records], str]) -> str:
    """The main figures and their conditions."""
    return f"{compared(HEADLINE)(document, rows)}\n{where(document)}\n"


def headline_of_tiles(document: dict[str, Any], rows: Callable[[Records], str]) -> str:
    """The same in bfloat16 alone: float32 is multiplied in another way on AMX since that run."""
    return headline({**document, "records": [r for r in document["records"] if r["dtype"] == "bf16"]}, rows)


def training(document: dict[str, Any], _: Callable[[Records], str]) -> str:
    """The training table, with how its learning rates were found."""
    sys.path.insert(0, str(ROOT))  # this file is run as a script
    from benchmarks.training import figures
    from benchmarks.training.data import DATASETS
    from benchmarks.training.variants import ADAPTER, VARIANTS

    how, rates = document["settings"], document["rates"]["how"]
    rows = "all rows" if rates["rows"] is None else f"{rates['rows']} rows"
    given = " ".join(f"--set {field}={value}" for field, value in ADAPTER.items())
    names = [variant.label for variant in VARIANTS.values() if variant.size.fields == ADAPTER]
    trained = {cell["variant"] for cell in document["cells"]}
    without = [variant.label for name, variant in VARIANTS.items() if name not in trained]
    missing = f"Timed, not trained yet: {', '.join(without)}. " if without else ""
    used = (
        f"cola, sst2 and stsb are scored on their dev rows, trec on its test rows ({Path(DATASETS['trec'].dev).name}); "
        "the same rows chose the best epoch, the size in the line below and, on "
        f"{' and '.join(rates['tasks'])}, the learning rates, so no score is of rows held back. sst2 is trained on the "
        f"first {DATASETS['sst2'].rows:,} of its 67,349 rows."
    )
    text = (
        f"`{document['command']}`: batch {how['batch']}; the best of an evaluation an epoch. "
        f"Rates: of three or four a method the best on {' and '.join(rates['tasks'])} ({rows}, {rates['epochs']:g} "
        f"epochs, one seed; `--find-rates`). {', '.join(names)}: with `{given}`. {missing}{figures.machines(document)} "
        f"{what(document)}"
    )
    found = figures.differences(document["cells"])
    summary = ""
    if len(found) > 1:
        mean, half = figures.paired(found)
        summary = (
            f"Houlsby with the size chosen per task, less full fine-tuning, mean of the tasks: {mean:+.2f} points ± "
            f"{half:.2f} (95 %, paired over {len(found)} seeds).\n\n"
        )
    return f"{figures.markdown(document)}\n{used}\n\n{summary}{text}\n"


BLOCKS: dict[str, tuple[str, Callable[..., str], Callable[[Records], str]]] = {
    "headline": ("latency", headline, latency.rows),
    "headline-amx": ("amx/latency", headline_of_tiles, latency.rows),
    "latency": ("latency", output, latency.rows),
    "train": ("train", output, train.rows),
    "op": ("op", output, op.rows),
    "lora": ("latency_lora", compared(LORA), latency.rows),
    "train-lora": ("train_lora", output, train.rows),
    "merge": ("merge", output, merge.rows),
    "methods": ("methods", output, compare.rows),
    "training": ("training", training, compare.rows),
}


def filled(text: str) -> str:
    """``text`` with every block written anew; a block whose results do not exist yet says so."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise SystemExit(f"README.md: block {name!r}; accepted are {', '.join(BLOCKS)}")
        bench, write, rows = BLOCKS[name]
        path = RESULTS / f"{bench}.json"
        read, make = read_json, "bench-full"
        if name == "training":
            read, make = checkpoints.read_json, "bench-training DATA=DIR"
        body = write(read(path), rows) if path.is_file() else f"Not measured yet: `make {make}`.\n"
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
