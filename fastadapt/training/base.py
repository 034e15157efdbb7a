"""The model that tasks share: loading it, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapt import base_parameters
from fastadapt.errors import UserError
from fastadapt.models import wiring_of


def from_folder(auto: Any, name: str, **options: Any) -> Any:
    """``auto.from_pretrained`` with every way it fails told in one line."""
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~"))):
        raise UserError(f"--model: {name!r} is not a folder with a model in it")
    try:
        return auto.from_pretrained(str(path) if path.is_dir() else name, **options)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--model: cannot load {name!r} ({first}); accepted are a folder and a hub id") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model's folder or id."""
    from transformers import AutoTokenizer

    tokenizer = from_folder(AutoTokenizer, name)
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model: the tokenizer of {name!r} has no padding token; accepted is one of an encoder")
    return tokenizer


def load_model(name: str, labels: int, seed: int = 0) -> tuple[nn.Module, list[str]]:
    """(a classifier in float32 on the CPU with a new head, the keys outside the head that its files lacked).

    What the files lack starts from ``seed``, so that it is the same in every run; it is kept with what is trained.

    Raises:
        UserError: for what cannot be loaded, is not wired, or lacks parts of its encoder.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would tear ours apart
    torch.manual_seed(seed)
    model, info = from_folder(
        AutoModelForSequenceClassification,
        name,
        num_labels=labels,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head of other tasks, as this one's is new
    )
    model.config.problem_type = None  # of the head in the file
    try:
        wiring = wiring_of(model)
    except (TypeError, ValueError) as error:
        raise UserError(f"--model: {error}") from error
    heads = tuple(f"{slot}." for slot in wiring.slots_of(model))
    replaced = [key for key, *_ in info["mismatched_keys"] if not key.startswith(heads)]
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(heads))
    broken = replaced + [key for key in missing if ".pooler." not in f".{key}"]
    if broken:
        raise UserError(f"--model: {name!r} lacks {broken[0]}; accepted is a complete {wiring.base.__name__}")
    return model, missing


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        t = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.view(torch.uint8).numpy().data if t.dim() else t.reshape(1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The frozen base's parameters; not its head, which is new wherever the model is loaded, and runs in no task."""
    heads = tuple(f"{slot}." for slot in wiring_of(model).slots_of(model))
    return [(key, p) for key, p in base_parameters(model) if not key.startswith(heads)]


def base_checksum(model: nn.Module) -> str:
    return checksum(base_tensors(model))
