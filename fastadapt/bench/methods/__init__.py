"""The methods that can be measured: one file each, one row in the table below."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastadapt.bench.methods.base import Method

_FILES: dict[str, str] = {
    "houlsby": "bottleneck",
    "pfeiffer": "bottleneck",
    "parallel": "bottleneck",
    "adapterdrop": "bottleneck",
    "lora": "lora",
    "prefix": "prefix",
    "mam": "prefix",
    "fusion": "fusion",
    "bitfit": "bitfit",
    "layernorm": "bitfit",
    "head": "bitfit",
    "masked": "masked",
}
METHODS: tuple[str, ...] = tuple(_FILES)


def method(name: str) -> Method:
    """The method called ``name``, one of :data:`METHODS`."""
    return importlib.import_module(f"fastadapt.bench.methods.{_FILES[name]}").METHODS[name]
