"""Which format a folder is in: told by what lies in it."""

from __future__ import annotations

from pathlib import Path

from fastadapt.interop import adapterhub
from fastadapt.interop.files import read_json

FORMATS: tuple[str, ...] = ("adapterhub",)


def open_folder(path: str | Path) -> adapterhub.Folder:
    """Read a folder that an adaptation was saved in; raises ``ValueError`` for what is none, or of another kind."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path: got {str(path)!r}; accepted is a folder that an adaptation was saved in")
    if not (folder / adapterhub.CONFIG).is_file():
        if (folder / "adapter_fusion_config.json").is_file():
            raise ValueError(f"path: {folder} holds an AdapterFusion; accepted are bottleneck adapters")
        raise ValueError(f"path: {folder} has no {adapterhub.CONFIG}; accepted is AdapterHub's folder of an adapter")
    config = read_json(folder / adapterhub.CONFIG)
    if "peft_type" in config:
        kind = config["peft_type"]
        raise ValueError(f"path: {folder} is PEFT's, of type {kind}; accepted are AdapterHub's bottleneck adapters")
    return adapterhub.Folder(folder)
