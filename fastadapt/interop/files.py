"""Reading and writing the files of an adaptation: whole or not at all, and nothing executed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_DEEPEST = 64  # nesting of a JSON file; what reads it further on recurses


def as_path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"path: got {path!r}; accepted is a folder's, as a str or an os.PathLike") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} cannot be read as JSON: {error}") from error
    except RecursionError:
        raise _too_deep(path) from None
    if not isinstance(content, dict):
        raise ValueError(f"path: {path} holds a {type(content).__name__}; accepted is a JSON object")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        values = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for inside in values for value in inside if isinstance(value, (dict, list))]
    if level:
        raise _too_deep(path)
    return content


def _too_deep(path: Path) -> ValueError:
    return ValueError(f"path: {path} is nested too deep; accepted is JSON of at most {_DEEPEST} levels")


def read_tensors(folder: Path, safe_name: str, pickle_name: str | None = None) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file or, without one, of a pickle of tensors and nothing else; None without either.

    Raises:
        ValueError: for a file that is truncated, corrupted, holds something else than tensors, or NaN or infinity.
    """
    file = folder / safe_name
    try:
        if file.is_file():
            tensors = load_file(file, device="cpu")
        elif pickle_name is not None and (folder / pickle_name).is_file():
            file = folder / pickle_name
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            return None
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, LookupError) as error:
        raise ValueError(f"path: {file} is truncated or corrupted: {error}") from error
    except Exception as error:  # torch.load's refusal is pickle.UnpicklingError, and whatever a broken pickle provokes
        raise ValueError(f"path: {file} cannot be read as tensors alone: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"path: {file} does not hold a mapping from names to tensors")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"path: {file} has NaN or infinity in {key}; accepted are finite weights")
    return tensors


def write_folder(
    folder: Path, files: dict[str, dict[str, Any]], stale: tuple[str, ...], announcing: tuple[str, ...]
) -> None:
    """Write JSON (``*.json``) and safetensors files into a folder, all of them or none.

    Files named in ``stale`` and not written now are removed, other files stay. A failure on the way leaves the folder
    as it was; after a kill, what it held lies in a hidden folder beside or in it.

    Args:
        announcing: names of the files without which a folder is refused, the most telling first.

    Raises:
        ValueError: where a folder has the name of one of these files; nothing is written.
    """
    names = list(dict.fromkeys((*announcing, *files, *stale)))
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise ValueError(f"path: {folder / name} is a folder; accepted is a file of this name, or none")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=_room_for(folder)))
    new, old = beside / "new", beside / "old"
    moves: list[tuple[Path, Path]] = []
    whole, made = True, not folder.exists()
    try:
        new.mkdir()
        old.mkdir()
        for name, content in files.items():
            if name.endswith(".json"):
                text = json.dumps(content, indent=2, sort_keys=True)
                (new / name).write_text(text + "\n", encoding="utf-8")
            else:
                # Copies: safetensors refuses tensors that share memory, and any that are not contiguous.
                tensors = {key: t.detach().cpu().contiguous().clone() for key, t in content.items()}
                save_file(tensors, new / name, metadata={"format": "pt"})
        folder.mkdir(exist_ok=True)
        # No file system replaces several files in one step. So what announces the others leaves first and comes last:
        # in between, no reader takes it for an adaptation that it never held. Digests would tell ours alone, forbid to
        # edit a label's name by hand, and find no room in PEFT's configuration.
        moves += [(folder / name, old / name) for name in names if os.path.lexists(folder / name)]
        moves += [(new / name, folder / name) for name in reversed(names) if name in files]
        for source, target in moves:
            os.replace(source, target)
    except BaseException as error:
        whole = False  # until it is put back, what lies beside is all that is left of it
        try:
            _move_back(moves)
            whole = True
            if made:
                with suppress(OSError):  # it was never made, or another program has put something into it
                    folder.rmdir()
        except OSError as second:
            error.add_note(f"{folder} could not be put back ({second}): what it held lies in {old}")
        raise
    finally:
        if whole:
            shutil.rmtree(beside, ignore_errors=True)


def _room_for(folder: Path) -> Path:
    """Where files can be moved into it from: beside it, or in it where that is another file system or read-only."""
    parent = folder.parent
    if folder.is_dir() and (folder.stat().st_dev != parent.stat().st_dev or not os.access(parent, os.W_OK)):
        return folder
    return parent


def _move_back(moves: list[tuple[Path, Path]]) -> None:
    """Undo those moves that were made, the last one first."""
    for source, target in reversed(moves):
        if not os.path.lexists(source):
            target.rename(source)


def fitting(folder: Path, name: str, found: Tensor | None, parameter: Tensor) -> Tensor:
    """``found``, if it is there and has the parameter's form; ``ValueError`` names the tensor where not."""
    if found is None:
        raise ValueError(f"path: {folder} lacks {name}")
    floating = parameter.is_floating_point()
    if found.shape != parameter.shape or found.is_floating_point() != floating:
        raise ValueError(
            f"path: {name} in {folder} has shape {tuple(found.shape)} and dtype {found.dtype}; accepted is "
            f"{tuple(parameter.shape)}, {'floating' if floating else parameter.dtype}"
        )
    return found
