"""What the commands' arguments have in common: types, and checks made before anything is done."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from fastadapt.config.lora import TARGETS
from fastadapt.errors import UserError

PLOT_FORMATS = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a whole number of at least 1")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number of seconds of at least 0")
    return value


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number from 0 to 1")
    return value


def targets_of(text: str) -> tuple[str, ...]:
    names = TARGETS if text == "all" else tuple(text.split(","))
    if not set(names) <= set(TARGETS):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; accepted are all, or some of {','.join(TARGETS)} with commas between them"
        )
    return tuple(target for target in TARGETS if target in names)


def check_plot(option: str, path: str | Path) -> None:
    if Path(path).suffix.lower() not in PLOT_FORMATS:
        raise UserError(f"{option}: got {str(path)!r}; accepted are files ending in {', '.join(PLOT_FORMATS)}")


def check_outputs(args: argparse.Namespace) -> None:
    import importlib.util

    if args.plot:
        check_plot("--plot", args.plot)
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


def check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got 'cuda', but this torch sees no GPU; accepted here is cpu")
