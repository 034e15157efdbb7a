"""What training leaves behind: a folder that PEFT or AdapterHub reads, with all that ``fastadapt predict`` needs.

Beside the files of ``fa.save`` (or, of a fully trained model, of ``save_pretrained``) lie the tokenizer's, and
``task.json``: labels, columns, metric, base model. It is written last, so a folder that has it is whole. A mix of
adapters has them in ``adapters/``.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

import fastadapt as fa
from fastadapt.config import FusionConfig
from fastadapt.errors import UserError
from fastadapt.modules.state import container_of
from fastadapt.training import base, checkpoints
from fastadapt.training.task import Task

TASK, BASE_EXTRA, ADAPTERS = "task.json", "base_extra.safetensors", "adapters"


@dataclass(frozen=True)
class Saved:
    """The content of ``task.json``.

    Attributes:
        task: what was learnt.
        method: of ``--method``.
        model: the base's folder or id; of a fully trained model, what it started from.
        base_checksum: of the base's parameters; None of a fully trained model, whose folder holds all of them.
        extra: keys of the base that its own files lack; their values lie in ``base_extra.safetensors``.
        mixes: the adapters that it mixes.
    """

    task: Task
    method: str
    model: str
    base_checksum: str | None
    extra: tuple[str, ...] = ()
    mixes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "fastadapt": fa.__version__,
            "task": self.task.to_json(),
            "method": self.method,
            "model": self.model,
            "base_checksum": self.base_checksum,
            "extra": list(self.extra),
            "mixes": list(self.mixes),
        }


def write(model: nn.Module, name: str | None, saved: Saved, tokenizer: Any, folder: Path) -> list[str]:
    """Save one task's adaptation (or with None the whole model); the warnings of ``fa.save``.

    Raises:
        UserError: where the disk refuses; what was there before is then untouched up to single files.
    """
    notes: list[str] = []
    try:
        (folder / TASK).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if name is None:
            model.config.label2id = {label: i for i, label in enumerate(saved.task.labels)} or {"LABEL_0": 0}
            model.config.id2label = {i: label for label, i in model.config.label2id.items()}
            model.save_pretrained(folder)
        else:
            adaptation = container_of(model)[name]
            adaptation.label2id = {label: i for i, label in enumerate(saved.task.labels)} or None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fa.save(model, folder, name=name)
                if isinstance(adaptation.config, FusionConfig):
                    for adapter in adaptation.config.adapters:
                        fa.save(model, folder / ADAPTERS / adapter, name=adapter)
            notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
            if saved.extra:
                state = model.state_dict()
                save_file({key: state[key].detach().cpu().clone() for key in saved.extra}, folder / BASE_EXTRA)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be written ({why}); checkpoints are whole, --resume goes on") from error
    checkpoints.write_json(folder / TASK, saved.to_json())
    return list(dict.fromkeys(notes))


def copy(source: Path, target: Path) -> None:
    """Put a folder that :func:`write` made elsewhere, ``task.json`` last."""
    try:
        (target / TASK).unlink(missing_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TASK))
        shutil.copyfile(source / TASK, target / f".{TASK}.part")
        os.replace(target / f".{TASK}.part", target / TASK)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{target}: cannot be written ({why}); {source} is whole, --resume goes on") from error


def read(folder: Path) -> Saved:
    """What ``task.json`` says; ``UserError`` for a folder that has none or a broken one."""
    if not (folder / TASK).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{TASK}")) if folder.is_dir() else []
        hint = f"; it has the tasks {', '.join(inside)}" if inside else ""
        raise UserError(f"--adapters: {folder} has no {TASK}; accepted is a folder of `fastadapt train`{hint}")
    content = checkpoints.read_json(folder / TASK)
    try:
        return Saved(
            Task.from_json(content["task"]),
            content["method"],
            content["model"],
            content["base_checksum"],
            tuple(content["extra"]),
            tuple(content["mixes"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"--adapters: {folder / TASK} is not what `fastadapt train` writes ({error!r})") from error


def open_base(saved: Saved, folder: Path, name: str | None) -> nn.Module:
    """The base of a saved adaptation, with what its own files lack, checked against the one it was trained on."""
    model, _ = base.load_model(name or saved.model, 2)
    if saved.extra:
        checkpoints.put_back(model, load_file(folder / BASE_EXTRA))
    check_base(saved, folder, model, name or saved.model)
    return model


def check_base(saved: Saved, folder: Path, model: nn.Module, name: str) -> None:
    """Raise where ``model`` is not the base that the folder's adaptation was trained on."""
    if base.base_checksum(model) != saved.base_checksum:
        raise UserError(f"--model: {name!r} has other weights than the base of {folder}, which was {saved.model!r}")


def load(model: nn.Module, folder: Path, saved: Saved, name: str) -> None:
    """``fa.load`` of a result folder, the adapters that it mixes first."""
    try:
        known = fa.adaptations(model)
        for adapter in saved.mixes:
            if adapter in known:
                raise UserError(f"--adapters: {folder} mixes {adapter!r}, a name that is taken; run it by itself")
            fa.load(model, folder / ADAPTERS / adapter, name=adapter)
        fa.load(model, folder, name=name)
    except ValueError as error:
        raise UserError(f"--adapters: {error}") from error


def bytes_of(folder: Path) -> int:
    """Of a task's own weights, with those of the adapters that it mixes; not the base's."""
    files = [*folder.glob("*.safetensors"), *folder.glob(f"{ADAPTERS}/*/*.safetensors")]
    return sum(path.stat().st_size for path in files if path.name != BASE_EXTRA)
