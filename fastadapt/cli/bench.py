"""``fastadapt bench`` and ``fastadapt plot``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadapt.bench.case import DTYPES, Case
from fastadapt.bench.methods import METHODS
from fastadapt.cli.arguments import (
    Parser,
    check_device,
    check_outputs,
    check_plot,
    positive,
    probability,
    seconds,
    targets_of,
)
from fastadapt.config.lora import TARGETS
from fastadapt.console import Progress
from fastadapt.environment import environment
from fastadapt.errors import UserError

if TYPE_CHECKING:
    from fastadapt.bench.report import Record

MERGE_LAYERS = 4  # of the forwards of `bench merge`


def add_parsers(commands: Any) -> None:
    """``bench`` and ``plot``."""
    bench = commands.add_parser("bench", help="measure against stock models and other libraries")
    jobs = bench.add_subparsers(dest="job", required=True, metavar="JOB", parser_class=Parser)
    _latency_parser(jobs)
    _train_parser(jobs)
    _merge_parser(jobs)
    _methods_parser(jobs)
    _op_parser(jobs)

    plot = commands.add_parser(
        "plot",
        help="draw the records of a JSON file",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  fastadapt plot results.json --out docs/latency.png",
    )
    plot.add_argument("file", metavar="FILE.json", help="what `fastadapt bench ... --json FILE.json` wrote")
    plot.add_argument("--out", metavar="FILE", help="png, svg or pdf (default: FILE.png)")
    plot.set_defaults(run=_plot)


def _shared_options(parser: argparse.ArgumentParser, *, batch: Sequence[int], budget: float) -> None:
    sizes = " ".join(map(str, batch))
    parser.add_argument("--batch", type=positive, nargs="+", default=list(batch), metavar="N", help=f"({sizes})")
    parser.add_argument("--seq", type=positive, default=128, metavar="N", help="tokens a row, no padding (128)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=list(DTYPES), help="(fp32 bf16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of every system (all cores)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    parser.add_argument(
        "--budget", type=seconds, default=budget, metavar="S", help=f"seconds of timing a cell ({budget:g})"
    )
    parser.add_argument("--json", metavar="FILE", help="write every record, with its samples and the environment")
    parser.add_argument("--plot", metavar="FILE", help="draw the result: png, svg or pdf")


def _model_options(parser: argparse.ArgumentParser, *, layers: str = "all") -> None:
    parser.add_argument(
        "--model",
        default="bert-base",
        metavar="MODEL",
        help="bert-base or bert-large (random weights), an id, or a folder with weights and a tokenizer (bert-base)",
    )
    parser.add_argument("--layers", type=positive, metavar="N", help=f"keep the first N layers ({layers})")


def _method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="houlsby", metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--bottleneck", type=positive, default=64, metavar="B", help="adapter width (64)")
    parser.add_argument(
        "--rank", type=positive, nargs="+", default=[8], metavar="R", help="of a LoRA; several are cells (8)"
    )
    parser.add_argument(
        "--targets",
        type=targets_of,
        default=TARGETS,
        metavar="T",
        help=f"of a LoRA: all, or some of {','.join(TARGETS)}",
    )

    parser.add_argument("--length", type=positive, default=30, metavar="N", help="of a prefix (30)")
    parser.add_argument("--adapters", type=positive, default=8, metavar="N", help="that a fusion mixes (8)")
    parser.add_argument("--drop", type=positive, default=5, metavar="N", help="first layers of AdapterDrop (5)")


def _peers_option(parser: argparse.ArgumentParser, job: str, default: str) -> None:
    from fastadapt.bench.peers import PEERS

    always = ("stock", "full", "bare", "fastadapt", "fastadapt-merged", "fastadapt-swapped", "undropped")
    names = ", ".join(name for name, peer in PEERS.items() if getattr(peer, job) and name not in always)
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"of {names} ({default}, as installed)")


def _latency_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "latency",
        help="a forward pass, with adapters and without",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times a forward pass of the encoder. Stock Hugging Face (eager, SDPA, no adapters), fastadapt\n"
        "without adapters and fastadapt with them always run, LoRA also merged; --peers chooses the others. Each\n"
        "output is checked first; a wrong one is not timed.",
        epilog="""examples:
  fastadapt bench latency --layers 4
  fastadapt bench latency --layers 4 --method lora --rank 8 64 --peers peft
  fastadapt bench latency --method lora --targets query,value --batch 8
  fastadapt bench latency --batch 1 --dtype bf16 --peers compile openvino
  fastadapt bench latency --layers 4 --tasks 8 --batch 32
  fastadapt bench latency --method adapterdrop --drop 5 --tasks 8 --same-text --batch 1
  fastadapt bench latency --model ./my-bert --json out.json --plot out.png""",
    )
    _model_options(parser)
    _method_options(parser)
    _peers_option(parser, "inference", "what the method is usually run with")
    parser.add_argument(
        "--compile-mode", choices=("default", "max-autotune"), default="default", help="of torch.compile (default)"
    )
    parser.add_argument(
        "--tasks",
        type=positive,
        nargs="+",
        metavar="N",
        help="that many tasks mixed in each batch (one a row, so no more than rows), against one for all; several are "
        "cells",
    )
    parser.add_argument(
        "--same-text",
        action="store_true",
        help="with --tasks: each text has all tasks, against one after the other; layers that none adapts run once",
    )
    _shared_options(parser, batch=(1, 8, 32), budget=20.0)
    parser.set_defaults(run=_latency)


def _train_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "train",
        help="a whole optimizer step, and the memory it keeps",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times forward, backward and AdamW of a classifier with dropout 0.1; bf16 is autocast. Full\n"
        "fine-tuning and fastadapt always run. Gradients are checked first, dropout off; a system with wrong\n"
        "ones is not timed. A classifier reads position 0 of the last layer, which computes no other there:\n"
        "a fifth of four layers, 7 % of twelve. The peer all-positions is fastadapt without that.",
        epilog="""examples:
  fastadapt bench train --layers 4 --batch 32
  fastadapt bench train --layers 4 --method lora --lora-dropout 0.1
  fastadapt bench train --layers 4 --method lora --peers peft all-positions
  fastadapt bench train --method pfeiffer --dtype bf16 --json train.json""",
    )
    _model_options(parser)
    _method_options(parser)
    parser.add_argument("--lora-dropout", type=probability, default=0.0, metavar="P", help="of what a LoRA reads (0)")
    _peers_option(parser, "training", "AdapterHub or PEFT")
    _shared_options(parser, batch=(8, 32), budget=30.0)
    parser.set_defaults(run=_train)


def _merge_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "merge",
        help="LoRA merged, unmerged and swapped: its forwards, the merge itself, and what is left of the weights",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Three tables. Forwards: bare, unmerged, merged and swapped in, for every dtype, target set, rank\n"
        "and batch, and after how many forwards a merge has paid for itself. Merges: merge, unmerge and swap of\n"
        "--merge-layers layers against a copy of as many bytes. Drift: how many bits of the weights differ after\n"
        "--cycles of merge, swap and unmerge in --cycle-layers layers. Outputs and merged weights are checked first.",
        epilog="""examples:
  fastadapt bench merge
  fastadapt bench merge --rank 1 8 64 128 --targets query,value all --batch 8
  fastadapt bench merge --dtype bf16 --batch 32 --json merge.json --plot merge.png""",
    )
    _model_options(parser, layers=f"{MERGE_LAYERS}, or all of fewer")
    parser.add_argument("--rank", type=positive, nargs="+", default=[8, 64], metavar="R", help="(8 64)")
    parser.add_argument(
        "--targets",
        type=targets_of,
        nargs="+",
        default=[TARGETS],
        metavar="T",
        help="sets: all, query,value, ... (all)",
    )
    parser.add_argument("--merge-layers", type=positive, default=12, metavar="N", help="layers of the merges (12)")
    parser.add_argument("--cycle-layers", type=positive, default=1, metavar="N", help="layers of the drift (1)")
    parser.add_argument("--cycles", type=positive, default=1000, metavar="N", help="of the drift (1000)")
    _peers_option(parser, "merging", "peft")
    _shared_options(parser, batch=(8, 32), budget=10.0)
    parser.set_defaults(run=_merge)


def _methods_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "methods",
        help="all methods side by side: what each trains and costs, ours and theirs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="For every method: parameters, a forward pass against the same library's model without it, a\n"
        "training step against full fine-tuning, and the time of a switch between two tasks. The peer is AdapterHub\n"
        "or PEFT where they have the method, plain PyTorch where not.",
        epilog="""examples:
  fastadapt bench methods --layers 4
  fastadapt bench methods --methods bitfit fusion mam --dtype bf16 --json methods.json""",
    )
    _model_options(parser)
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}"
    )
    _shared_options(parser, batch=(8,), budget=8.0)
    parser.set_defaults(run=_methods)


def _op_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "op",
        help="the fused adapter + residual + LayerNorm against its floor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times one op on batch × seq rows and gives it as a share of its floor: the larger of its\n"
        "arithmetic at the rate of the fastest dense H×H product here and its bytes at the rate of a copy,\n"
        "measured in the same rounds.",
        epilog="example:\n  fastadapt bench op --batch 8 128 --dtype fp32",
    )
    parser.add_argument("--bottleneck", type=positive, default=64, metavar="B", help="adapter width (64)")
    parser.add_argument("--hidden", type=positive, default=768, metavar="H", help="(768)")
    _shared_options(parser, batch=(8, 128), budget=5.0)
    parser.set_defaults(run=_op)


# -- commands ----------------------------------------------------------------------------------------------------


def _cases(args: argparse.Namespace) -> list[Case]:
    """Every cell of dtype × rank × batch that ``args`` asks for."""
    from fastadapt.bench.methods import method

    one = ("model", "method", "layers", "bottleneck", "targets", "lora_dropout", "length", "adapters", "drop", "seq")
    fields = {name: getattr(args, name) for name in (*one, "device", "seed") if hasattr(args, name)}
    ranks = args.rank if method(args.method).has_rank else args.rank[:1]
    return [
        Case(**fields, rank=rank, batch=batch, dtype=dtype)
        for dtype in args.dtype
        for rank in ranks
        for batch in args.batch
    ]


def _latency(args: argparse.Namespace) -> None:
    from fastadapt.bench import latency, mixed
    from fastadapt.bench.methods import method
    from fastadapt.bench.peers import chosen

    if args.same_text and args.tasks is None:
        raise UserError("--same-text: got it without --tasks; accepted is --tasks N --same-text")
    if args.tasks is not None:
        if args.method not in mixed.METHODS:
            raise UserError(f"--tasks: got --method {args.method}; accepted are {', '.join(mixed.METHODS)}")
        if args.peers is not None:
            raise UserError("--peers: got some with --tasks; accepted is none, PEFT is a peer of --method lora")
        if args.plot is not None:
            raise UserError("--plot: got one with --tasks, of which there is no drawing; accepted is --json")
        options = {"shared": args.same_text, "budget": args.budget}
        jobs = [partial(mixed.run_case, case, tasks, **options) for case in _cases(args) for tasks in args.tasks]
        _bench(args, jobs, mixed.rows, [])
        return
    peers, notes = chosen("inference", args.peers, method(args.method).inference_peers)
    options = {"budget": args.budget, "compile_mode": args.compile_mode}
    jobs = [partial(latency.run_case, case, latency.systems_of(case, peers), **options) for case in _cases(args)]
    _bench(args, jobs, latency.rows, notes)


def _train(args: argparse.Namespace) -> None:
    from fastadapt.bench import train
    from fastadapt.bench.methods import method
    from fastadapt.bench.peers import chosen

    peers, notes = chosen("training", args.peers, method(args.method).training_peers)
    _bench(args, [partial(train.run_case, case, peers, budget=args.budget) for case in _cases(args)], train.rows, notes)


def _merge(args: argparse.Namespace) -> None:
    from fastadapt.bench import merge
    from fastadapt.bench.case import available_layers
    from fastadapt.bench.peers import chosen

    peers, notes = chosen("merging", args.peers, merge.DEFAULT_PEERS)
    fields = {name: getattr(args, name) for name in ("model", "seq", "device", "seed")}
    layers = args.layers or min(MERGE_LAYERS, available_layers(Case(model=args.model)))
    cases = [
        Case(**fields, layers=layers, method="lora", rank=rank, targets=targets, batch=batch, dtype=dtype)
        for dtype in args.dtype
        for targets in args.targets
        for rank in args.rank
        for batch in args.batch
    ]
    jobs = merge.jobs(
        cases,
        peers,
        budget=args.budget,
        merge_layers=args.merge_layers,
        cycle_layers=args.cycle_layers,
        cycles=args.cycles,
    )
    _bench(args, jobs, merge.rows, notes, finish=merge.with_break_even)


def _methods(args: argparse.Namespace) -> None:
    from fastadapt.bench import compare

    case = Case(**{name: getattr(args, name) for name in ("model", "layers", "seq", "device", "seed")})
    _bench(args, compare.jobs(args.methods, case, args.batch, args.dtype, args.budget), compare.rows, [])


def _op(args: argparse.Namespace) -> None:
    from fastadapt.bench import op

    cases = [
        Case(bottleneck=args.bottleneck, batch=batch, seq=args.seq, dtype=dtype, device=args.device, seed=args.seed)
        for dtype in args.dtype
        for batch in args.batch
    ]
    _bench(args, [partial(op.run_case, case, hidden=args.hidden, budget=args.budget) for case in cases], op.rows, [])


def _bench(
    args: argparse.Namespace,
    jobs: Sequence[Callable[..., list[Record]]],
    rows: Callable[[Sequence[Record]], str],
    notes: Sequence[str],
    finish: Callable[[list[Record]], list[Record]] = list,
) -> None:
    """Run every job, then print, write and draw."""
    import torch

    from fastadapt.bench import plot, report
    from fastadapt.bench.setup import use_all_cores

    check_outputs(args)
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    else:
        use_all_cores()
    progress = Progress()
    for note in notes:
        progress.step(note)
    records = finish([row for job in jobs for row in job(progress=progress)])
    print(rows(records))
    here = environment(args.device)
    document = {"environment": here, "command": args.command_line, "records": records}
    print(f"{here['device']}, {here['threads']} threads, torch {here['versions']['torch']}")
    if args.json:
        print(f"records  {report.write_json(args.json, document)}")
    if args.plot:
        print(f"plot     {plot.draw(records, args.plot, plot.caption(document))}")
    wrong = [row for row in records if row["correct"] is False]
    if wrong:
        names = ", ".join(f"{row['label']} ({row['dtype']}, batch {row['batch']})" for row in wrong)
        raise UserError(f"wrong results, not timed: {names}")


def _plot(args: argparse.Namespace) -> None:
    from fastadapt.bench import plot, report

    document = report.read_json(args.file)
    target = Path(args.out) if args.out else Path(args.file).with_suffix(".png")
    check_plot("--out", target)
    print(plot.draw(document["records"], target, plot.caption(document)))
