"""The command line. Errors are one line and exit code 2; FASTADAPT_DEBUG=1 shows where they come from."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastadapt.bench.case import DTYPES, TARGETS, Case, UserError
from fastadapt.bench.methods import METHODS

if TYPE_CHECKING:
    from fastadapt.bench.report import Record

PLOT_FORMATS = (".png", ".svg", ".pdf")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a whole number of at least 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number of seconds of at least 0")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number from 0 to 1")
    return value


def _targets(text: str) -> tuple[str, ...]:
    names = TARGETS if text == "all" else tuple(text.split(","))
    if not set(names) <= set(TARGETS):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; accepted are all, or some of {','.join(TARGETS)} with commas between them"
        )
    return tuple(target for target in TARGETS if target in names)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastadapt",
        description="Fused adapters for BERT-like encoders.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  fastadapt info
  fastadapt bench latency --layers 4 --batch 1 8 --dtype fp32 bf16
  fastadapt bench merge --rank 8 64 --targets query,value all
  fastadapt explain bert-base --method houlsby
  fastadapt plot results.json --out results.png""",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    info = commands.add_parser("info", help="versions, devices, and which kernels run here")
    info.set_defaults(run=_info)

    explain = commands.add_parser(
        "explain",
        help="which kernel serves each sublayer of a model, and why a faster one was refused",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  fastadapt explain bert-base
  fastadapt explain ./my-bert --method pfeiffer --dtype bf16
  fastadapt explain bert-base --method lora --rank 16 --targets query,value""",
    )
    explain.add_argument("model", metavar="MODEL", help="bert-base, bert-large, a folder, or an id of the model hub")
    explain.add_argument("--method", choices=("none", *METHODS), default="houlsby", help="(default: houlsby)")
    explain.add_argument("--bottleneck", type=_positive, default=64, metavar="B", help="(default: 64)")
    explain.add_argument("--rank", type=_positive, default=8, metavar="R", help="of a LoRA (default: 8)")
    explain.add_argument("--drop", type=_positive, default=5, metavar="N", help="of AdapterDrop (default: 5)")
    explain.add_argument("--targets", type=_targets, default=TARGETS, metavar="T", help="of a LoRA (default: all)")
    explain.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="(default: fp32)")
    explain.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    explain.add_argument("--seq", type=_positive, default=128, metavar="N", help="tokens a row (default: 128)")
    explain.add_argument("--layers", type=_positive, metavar="N", help="the first N layers (default: all)")
    explain.set_defaults(run=_explain)

    bench = commands.add_parser("bench", help="measure against stock models and other libraries")
    jobs = bench.add_subparsers(dest="job", required=True, metavar="JOB", parser_class=_Parser)
    _latency_parser(jobs)
    _train_parser(jobs)
    _merge_parser(jobs)
    _methods_parser(jobs)
    _op_parser(jobs)

    _tune_parser(commands)

    plot = commands.add_parser(
        "plot",
        help="draw the records of a JSON file",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  fastadapt plot results.json --out docs/latency.png",
    )
    plot.add_argument("file", metavar="FILE.json", help="what `fastadapt bench ... --json FILE.json` wrote")
    plot.add_argument("--out", metavar="FILE", help="png, svg or pdf (default: FILE.png)")
    plot.set_defaults(run=_plot)
    return parser


def _tune_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure launches of the Triton kernels on this GPU, and keep the fastest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tries launches of the adapter, linear and LoRA kernels at every shape that is asked for, leaves\n"
        "out those whose output is off, and writes the fastest into a table that the Triton backend reads when it\n"
        "is loaded. Nothing is measured unless this command runs.",
        epilog="""examples:
  fastadapt tune
  fastadapt tune --hidden 1024 --bottleneck 48 64 --rank 8 --dtype bf16
  FASTADAPT_TUNED=./a100.json fastadapt tune""",
    )
    parser.add_argument("--rows", type=_positive, nargs="+", default=[512, 4096, 65536], metavar="N",
                        help="tokens, each for all up to it from the power of two below (512 4096 65536)")  # fmt: skip
    parser.add_argument("--hidden", type=_positive, default=768, metavar="H", help="(768)")
    parser.add_argument("--bottleneck", type=_positive, nargs="+", default=[64], metavar="B", help="(64)")
    parser.add_argument("--rank", type=_positive, nargs="+", default=[8], metavar="R", help="(8)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["bf16"], help="(bf16)")
    parser.add_argument(
        "--out", metavar="FILE", help="the table (FASTADAPT_TUNED, or fastadapt/tuned.json in the user's configuration)"
    )
    parser.set_defaults(run=_tune)


def _shared_options(parser: argparse.ArgumentParser, *, batch: Sequence[int], budget: float) -> None:
    sizes = " ".join(map(str, batch))
    parser.add_argument("--batch", type=_positive, nargs="+", default=list(batch), metavar="N", help=f"({sizes})")
    parser.add_argument("--seq", type=_positive, default=128, metavar="N", help="tokens a row, no padding (128)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=list(DTYPES), help="(fp32 bf16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of every system (all cores)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    parser.add_argument(
        "--budget", type=_seconds, default=budget, metavar="S", help=f"seconds of timing a cell ({budget:g})"
    )
    parser.add_argument("--json", metavar="FILE", help="write every record, with its samples and the environment")
    parser.add_argument("--plot", metavar="FILE", help="draw the result: png, svg or pdf")


def _model_options(parser: argparse.ArgumentParser, *, layers: int | None = None) -> None:
    parser.add_argument(
        "--model",
        default="bert-base",
        metavar="MODEL",
        help="bert-base or bert-large (random weights), an id, or a folder with weights and a tokenizer (bert-base)",
    )
    parser.add_argument(
        "--layers", type=_positive, default=layers, metavar="N", help=f"keep the first N layers ({layers or 'all'})"
    )


def _method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="houlsby", metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--bottleneck", type=_positive, default=64, metavar="B", help="adapter width (64)")
    parser.add_argument(
        "--rank", type=_positive, nargs="+", default=[8], metavar="R", help="of a LoRA; several are cells (8)"
    )
    parser.add_argument(
        "--targets", type=_targets, default=TARGETS, metavar="T", help=f"of a LoRA: all, or some of {','.join(TARGETS)}"
    )

    parser.add_argument("--length", type=_positive, default=30, metavar="N", help="of a prefix (30)")
    parser.add_argument("--adapters", type=_positive, default=8, metavar="N", help="that a fusion mixes (8)")
    parser.add_argument("--drop", type=_positive, default=5, metavar="N", help="first layers of AdapterDrop (5)")


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
  fastadapt bench latency --model ./my-bert --json out.json --plot out.png""",
    )
    _model_options(parser)
    _method_options(parser)
    _peers_option(parser, "inference", "what the method is usually run with")
    parser.add_argument(
        "--compile-mode", choices=("default", "max-autotune"), default="default", help="of torch.compile (default)"
    )
    parser.add_argument(
        "--tasks", type=_positive, metavar="N", help="that many tasks mixed in each batch, against one task for all"
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
        "ones is not timed.",
        epilog="""examples:
  fastadapt bench train --layers 4 --batch 32
  fastadapt bench train --layers 4 --method lora --lora-dropout 0.1
  fastadapt bench train --method pfeiffer --dtype bf16 --json train.json""",
    )
    _model_options(parser)
    _method_options(parser)
    parser.add_argument("--lora-dropout", type=_probability, default=0.0, metavar="P", help="of what a LoRA reads (0)")
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
    _model_options(parser, layers=4)
    parser.add_argument("--rank", type=_positive, nargs="+", default=[8, 64], metavar="R", help="(8 64)")
    parser.add_argument(
        "--targets", type=_targets, nargs="+", default=[TARGETS], metavar="T", help="sets: all, query,value, ... (all)"
    )
    parser.add_argument("--merge-layers", type=_positive, default=12, metavar="N", help="layers of the merges (12)")
    parser.add_argument("--cycle-layers", type=_positive, default=1, metavar="N", help="layers of the drift (1)")
    parser.add_argument("--cycles", type=_positive, default=1000, metavar="N", help="of the drift (1000)")
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
    parser.add_argument("--bottleneck", type=_positive, default=64, metavar="B", help="adapter width (64)")
    parser.add_argument("--hidden", type=_positive, default=768, metavar="H", help="(768)")
    _shared_options(parser, batch=(8, 128), budget=5.0)
    parser.set_defaults(run=_op)


