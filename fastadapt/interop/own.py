"""This library's own two files: what no peer's format can hold of an adaptation.

``fastadapt.json`` has the whole configuration, ``fastadapt.safetensors`` the parameters that lie in no other file of
the folder, under their keys in ``state_dict`` without the adaptation's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import fastadapt.config as configurations

CONFIG, WEIGHTS = "fastadapt.json", "fastadapt.safetensors"
FILES = (CONFIG, WEIGHTS)

_METHODS = {name: getattr(configurations, name) for name in configurations.__all__}


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as its class's name and fields; configurations in fields likewise."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        "method": type(config).__name__,
        "fields": {k: to_json(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()},
    }


def from_json(content: Any) -> Any:
    """The configuration that :func:`to_json` wrote; ``ValueError`` for what it did not."""
    if not isinstance(content, Mapping) or not isinstance(content.get("fields"), Mapping):
        raise ValueError(f"path: its {CONFIG} has no configuration")
    method = _METHODS.get(content.get("method"))
    if method is None:
        accepted = ", ".join(_METHODS)
        raise ValueError(f"path: its {CONFIG} is of method {content.get('method')!r}; accepted are {accepted}")
    fields = {k: from_json(v) if isinstance(v, Mapping) and "method" in v else v for k, v in content["fields"].items()}
    for key, value in fields.items():
        if isinstance(value, list):
            fields[key] = tuple(value)
    try:
        return method(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: the configuration in its {CONFIG} is not accepted: {error}") from error
