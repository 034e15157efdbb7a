"""``fastadapt tune``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastadapt.bench.case import DTYPES
from fastadapt.cli.arguments import positive


def add_parser(commands: Any) -> None:
    """``tune``."""
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
    parser.add_argument("--rows", type=positive, nargs="+", default=[512, 4096, 65536], metavar="N",
                        help="tokens, each for all up to it from the power of two below (512 4096 65536)")  # fmt: skip
    parser.add_argument("--hidden", type=positive, default=768, metavar="H", help="(768)")
    parser.add_argument("--bottleneck", type=positive, nargs="+", default=[64], metavar="B", help="(64)")
    parser.add_argument("--rank", type=positive, nargs="+", default=[8], metavar="R", help="(8)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["bf16"], help="(bf16)")
    parser.add_argument(
        "--out", metavar="FILE", help="the table (FASTADAPT_TUNED, or fastadapt/tuned.json in the user's configuration)"
    )
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    from fastadapt import tuning

    dtypes = [DTYPES[name] for name in args.dtype]
    out = None if args.out is None else Path(args.out)
    file = tuning.tune_all(out, args.rows, args.hidden, args.bottleneck, args.rank, dtypes, print)
    print(f"wrote {file}")
