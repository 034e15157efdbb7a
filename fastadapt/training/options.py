"""What a run is asked for, and whether a folder holds the same run already."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastadapt.environment import multiplies_bf16_fast
from fastadapt.errors import UserError
from fastadapt.training import base, checkpoints, recipe
from fastadapt.training.data import Source
from fastadapt.training.recipe import RECIPES, Size

RUN = "run.json"
DTYPES = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Files:
    """A task's files and what the user says of it; None is found out."""

    name: str
    train: Source
    dev: Source
    kind: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Options:
    """What a run is asked for; None takes the recipe's.

    Attributes:
        model: folder or hub id of the base.
        tasks: one or more.
        output: folder for everything.
        method, size: of :data:`fastadapt.training.recipe.RECIPES`.
        adapters: result folders that ``fusion`` mixes; without them it trains an adapter for each task first.
        one_by_one: several tasks one after another and not in mixed batches.
        seeds: of heads, adapters, order and dropout; the best on dev is kept.
        epochs, lr, head_lr, weight_decay, warmup, batch, accumulate, clip: as their names say; ``warmup`` is a share
            of the steps, ``clip`` the largest gradient norm, 0 for none.
        max_length: tokens at which texts are cut.
        rows: the first so many of each training file.
        eval_steps: steps between evaluations; None is an epoch.
        patience: evaluations without a better score after which training stops.
        dtype: ``auto`` takes bf16 autocast where its products are faster than float32's.
        device: ``auto``, ``cpu`` or ``cuda``.
        adapter_lr: of the adapters that ``fusion`` trains first.
        tensorboard: write its logs.
        resume: go on where an earlier call stopped.
    """

    model: str
    tasks: tuple[Files, ...]
    output: Path
    method: str = "houlsby"
    size: Size = field(default_factory=Size)
    adapters: tuple[Path, ...] = ()
    one_by_one: bool = False
    seeds: tuple[int, ...] = (0,)
    epochs: float | None = None
    lr: float | None = None
    head_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    batch: int = 32
    accumulate: int = 1
    clip: float = 1.0
    max_length: int | None = None
    rows: int | None = None
    eval_steps: int | None = None
    patience: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    adapter_lr: float | None = None
    tensorboard: bool = False
    resume: bool = False

    def settled(self) -> Options:
        """With every None that a recipe or this machine decides replaced."""
        recipe_ = RECIPES[self.method]
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return replace(
            self,
            lr=recipe_.lr if self.lr is None else self.lr,
            adapter_lr=self.adapter_lr or self.lr or RECIPES["pfeiffer"].lr,
            epochs=recipe_.epochs if self.epochs is None else self.epochs,
            device=device,
            dtype=_fast_dtype(device) if self.dtype == "auto" else self.dtype,
        )


def _fast_dtype(device: str) -> str:
    """bf16 where its products are faster than float32's."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if multiplies_bf16_fast() else "fp32"


def processes() -> int:
    """How many train together: those that ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def check(options: Options) -> None:
    """Raise ``UserError`` for options that do not go together."""
    for package, why in (
        ("accelerate", "train"),
        *((("tensorboard", "--tensorboard"),) if options.tensorboard else ()),
    ):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{why}: needs {package}: pip install {package}")
    names = [files.name for files in options.tasks]
    if len(set(names)) < len(names):
        raise UserError(f"--task: got {names} with a name twice; accepted are different names")
    if options.method == "full" and len(names) > 1:
        raise UserError("--method full: got several tasks; accepted is one, since each needs a model of its own")
    if options.method == "fusion":
        if len(names) < 2 and len(options.adapters) < 2:
            raise UserError("--method fusion: got one task; accepted are two with --task, or --adapters DIR DIR ...")
    elif options.adapters:
        raise UserError(f"--adapters: got some with --method {options.method}; accepted with --method fusion alone")
    else:
        if RECIPES[options.method].make is not None:
            recipe.configuration(options.method, options.size)
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output: got {str(options.output)!r}, which is a file; accepted is a folder")


def identity_of(options: Options, base_checksum: str) -> dict[str, Any]:
    """All that decides the numbers of a run, for ``--resume`` to compare."""
    tasks = {}
    for files in options.tasks:
        tasks[files.name] = {
            **{side: hashlib.sha256(source.path.read_bytes()).hexdigest() for side, source in _sides(files)},
            **{
                f"{side} columns": [source.text, source.text2, source.label, source.encoding, source.format]
                for side, source in _sides(files)
            },
            "kind": files.kind,
            "metric": files.metric,
        }
    kept = ("method", "one_by_one", "seeds", "epochs", "lr", "adapter_lr", "head_lr", "weight_decay", "warmup", "batch",
            "accumulate", "clip", "max_length", "rows", "eval_steps", "patience", "dtype", "device")  # fmt: skip
    settings = {name: getattr(options, name) for name in kept}
    size = {k: str(v) for k, v in asdict(options.size).items()}
    adapters = [base.checksum([(p.name, _bytes(p))]) for d in options.adapters for p in sorted(d.glob("*.safetensors"))]
    settings["processes"] = processes()
    content = {"model": base_checksum, "tasks": tasks, **settings, "size": size, "adapters": adapters}
    return json.loads(json.dumps(content))


def _bytes(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _sides(files: Files) -> tuple[tuple[str, Source], ...]:
    return (("train", files.train), ("dev", files.dev))


def enter(options: Options, identity: dict[str, Any]) -> str:
    """Open or continue the output folder, which is the main process's to do; the run's mark."""
    path = options.output / RUN
    if not is_main():
        pass
    elif path.is_file():
        if not options.resume:
            raise UserError(f"--output: {options.output} holds a run; --resume goes on with it, another folder is new")
        before = checkpoints.read_json(path)
        was, now = (dict(_leaves(content)) for content in (before, identity))
        for what in sorted({*was, *now}):
            if was.get(what) != now.get(what):
                given = f"was {was.get(what, 'none')!r}, and is {now.get(what, 'none')!r} now"
                raise UserError(f"--resume: {options.output} is another run's: its {what} {given}")
    elif options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"--output: {options.output} has files of something else; accepted is a new or empty folder")
    else:
        checkpoints.write_json(path, identity)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _leaves(content: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(content, dict):
        return [(path, content)]
    return [leaf for key, value in content.items() for leaf in _leaves(value, f"{path} {key}".strip())]
