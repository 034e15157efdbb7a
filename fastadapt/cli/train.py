"""``fastadapt train`` and ``fastadapt predict``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadapt.cli.arguments import check_device, positive, probability, targets_of
from fastadapt.errors import UserError
from fastadapt.training.data import FORMATS, Source
from fastadapt.training.recipe import RECIPES, SEEDS, Size, parse_field

if TYPE_CHECKING:
    from fastadapt.training.options import Options

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def add_parsers(commands: Any) -> None:
    """``train`` and ``predict``."""
    _train_parser(commands)
    _predict_parser(commands)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number of at least 0")
    return value


def _rate(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number above 0")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a whole number from 0 to 4294967295")
    return value


def _field(text: str) -> tuple[str, Any]:
    try:
        return parse_field(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _axis(text: str) -> tuple[str, tuple[float, ...]]:
    name, equals, values = text.partition("=")
    kinds = {"lr": _rate, "size": positive, "seed": _seed}
    if not equals or name not in kinds:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are {', '.join(f'{k}=VALUE,...' for k in kinds)}")
    return name, tuple(dict.fromkeys(kinds[name](value) for value in values.split(",")))


def _train_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a task on your own text, in adapters or any other method",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains on a TSV, CSV or JSONL file with Hugging Face's Trainer. The result is a folder that PEFT\n"
        "(LoRA) or AdapterHub (bottlenecks, prefixes) loads, with a report and a plot. Columns are names, or\n"
        "numbers from 1 in a file without a header. Where several tasks are trained, any of --dev, --text,\n"
        "--text2, --label, --encoding, --format, --task-type and --metric may be of one task: NAME=VALUE.",
        epilog="""examples:
  fastadapt train --model bert-base-uncased --train train.tsv --dev dev.tsv --output my-task
  fastadapt train --model ./bert --train cola/train.tsv --dev cola/dev.tsv --text 4 --label 2 \\
    --metric matthews --method lora --rank 8 --seeds 0 1 2 --output cola
  fastadapt train --model ./bert --train pairs.csv --dev dev.csv --text question --text2 answer \\
    --label score --task-type regression --output pairs
  fastadapt train --model ./bert --task mood=mood.tsv --dev mood=mood-dev.tsv \\
    --task topic=topic.csv --dev topic=topic-dev.csv --output both
  fastadapt train ... --sweep lr=1e-4,3e-4,1e-3 size=8,64,256 seed=0,1,2
  fastadapt train ... --resume       goes on where it was stopped, to the same numbers""",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", required=True, metavar="PATH|ID", help="the base: a folder, or an id of the model hub"
    )
    files.add_argument("--train", metavar="FILE", help="rows to train on: .tsv, .csv, .jsonl")
    files.add_argument("--dev", action="append", default=[], metavar="FILE", required=True, help="rows to choose by")
    files.add_argument("--task", action="append", default=[], metavar="NAME=FILE", help="instead of --train, repeated")
    files.add_argument("--output", required=True, metavar="DIR", help="for the result, its report and checkpoints")
    files.add_argument("--name", metavar="NAME", help="of the one task (the output folder's)")
    files.add_argument("--text", action="append", default=[], metavar="COLUMN", help="(text, or sentence)")
    files.add_argument("--text2", action="append", default=[], metavar="COLUMN", help="of pairs (none)")
    files.add_argument("--label", action="append", default=[], metavar="COLUMN", help="(label)")
    files.add_argument("--task-type", action="append", default=[], metavar="TYPE",
                       help="classification or regression (found out: fractions are a regression)")  # fmt: skip
    files.add_argument("--metric", action="append", default=[], metavar="NAME",
                       help="that decides: accuracy, f1, matthews; pearson, spearman (accuracy; spearman)")  # fmt: skip
    files.add_argument("--encoding", action="append", default=[], metavar="NAME", help="of the files (utf-8)")
    files.add_argument("--format", action="append", default=[], metavar="NAME", help="tsv, csv or jsonl (the suffix's)")
    files.add_argument("--rows", type=positive, metavar="N", help="the first N rows of each training file (all)")
    files.add_argument("--max-length", type=positive, metavar="N", help="cut texts at N tokens (longer are refused)")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=tuple(RECIPES), default="houlsby", metavar="NAME", help=", ".join(RECIPES))
    method.add_argument("--bottleneck", type=positive, metavar="B", help="adapter width (the method's: houlsby 64)")
    method.add_argument("--rank", type=positive, metavar="R", help="of a LoRA, with alpha = R (8)")
    method.add_argument("--targets", type=targets_of, metavar="T", help="of a LoRA: all, or some (query,value)")
    method.add_argument("--length", type=positive, metavar="N", help="of a prefix (30)")
    method.add_argument("--set", type=_field, action="append", default=[], metavar="FIELD=VALUE",
                        help="any other field of the method's configuration, such as dropout=0.1")  # fmt: skip
    method.add_argument("--adapters", nargs="+", default=[], metavar="DIR", help="trained before, for fusion to mix")
    method.add_argument(
        "--one-by-one", action="store_true", help="several tasks one after another, not in mixed batches"
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--seeds", type=_seed, nargs="+", metavar="N",
                        help="the best on dev is kept (0 1 2; of a sweep without the axis seed, 0)")  # fmt: skip
    recipe.add_argument("--sweep", type=_axis, nargs="+", metavar="AXIS=V,V", help="train a grid: lr=1e-4,1e-3 "
                        "size=8,64 seed=0,1 (size: of the bottleneck, the LoRA, the prefix); needs optuna")  # fmt: skip
    recipe.add_argument("--epochs", type=_rate, metavar="N", help="(10; full 3)")
    recipe.add_argument("--lr", type=_rate, metavar="RATE", help="peak of Adam's (the method's)")
    recipe.add_argument("--head-lr", type=_rate, metavar="RATE", help="of the head (as --lr)")
    recipe.add_argument("--batch", type=positive, default=32, metavar="N", help="rows a batch (32)")
    recipe.add_argument("--accumulate", type=positive, default=1, metavar="N", help="batches a step (1)")
    recipe.add_argument("--warmup", type=probability, default=0.1, metavar="SHARE", help="of the steps, linear (0.1)")
    recipe.add_argument("--weight-decay", type=_number, default=0.0, metavar="W", help="of matrices (0)")
    recipe.add_argument("--clip", type=_number, default=1.0, metavar="NORM", help="of gradients, 0 for none (1)")
    recipe.add_argument(
        "--patience", type=positive, metavar="N", help="stop after N evaluations without a better score"
    )
    recipe.add_argument("--eval-steps", type=positive, metavar="N", help="evaluate and save every N steps (each epoch)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
                         help="bf16 is autocast; auto takes it where it is the faster one (auto)")  # fmt: skip
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    machine.add_argument("--threads", type=positive, metavar="N", help="CPU threads (PyTorch's choice)")
    machine.add_argument("--tensorboard", action="store_true", help="write logs for TensorBoard into DIR/tensorboard")
    machine.add_argument("--resume", action="store_true", help="go on where a run into DIR was stopped")
    parser.set_defaults(run=_train)


def _predict_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="labels and probabilities of texts, from what train left behind",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Labels every row with every task, or with the one that a column of the row names. Tasks on one\n"
        "base share its batches, each row with the adaptation and head of its task, where their heads have one\n"
        "width; others follow one after another.",
        epilog="""examples:
  fastadapt predict --adapters my-task --input new.tsv --text sentence
  fastadapt predict --adapters both/mood both/topic --input new.jsonl --output out.jsonl
  fastadapt predict --adapters both/mood both/topic --input inbox.tsv --task-column task""",
    )
    parser.add_argument("--adapters", nargs="+", required=True, metavar="DIR", help="folders of `fastadapt train`")
    parser.add_argument("--model", metavar="PATH|ID", help="the base, if it has moved since")
    parser.add_argument("--input", required=True, metavar="FILE", help="rows to label: .tsv, .csv, .jsonl")
    parser.add_argument("--text", metavar="COLUMN", help="(as in training)")
    parser.add_argument("--text2", metavar="COLUMN", help="(as in training)")
    parser.add_argument("--task-column", metavar="COLUMN", help="names each row's task (every row is of every task)")
    parser.add_argument("--encoding", metavar="NAME", help="of the input (as in training)")
    parser.add_argument("--format", choices=FORMATS, help="of the input (as in training, else the suffix's)")
    parser.add_argument("--output", metavar="FILE", help=".tsv or .jsonl (standard output, TSV)")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="rows a batch (32)")
    parser.add_argument("--max-length", type=positive, metavar="N", help="cut texts at N tokens (as in training)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (PyTorch's choice)")
    parser.set_defaults(run=_predict)


# -- commands ----------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    from fastadapt.training import report, run
    from fastadapt.training.options import is_main

    _machine(args)
    if args.sweep:
        _sweep(args)
        return
    found = run.train(_options(args))
    if not is_main():
        return
    print(report.summary(found))
    print(report.sizes(found))
    folders = [t["folder"] for t in found["tasks"].values()]
    print(f"report   {Path(args.output) / report.TEXT}")
    print(f"use it   fastadapt predict --adapters {' '.join(folders)} --input FILE")


def _sweep(args: argparse.Namespace) -> None:
    from fastadapt.training import sweep, sweep_report

    axes = dict(args.sweep)
    if len(axes) < len(args.sweep):
        raise UserError("--sweep: got an axis twice; accepted are different ones")
    print(sweep_report.summary(sweep.sweep(_options(args), axes)))
    print(f"report   {Path(args.output) / sweep_report.TEXT}")
    print(f"use it   fastadapt predict --adapters {args.output} --input FILE")


def _predict(args: argparse.Namespace) -> None:
    from fastadapt.training import predict

    _machine(args)
    output = None if args.output is None else Path(args.output)
    if output is not None and output.suffix not in (".tsv", ".jsonl"):
        raise UserError(f"--output: got {args.output!r}; accepted are files ending in .tsv, .jsonl")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output: {str(output.absolute().parent)!r} is no folder; accepted is a file in one")
    source = Source(Path(args.input), args.text, args.text2, None, args.encoding, args.format, args.task_column)
    results, tasks = predict.predict(
        [Path(folder) for folder in args.adapters],
        source,
        model=args.model,
        batch=args.batch,
        max_length=args.max_length,
        device=args.device,
    )
    predict.write(results, tasks, output, "jsonl" if output is not None and output.suffix == ".jsonl" else "tsv")


def _machine(args: argparse.Namespace) -> None:
    import torch

    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)


def _options(args: argparse.Namespace) -> Options:
    """What ``args`` ask for, with the tasks' own settings told apart."""
    from fastadapt.training.options import Files, Options
    from fastadapt.training.task import KINDS, METRICS

    output = Path(args.output)
    trains = _trains(args, output)
    names = list(trains)
    own = {
        option: _by_task(f"--{option.replace('_', '-')}", getattr(args, option), names)
        for option in ("dev", "text", "text2", "label", "task_type", "metric", "encoding", "format")
    }
    for option, accepted in (("task_type", KINDS), ("metric", METRICS), ("format", FORMATS)):
        for value in own[option].values():
            if value not in accepted:
                raise UserError(f"--{option.replace('_', '-')}: got {value!r}; accepted are {', '.join(accepted)}")
    without = [name for name in names if name not in own["dev"]]
    if without:
        raise UserError(f"--dev: got none for the task {without[0]!r}; accepted is {without[0]}=FILE")
    tasks = []
    for name, path in trains.items():
        columns = [own[option].get(name) for option in ("text", "text2", "label")]
        how = (*columns, own["encoding"].get(name, "utf-8"), own["format"].get(name))
        train, dev = _source(path, how), _source(own["dev"][name], how)
        tasks.append(Files(name, train, dev, own["task_type"].get(name), own["metric"].get(name)))
    same = ("model", "method", "one_by_one", "epochs", "lr", "head_lr", "weight_decay", "warmup", "batch",
            "accumulate", "clip", "max_length", "rows", "eval_steps", "patience", "dtype", "device", "tensorboard",
            "resume")  # fmt: skip
    return Options(
        tasks=tuple(tasks),
        output=output,
        size=Size(args.bottleneck, args.rank, args.targets, args.length, dict(args.set)),
        adapters=tuple(Path(folder) for folder in args.adapters),
        seeds=tuple(dict.fromkeys(args.seeds or ([0] if args.sweep else SEEDS))),
        **{name: getattr(args, name) for name in same},
    )


