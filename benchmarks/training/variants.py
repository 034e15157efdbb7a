"""The rows of the table: methods with their sizes, their learning rates, and who else has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastadapt as fa
from fastadapt.errors import UserError
from fastadapt.training import checkpoints
from fastadapt.training.recipe import Size


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        label: what the table calls it.
        method, size: of ``fastadapt train``.
        rates: learning rates that ``--find-rates`` tries; of full fine-tuning BERT's largest, half of it, and the next
            two.
        peer: whose step is timed beside ours, one of :data:`fastadapt.bench.peers.PEERS`; ``"stock"`` trains the same
            parameters in a stock model; None where nobody has the method.
        bench: the method in :mod:`fastadapt.bench`, and the fields of its case.
        rate_of: the variant whose rate it takes.
        epochs: of a training of the table; adapters fit more slowly than a whole model (NOTES.md).
        head_lr: learning rate of the head, None for the others'; what changes the base little wants a quicker head.
    """

    label: str
    method: str
    size: Size = field(default_factory=Size)
    rates: tuple[float, ...] = ()
    peer: str | None = None
    bench: tuple[str, dict[str, Any]] | None = None
    rate_of: str | None = None
    epochs: float = 8
    head_lr: float | None = None


# A start at random features of which nothing is added, and small outputs at large rates: with the papers' start and
# scale 1, CoLA stays 4 points and more below full fine-tuning, or at the answer of the larger class (NOTES.md).
ADAPTER = {"init": "lora", "scale": 0.25}
# A head as slow as what changes the base little stays at CoLA's larger class (NOTES.md).
HEAD = 1e-2
_ADAPTER_RATES = (7e-4, 1.5e-3, 2.5e-3)


def _houlsby(b: int, rate_of: str | None = None) -> Variant:
    case = ("houlsby", {"bottleneck": b})
    size = Size(bottleneck=b, fields=ADAPTER)
    return Variant(f"Houlsby b={b}", "houlsby", size, _ADAPTER_RATES, "adapterhub", case, rate_of)


_MAM = {"prefix": fa.PrefixConfig(length=16), "parallel": fa.ParallelConfig(bottleneck=16, scale=2.0)}  # He's for GLUE
VARIANTS: dict[str, Variant] = {
    "full": Variant("full fine-tuning", "full", rates=(2.5e-5, 5e-5, 1e-4, 2e-4), epochs=5),
    "head": Variant("head only", "head", rates=(1e-3, 3e-3, 1e-2, 3e-2), peer="stock"),
    "houlsby-8": _houlsby(8, "houlsby-64"),
    "houlsby-64": _houlsby(64),
    "houlsby-128": _houlsby(128, "houlsby-64"),
    "pfeiffer": Variant("Pfeiffer b=H/16", "pfeiffer", Size(fields=ADAPTER), (1.5e-3, 2.5e-3, 4e-3), "adapterhub",
                        ("pfeiffer", {"bottleneck": 24}), head_lr=HEAD),
    "lora": Variant("LoRA r=8 on q, v", "lora", Size(), (5e-4, 1e-3, 2e-3, 4e-3), "peft",
                    ("lora", {"rank": 8, "targets": ("query", "value")}), head_lr=HEAD),
    "bitfit": Variant("BitFit", "bitfit", Size(), (1e-3, 2e-3, 4e-3), "stock", head_lr=HEAD),
    "mam": Variant("MAM 16, 16", "mam", Size(fields=_MAM), (1.5e-4, 3e-4, 6e-4), "adapterhub",
                   ("mam", {"length": 16, "bottleneck": 16}), head_lr=HEAD),
    "masked": Variant("masked b=64", "masked", Size(fields=ADAPTER), _ADAPTER_RATES),
}  # fmt: skip
SIZED = ("houlsby-8", "houlsby-64", "houlsby-128")  # what "the size chosen per task" chooses from
FIXED, FULL = "houlsby-64", "full"


def rate_name(name: str) -> str:
    """The variant whose sweep decides about the rate of ``name``."""
    return VARIANTS[name].rate_of or name


def read_rates(path: Path) -> dict[str, float]:
    """Variant -> learning rate, as ``--find-rates`` wrote them."""
    if not path.is_file():
        raise UserError(f"--rates: {path} is missing; --find-rates makes it")
    found = checkpoints.read_json(path)["rates"]
    return {name: found[rate_name(name)]["lr"] for name in VARIANTS if rate_name(name) in found}
