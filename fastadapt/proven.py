"""On which GPUs the tests of a backend's kernels have run and passed: a table that the GPU suite writes.

``proven.json``: ``{backend: {architecture: {"device", "date", "commit", "sources", "ops"}}}``. ``sources`` is a digest
of the kernels' sources, so that a kernel that changed is not taken for the one that ran.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("proven.json")
_ROOT = Path(__file__).parents[1]
_SOURCES = {"cuda": ("csrc/cuda", "*.*"), "triton": ("fastadapt/backends/triton", "*.py")}


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """The whole of it."""
    return json.loads(TABLE.read_text())


def devices(backend: str) -> str:
    """Where the backend is proven, in words; empty where it is nowhere."""
    now, found = sources(backend), []
    for architecture, entry in sorted(table().get(backend, {}).items()):
        changed = ", changed since" if now is not None and now != entry["sources"] else ""
        found.append(f"{entry['device']} ({architecture}, {entry['date']}{changed}): {', '.join(entry['ops'])}")
    return "; ".join(found)


def sources(backend: str) -> str | None:
    """A digest of the backend's kernels in the source tree; None outside one."""
    folder, pattern = _SOURCES[backend]
    files = sorted((_ROOT / folder).glob(pattern)) if (_ROOT / "csrc").is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def record(backend: str, architecture: str, entry: dict[str, Any], path: Path = TABLE) -> None:
    """Put one entry in; the file is replaced as a whole."""
    known = json.loads(path.read_text())
    known.setdefault(backend, {})[architecture] = entry
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    fresh.replace(path)