def _source(path: str, how: tuple[Any, ...]) -> Source:
    return Source(Path(path), *how)


def _trains(args: argparse.Namespace, output: Path) -> dict[str, str]:
    """Task -> its training file."""
    if bool(args.train) == bool(args.task):
        raise UserError("--train, --task: accepted is one of them: --train FILE, or --task NAME=FILE for each task")
    if args.train:
        name = args.name or re.sub(r"[^A-Za-z0-9_-]", "_", output.absolute().name) or "task"
        _check_name("--name", name)
        return {name: args.train}
    if args.name:
        raise UserError("--name: got one with --task, which names its tasks; accepted is one with --train")
    trains: dict[str, str] = {}
    for text in args.task:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UserError(f"--task: got {text!r}; accepted is NAME=FILE")
        _check_name("--task", name)
        if name in trains:
            raise UserError(f"--task: got {name!r} twice; accepted are different names")
        trains[name] = path
    return trains


def _check_name(option: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{option}: got the name {name!r}; accepted are letters, digits, _ and -")


def _by_task(option: str, values: Sequence[str], names: Sequence[str]) -> Mapping[str, str]:
    """Task -> its value: ``NAME=VALUE`` is one task's, anything else all tasks'."""
    found: dict[str, str] = {}
    general: str | None = None
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name in names:
            if name in found:
                raise UserError(f"{option}: got two for the task {name!r}; accepted is one")
            found[name] = rest
        elif general is not None:
            raise UserError(f"{option}: got {general!r} and {value!r}; accepted is one, or NAME=VALUE for some tasks")
        else:
            general = value
    return {name: found.get(name, general) for name in names if found.get(name, general) is not None}
