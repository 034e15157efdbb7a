"""Which format a folder is in: told by what lies in it."""

from __future__ import annotations

import os

from fastadapt.interop import adapterhub, peft
from fastadapt.interop.files import as_path, read_json

FORMATS: tuple[str, ...] = ("adapterhub", "peft")


def open_folder(path: str | os.PathLike[str], name: str | None = None) -> adapterhub.Folder | peft.Folder:
    """Read a folder that an adaptation was saved in; raises ``ValueError`` for what is none, or of another kind.

    ``name`` tells which of PEFT's adapters is meant where each lies in a folder of its own.
    """
    folder = as_path(path)
    if not folder.is_dir():
        raise ValueError(f"path: got {str(path)!r}; accepted is a folder that an adaptation was saved in")
    if not any((folder / name).is_file() for name in adapterhub.ANNOUNCING):
        inside = peft.folder_of(folder, name)
        if inside is not None:
            return peft.Folder(inside, inside.name)
        raise ValueError(
            f"path: {folder} has none of {', '.join(adapterhub.ANNOUNCING)}; accepted is a folder that an adaptation "
            "was saved in"
        )
    config = read_json(folder / adapterhub.CONFIG) if (folder / adapterhub.CONFIG).is_file() else {}
    return peft.Folder(folder, peft.DEFAULT) if peft.is_peft(config) else adapterhub.Folder(folder)
