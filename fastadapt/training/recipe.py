"""How each method is trained where the user does not say: its configuration, learning rate and epochs."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fastadapt as fa
from fastadapt.errors import UserError


@dataclass(frozen=True)
class Size:
    """What the command line says about a method's size; None leaves the method's own default."""

    bottleneck: int | None = None
    rank: int | None = None
    targets: tuple[str, ...] | None = None
    length: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # of --set


@dataclass(frozen=True)
class Recipe:
    """Defaults of one method.

    Attributes:
        make: its configuration from a size; None trains the whole model.
        lr: peak learning rate of Adam.
        epochs: passes over the training rows.
        source: of the learning rate.
    """

    make: Callable[[Size], Any] | None
    lr: float
    epochs: int
    source: str


def _bottleneck(kind: type, **fields: Any) -> Callable[[Size], Any]:
    def make(size: Size) -> Any:
        width = {} if size.bottleneck is None else {"bottleneck": size.bottleneck}
        return kind(**{**fields, **width, **size.fields})

    return make


def _lora(size: Size) -> fa.LoRAConfig:
    given = {"r": size.rank, "alpha": size.rank, "targets": size.targets}
    return fa.LoRAConfig(**{**{k: v for k, v in given.items() if v is not None}, **size.fields})


def _prefix(size: Size) -> fa.PrefixConfig:
    given = {"length": size.length, "bottleneck": size.bottleneck}
    return fa.PrefixConfig(**{**{k: v for k, v in given.items() if v is not None}, **size.fields})


def _mam(size: Size) -> fa.MAMConfig:
    prefix = fa.PrefixConfig(**({} if size.length is None else {"length": size.length}))
    width = 512 if size.bottleneck is None else size.bottleneck
    return fa.MAMConfig(**{"prefix": prefix, "parallel": fa.ParallelConfig(bottleneck=width), **size.fields})


def _plain(kind: type) -> Callable[[Size], Any]:
    return lambda size: kind(**size.fields)


_HOULSBY = "middle of the paper's 3e-5, 3e-4, 3e-3 (arXiv:1902.00751, section 3.2)"
_HE = "arXiv:2110.04366, appendix A"

SEEDS = (0, 1, 2)  # Houlsby et al. (arXiv:1902.00751) take the best on dev of five

# Batch 32, Adam, 10 % linear warm-up, then linear decay to zero, for all. Rates are the papers', for models of the
# size of BERT-base; a small model often takes a larger one. LoRA's is the paper's for CoLA: five times that collapses.
RECIPES: dict[str, Recipe] = {
    "houlsby": Recipe(_bottleneck(fa.HoulsbyConfig), 3e-4, 10, _HOULSBY),
    "pfeiffer": Recipe(_bottleneck(fa.PfeifferConfig), 1e-4, 10, "arXiv:2005.00247, section 4"),
    "parallel": Recipe(_bottleneck(fa.ParallelConfig), 1e-4, 10, _HE),
    "lora": Recipe(_lora, 4e-4, 10, "arXiv:2106.09685, table 9 (CoLA, STS-B)"),
    "bitfit": Recipe(_plain(fa.BitFitConfig), 4e-4, 10, "of the paper's 1e-4 to 1e-3 (arXiv:2106.10199, appendix)"),
    "prefix": Recipe(_prefix, 1e-4, 10, _HE),
    "mam": Recipe(_mam, 1e-4, 10, _HE),
    "masked": Recipe(_bottleneck(fa.MaskedAdapterConfig), 3e-4, 10, "as houlsby, whose form it has"),
    "adapterdrop": Recipe(
        _bottleneck(fa.PfeifferConfig, drop=fa.AdapterDrop()), 1e-4, 10, "arXiv:2010.11918, appendix"
    ),
    "fusion": Recipe(None, 5e-5, 10, "arXiv:2005.00247, section 4; its adapters as pfeiffer"),
    "layernorm": Recipe(_plain(fa.LayerNormConfig), 3e-4, 10, "as houlsby, of whose paper it is the baseline"),
    "head": Recipe(_plain(fa.HeadConfig), 1e-3, 10, "own choice"),
    "full": Recipe(None, 2e-5, 3, "the lowest of BERT's 2e-5 to 5e-5 (arXiv:1810.04805, appendix A.3)"),
}


def configuration(method: str, size: Size) -> Any:
    """The method's configuration; a field that it has not, or a bad value, is told as one line."""
    try:
        return RECIPES[method].make(size)
    except (TypeError, ValueError) as error:
        raise UserError(f"--method {method}: {error}") from None


def fusion(adapters: tuple[str, ...], size: Size) -> fa.FusionConfig:
    """The mix of adapters that ``--method fusion`` trains."""
    try:
        return fa.FusionConfig(adapters, **size.fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"--method fusion: {error}") from None


def parse_field(text: str) -> tuple[str, Any]:
    """``FIELD=VALUE`` of ``--set``: a Python literal, or a word as it is."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"got {text!r}; accepted is FIELD=VALUE")
    if name == "drop":
        return name, fa.AdapterDrop(**dict(parse_field(part) for part in value.split(",")))
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def table() -> list[tuple[str, str, str, str]]:
    """(method, learning rate, epochs, source) of every method."""
    return [(name, f"{r.lr:g}", str(r.epochs), r.source) for name, r in RECIPES.items()]


def describe(config: Any) -> dict[str, Any]:
    """A configuration for the report: the fields that are not at their default."""
    default = {f.name: f.default for f in dataclasses.fields(config)}
    changed = {k: getattr(config, k) for k, v in default.items() if getattr(config, k) != v}
    return {"class": type(config).__name__, **{k: repr(v) for k, v in changed.items()}}
