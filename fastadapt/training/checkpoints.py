"""Checkpoints that are whole or count for nothing: sealed by a last file that lists the others and names the run."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastadapt.errors import UserError
from fastadapt.modules.state import CONTAINER, container_of

SEAL = "complete.json"
WEIGHTS, BEST = "weights.safetensors", "best.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def trained_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """What training changes, by key: an adaptation's tensors, or with None the whole model's."""
    if name is None:
        return dict(model.state_dict())
    return {f"{CONTAINER}.{name}.{key}": t for key, t in container_of(model)[name].state_dict().items()}


@torch.no_grad()
def put_back(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors of :func:`trained_state` into the model."""
    state = model.state_dict()
    for key, tensor in tensors.items():
        state[key].copy_(tensor)


def write_json(path: Path, content: Any) -> None:
    """In one step: the old file or the new one is there, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error


def write_weights(folder: Path, now: dict[str, Tensor], best: dict[str, Tensor], scores: dict[str, Any]) -> None:
    """The state of training, and of the best so far with its scores."""
    folder.mkdir(parents=True, exist_ok=True)
    both = {f"now.{key}": t for key, t in now.items()} | {f"best.{key}": t for key, t in best.items()}
    # Copies: safetensors refuses tensors that share memory.
    save_file({key: t.detach().cpu().contiguous().clone() for key, t in both.items()}, folder / WEIGHTS)
    write_json(folder / BEST, scores)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(the state of training, that of the best so far, its scores)."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: is truncated or corrupted ({error})") from error
    now = {key.removeprefix("now."): t for key, t in tensors.items() if key.startswith("now.")}
    best = {key.removeprefix("best."): t for key, t in tensors.items() if key.startswith("best.")}
    return now, best, read_json(folder / BEST)


def seal(folder: Path, run: str) -> None:
    """Mark a checkpoint as whole, and as this run's; then those before it go."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SEAL}
    write_json(folder / SEAL, {"run": run, "files": files})
    for other in _numbered(folder.parent):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def newest(folder: Path, run: str) -> Path | None:
    """The last whole checkpoint in ``folder``; what a kill has left of an unfinished one is no checkpoint.

    Raises:
        UserError: for one of another run.
    """
    for checkpoint in reversed(_numbered(folder)):
        if not (checkpoint / SEAL).is_file():
            continue
        content = read_json(checkpoint / SEAL)
        if content.get("run") != run:
            raise UserError(f"{checkpoint}: is of another run; accepted is one of this model, method, data and seed")
        sizes = content["files"]
        if all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == s for n, s in sizes.items()):
            return checkpoint
    return None


def _numbered(folder: Path) -> list[Path]:
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
