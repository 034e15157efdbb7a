"""AdapterDrop: layers in which no adapter runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastadapt.config.checks import choice, is_number


@dataclass(frozen=True)
class AdapterDrop:
    """Which layers go without their adapter, and without their copies of LayerNorms (Rücklé et al. 2021,
    arXiv:2010.11918, section 3).

    What lies below the lowest layer with an adapter keeps nothing for backward and computes nothing there. Under
    DistributedDataParallel, robust and independent need ``find_unused_parameters=True``.

    Args:
        mode: ``"robust"``: in training, the layers below n, drawn evenly from 0 to L - 1 for each batch, and the same
            on all ranks of a distributed run; ``"specialised"``: the layers below a fixed n, always;
            ``"independent"``: in training, each row of a batch drops each layer's adapters with probability p.
        n: of ``"specialised"``.
        p: of ``"independent"``.

    Raises:
        ValueError, TypeError: naming the field, what was given and what is accepted.
    """

    mode: Literal["robust", "specialised", "independent"] = "robust"
    n: int | None = None
    p: float | None = None

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("robust", "specialised", "independent"))
        if self.mode == "specialised":
            if isinstance(self.n, bool) or not isinstance(self.n, int):
                raise TypeError(f"n: got {self.n!r}; accepted with mode='specialised' is a number of layers")
            if self.n < 0:
                raise ValueError(f"n: got {self.n}; accepted is a number of layers from 0")
        elif self.n is not None:
            raise ValueError(f"n: got {self.n!r}; accepted with mode={self.mode!r} is None")
        if self.mode == "independent":
            if not is_number(self.p) or not 0.0 <= self.p <= 1.0:
                raise ValueError(f"p: got {self.p!r}; accepted with mode='independent' is a probability from 0 to 1")
        elif self.p is not None:
            raise ValueError(f"p: got {self.p!r}; accepted with mode={self.mode!r} is None")
