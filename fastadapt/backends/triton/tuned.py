"""The table of launches that ``fastadapt tune`` measured on a GPU, and where it lies.

Nothing is measured here: a launch that the table has for this device's name is taken, any other is the heuristic's of
:mod:`fastadapt.backends.triton.launch`.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

_FORMAT = 1
Table = dict[str, dict[str, dict[str, int | None]]]  # heuristic -> key -> fields of its tile


def path() -> Path:
    """``FASTADAPT_TUNED``, or ``fastadapt/tuned.json`` among the user's configuration (``XDG_CONFIG_HOME``)."""
    if os.environ.get("FASTADAPT_TUNED"):
        return Path(os.environ["FASTADAPT_TUNED"])
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "fastadapt" / "tuned.json"


def read(file: Path) -> dict[str, Table]:
    """{device's name: its table}; empty where there is no file.

    Raises:
        ValueError: for a file that is no such table. A broken table is not passed over in silence.
    """
    try:
        written = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a table of tuned launches: {error}") from None
    known = isinstance(written, dict) and written.get("format") == _FORMAT
    if not known or not isinstance(written.get("devices"), dict):
        raise ValueError(f"{file}: is no table of tuned launches of format {_FORMAT}; `fastadapt tune` writes one")
    for name, table in written["devices"].items():
        if not isinstance(table, dict) or not all(_is_launches(launches) for launches in table.values()):
            raise ValueError(f"{file}: what it has for {name!r} is no table of tuned launches")
    return written["devices"]


def _is_launches(launches: Any) -> bool:
    return isinstance(launches, dict) and all(
        isinstance(tile, dict) and all(v is None or (type(v) is int and v > 0) for v in tile.values())
        for tile in launches.values()
    )


def write(file: Path, device: str, table: Table) -> None:
    """Put a device's launches into the file, beside those of others and of other shapes; all or nothing."""
    devices = read(file)
    known = devices.setdefault(device, {})
    for heuristic, launches in table.items():
        known.setdefault(heuristic, {}).update(launches)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}")
    try:
        with os.fdopen(handle, "w") as out:
            json.dump({"format": _FORMAT, "devices": devices}, out, indent=1, sort_keys=True)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def key(arguments: dict[str, Any]) -> str:
    """The shape that a launch is kept for; rows, of which there are many, by the power of two that holds them."""
    many = ("rows", "batch_rows")
    return ",".join(f"{n}={_bucket(v) if n in many else int(v)}" for n, v in sorted(arguments.items()))


def _bucket(rows: int) -> int:
    return 1 << max(int(rows) - 1, 0).bit_length()


def tile(kind: type, found: dict[str, int | None], default: Any) -> Any:
    """The tile that a table's entry says; ``default`` where it has other fields (of another release)."""
    return kind(**found) if set(found) == {field.name for field in fields(kind)} else default


def entry(chosen: Any) -> dict[str, int | None]:
    """A tile as a table's entry."""
    return asdict(chosen)
