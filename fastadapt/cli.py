"""The command line. Errors are one line and exit code 2; FASTADAPT_DEBUG=1 shows where they come from."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastadapt.bench.case import DTYPES, METHODS, Case, UserError

if TYPE_CHECKING:
    from fastadapt.bench.report import Progress, Record

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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastadapt",
        description="Fused adapters for BERT-like encoders.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  fastadapt info
  fastadapt bench latency --layers 4 --batch 1 8 --dtype fp32 bf16
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
  fastadapt explain ./my-bert --method pfeiffer --dtype bf16""",
    )
    explain.add_argument("model", metavar="MODEL", help="bert-base, bert-large, a folder, or an id of the model hub")
    explain.add_argument("--method", choices=("none", *METHODS), default="houlsby", help="(default: houlsby)")
    explain.add_argument("--bottleneck", type=_positive, default=64, metavar="B", help="(default: 64)")
    explain.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="(default: fp32)")
    explain.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    explain.add_argument("--layers", type=_positive, metavar="N", help="the first N layers (default: all)")
    explain.set_defaults(run=_explain)

    bench = commands.add_parser("bench", help="measure against stock models and other libraries")
    jobs = bench.add_subparsers(dest="job", required=True, metavar="JOB", parser_class=_Parser)
    _latency_parser(jobs)
    _train_parser(jobs)
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
    return parser


def _shared_options(parser: argparse.ArgumentParser, *, batch: Sequence[int], budget: float) -> None:
    parser.add_argument("--bottleneck", type=_positive, default=64, metavar="B", help="adapter width (default: 64)")
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


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bert-base",
        metavar="MODEL",
        help="bert-base or bert-large (random weights), an id, or a folder with weights and a tokenizer (bert-base)",
    )
    parser.add_argument("--method", choices=METHODS, default="houlsby", help="(houlsby)")
    parser.add_argument("--layers", type=_positive, metavar="N", help="keep the first N layers (all)")


def _latency_parser(jobs: Any) -> None:
    from fastadapt.bench.latency import DEFAULT_PEERS
    from fastadapt.bench.peers import PEERS

    names = [name for name, peer in PEERS.items() if peer.inference and name not in ("stock", "bare", "fastadapt")]
    parser = jobs.add_parser(
        "latency",
        help="a forward pass, with adapters and without",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times a forward pass of the encoder. Stock Hugging Face (eager, SDPA, no adapters), fastadapt "
        "without adapters\nand fastadapt with them always run; --peers chooses the others. Each output is checked "
        "first; a wrong one is not timed.",
        epilog="""examples:
  fastadapt bench latency --layers 4
  fastadapt bench latency --batch 1 --dtype bf16 --peers compile openvino
  fastadapt bench latency --model ./my-bert --json out.json --plot out.png""",
    )
    _model_options(parser)
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help=f"of {', '.join(names)} ({' '.join(DEFAULT_PEERS)}, as installed)"
    )
    parser.add_argument(
        "--compile-mode", choices=("default", "max-autotune"), default="default", help="of torch.compile (default)"
    )
    _shared_options(parser, batch=(1, 8, 32), budget=20.0)
    parser.set_defaults(run=_latency)


def _train_parser(jobs: Any) -> None:
    from fastadapt.bench.train import DEFAULT_PEERS

    parser = jobs.add_parser(
        "train",
        help="a whole optimizer step, and the memory it keeps",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times forward, backward and AdamW of a classifier with dropout 0.1; bf16 is autocast. Full "
        "fine-tuning and\nfastadapt always run. Gradients are checked first, dropout off; a system with wrong ones "
        "is not timed.",
        epilog="""examples:
  fastadapt bench train --layers 4 --batch 32
  fastadapt bench train --method pfeiffer --dtype bf16 --json train.json""",
    )
    _model_options(parser)
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"({' '.join(DEFAULT_PEERS)}, as installed)")
    _shared_options(parser, batch=(8, 32), budget=30.0)
    parser.set_defaults(run=_train)


def _op_parser(jobs: Any) -> None:
    parser = jobs.add_parser(
        "op",
        help="the fused adapter + residual + LayerNorm against its floor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times one op on batch × seq rows and gives it as a share of its floor: the larger of its "
        "arithmetic at the rate\nof a dense H×H product and its bytes at the rate of a copy, measured in the same "
        "rounds.",
        epilog="example:\n  fastadapt bench op --batch 8 128 --dtype fp32",
    )
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
    from fastadapt.bench.peers.fused import CONFIGS

    _check_device(args.device)
    case = Case(model=args.model, dtype=args.dtype, layers=args.layers, device=args.device)
    model = load_model(case, classifier=False)
    if args.method == "none":
        fa.accelerate(model)
    else:
        fa.adapt(model, CONFIGS[args.method](bottleneck=args.bottleneck))
    print(fa.explain(model.to(case.device, case.torch_dtype)))


def _latency(args: argparse.Namespace) -> None:
    from fastadapt.bench import latency
    from fastadapt.bench.peers import chosen

    peers, notes = chosen("inference", args.peers, latency.DEFAULT_PEERS)
    peers = [peer for peer in peers if peer.name not in latency.ALWAYS]

    def cell(case: Case, progress: Progress) -> list[Record]:
        return latency.run_case(case, peers, budget=args.budget, compile_mode=args.compile_mode, progress=progress)

    _bench(args, cell, latency.rows, notes)


def _train(args: argparse.Namespace) -> None:
    from fastadapt.bench import train
    from fastadapt.bench.peers import chosen

    peers, notes = chosen("training", args.peers, train.DEFAULT_PEERS)
    peers = [peer for peer in peers if peer.name not in train.ALWAYS]

    def cell(case: Case, progress: Progress) -> list[Record]:
        return train.run_case(case, peers, budget=args.budget, progress=progress)

    _bench(args, cell, train.rows, notes)


def _op(args: argparse.Namespace) -> None:
    from fastadapt.bench import op

    def cell(case: Case, progress: Progress) -> list[Record]:
        return op.run_case(case, hidden=args.hidden, budget=args.budget, progress=progress)

    _bench(args, cell, op.rows, [])


def _bench(
    args: argparse.Namespace,
    cell: Callable[[Case, Progress], list[Record]],
    rows: Callable[[Sequence[Record]], str],
    notes: Sequence[str],
) -> None:
    """Run every cell of dtype × batch, then print, write and draw."""
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
    fields = {name: getattr(args, name) for name in ("model", "method", "layers") if hasattr(args, name)}
    cases = [
        Case(**fields, bottleneck=args.bottleneck, batch=batch, seq=args.seq, dtype=dtype, device=args.device,
             seed=args.seed)
        for dtype in args.dtype
        for batch in args.batch
    ]  # fmt: skip
    records = [row for case in cases for row in cell(case, progress)]
    print(rows(records))
    environment = report.environment(args.device)
    document = {"environment": environment, "command": _command(), "records": records}
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
        while not folder.exists():
            folder = folder.parent
        if Path(path).is_dir() or not os.access(folder, os.W_OK) or not folder.is_dir():
            raise UserError(f"{option}: cannot write {path!r}")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got 'cuda', but this torch sees no GPU; accepted here is cpu")


def _command() -> str:
    return " ".join(["fastadapt", *sys.argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
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
    for name in ("adapters", "transformers", "torch.onnx", "torch._inductor", "torch._dynamo", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