# -- commands ----------------------------------------------------------------------------------------------------


def _info(_: argparse.Namespace) -> None:
    from fastadapt import info

    print(info.text())


def _explain(args: argparse.Namespace) -> None:
    import fastadapt as fa
    from fastadapt.bench.case import load_model
    from fastadapt.bench.methods import method

    _check_device(args.device)
    fields = ("model", "dtype", "layers", "device", "seq", "bottleneck", "rank", "targets", "drop")
    case = Case(**{name: getattr(args, name) for name in fields})
    model = load_model(case, classifier=False)
    if args.method == "none":
        fa.accelerate(model)
    else:
        method(args.method).adapt(model, "default", case)
    print(fa.explain(model.to(case.device, case.torch_dtype), length=args.seq))


def _tune(args: argparse.Namespace) -> None:
    from fastadapt import tuning

    dtypes = [DTYPES[name] for name in args.dtype]
    out = None if args.out is None else Path(args.out)
    file = tuning.tune_all(out, args.rows, args.hidden, args.bottleneck, args.rank, dtypes, print)
    print(f"wrote {file}")


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

    if args.tasks is not None:
        if args.method not in mixed.METHODS:
            raise UserError(f"--tasks: got --method {args.method}; accepted are {', '.join(mixed.METHODS)}")
        if args.peers is not None:
            raise UserError("--peers: got some with --tasks; accepted is none, PEFT is a peer of --method lora")
        if args.plot is not None:
            raise UserError("--plot: got one with --tasks, of which there is no drawing; accepted is --json")
        jobs = [partial(mixed.run_case, case, args.tasks, budget=args.budget) for case in _cases(args)]
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
    from fastadapt.bench.peers import chosen

    peers, notes = chosen("merging", args.peers, merge.DEFAULT_PEERS)
    fields = {name: getattr(args, name) for name in ("model", "layers", "seq", "device", "seed")}
    cases = [
        Case(**fields, method="lora", rank=rank, targets=targets, batch=batch, dtype=dtype)
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

    _check_outputs(args)
    _check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    else:
        use_all_cores()
    progress = report.Progress()
    for note in notes:
        progress.step(note)
    records = finish([row for job in jobs for row in job(progress=progress)])
    print(rows(records))
    environment = report.environment(args.device)
    document = {"environment": environment, "command": args.command_line, "records": records}
    print(f"{environment['device']}, {environment['threads']} threads, torch {environment['versions']['torch']}")
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
    _check_plot("--out", target)
    print(plot.draw(document["records"], target, plot.caption(document)))


# -- checks made before anything is measured ---------------------------------------------------------------------


def _check_plot(option: str, path: str | Path) -> None:
    if Path(path).suffix.lower() not in PLOT_FORMATS:
        raise UserError(f"{option}: got {str(path)!r}; accepted are files ending in {', '.join(PLOT_FORMATS)}")


def _check_outputs(args: argparse.Namespace) -> None:
    import importlib.util

    if args.plot:
        _check_plot("--plot", args.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot: needs matplotlib: pip install matplotlib")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is None:
            continue
        folder = Path(path).absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option}: cannot make the folder {str(folder)!r} ({error.strerror})") from error
        if Path(path).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{option}: got {path!r}; accepted is a file that can be written")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got 'cuda', but this torch sees no GPU; accepted here is cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    args.command_line = shlex.join(["fastadapt", *arguments])
    debug = os.environ.get("FASTADAPT_DEBUG") == "1"
    if not debug:
        _quieten()
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("fastadapt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; Python would complain once more on exit
        return 0
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or "no message"
        print(f"fastadapt: error: {kind}{message}", file=sys.stderr)
        return 2
    return 0


def _quieten() -> None:
    """Other libraries' chatter would tear the progress and the table apart."""
    import logging

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets its logger's level anew when it is imported
    for name in ("adapters", "transformers", "torch.onnx", "torch._inductor", "torch._dynamo", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
