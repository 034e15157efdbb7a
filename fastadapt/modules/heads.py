"""The slots of a model's head: the original class, plus the active adaptation's head in its place."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastadapt.modules.plain import reads_as


class HeadSlot:
    """Mixin over a head's class. The model's own head stays where it is, under its own keys; another may run."""

    active_head: nn.Module | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.active_head is None:
            return super().forward(*args, **kwargs)
        return self.active_head(*args, **kwargs)

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own head, whatever is active."""
        return super().forward(*args, **kwargs)


class LinearHead(HeadSlot, nn.Linear):
    """``nn.Linear`` as a head."""


reads_as(LinearHead, nn.Linear)
