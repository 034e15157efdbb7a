"""The command line. Errors are one line and exit code 2; FASTADAPT_DEBUG=1 shows where they come from."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from fastadapt.bench.case import DTYPES, Case
from fastadapt.bench.methods import METHODS
from fastadapt.cli import bench, train, tune
from fastadapt.cli.arguments import Parser, check_device, positive, targets_of
from fastadapt.config.lora import TARGETS
from fastadapt.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

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
    explain.add_argument("--bottleneck", type=positive, default=64, metavar="B", help="(default: 64)")
    explain.add_argument("--rank", type=positive, default=8, metavar="R", help="of a LoRA (default: 8)")
    explain.add_argument("--drop", type=positive, default=5, metavar="N", help="of AdapterDrop (default: 5)")
    explain.add_argument("--targets", type=targets_of, default=TARGETS, metavar="T", help="of a LoRA (default: all)")
    explain.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="(default: fp32)")
    explain.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    explain.add_argument("--seq", type=positive, default=128, metavar="N", help="tokens a row (default: 128)")
    explain.add_argument("--layers", type=positive, metavar="N", help="the first N layers (default: all)")
    explain.set_defaults(run=_explain)

    train.add_parsers(commands)
    bench.add_parsers(commands)
    tune.add_parser(commands)
    return parser


def _info(_: argparse.Namespace) -> None:
    from fastadapt import info

    print(info.text())


def _explain(args: argparse.Namespace) -> None:
    import fastadapt as fa
    from fastadapt.bench.case import load_model
    from fastadapt.bench.methods import method

    check_device(args.device)
    fields = ("model", "dtype", "layers", "device", "seq", "bottleneck", "rank", "targets", "drop")
    case = Case(**{name: getattr(args, name) for name in fields})
    model = load_model(case, classifier=False, argument="MODEL")
    if args.method == "none":
        fa.accelerate(model)
    else:
        method(args.method).adapt(model, "default", case)
    print(fa.explain(model.to(case.device, case.torch_dtype), length=args.seq))


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
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # both set their logger's level anew when they are imported
    for name in (
        "adapters", "huggingface_hub", "onnxscript", "torch._dynamo", "torch._inductor", "torch.onnx", "transformers",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
