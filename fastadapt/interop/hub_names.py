"""What is in one of AdapterHub's files, taken out piece by piece, and nothing overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Given:
    """What a file holds and has not been taken yet.

    Args:
        folder: of the file, for messages.
        tensors: by AdapterHub's keys in the base model.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder, self.tensors = folder, dict(tensors)

    def take(self, *keys: str) -> Tensor:
        """The tensor that lies under these keys; ``ValueError`` where there is none, or two that differ."""
        found = [self.tensors.pop(key) for key in keys if key in self.tensors]
        if not found:
            raise ValueError(f"path: {self.folder} lacks {keys[0]}")
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(f"path: {self.folder} holds {keys[0]} twice, with different values")
        return found[0]

    def finish(self) -> None:
        """Raise for what nobody took."""
        if self.tensors:
            count, some = len(self.tensors), ", ".join(sorted(self.tensors)[:3])
            raise ValueError(f"path: {self.folder} has {count} tensors without a place in this model: {some}")


def refuse_unknown(hub: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for fields of AdapterHub's that nothing here has, or that are set to what nothing here does.

    Args:
        hub: its form of a configuration.
        known: fields of any value.
        fixed: fields of one accepted value.
    """
    for key, accepted in fixed.items():
        if hub.get(key, accepted) not in (accepted, None):
            raise ValueError(f"path: its configuration sets {key}={hub[key]!r}; accepted is {accepted!r}")
    unknown = sorted(key for key in hub if key not in known and key not in fixed and hub[key] not in (None, False))
    if unknown:
        raise ValueError(f"path: its configuration sets {', '.join(unknown)}, which is unknown here")
