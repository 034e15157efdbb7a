"""Tuning of what the base already has: biases, LayerNorms, or nothing but the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastadapt.config.checks import choice, different, several

TERMS: tuple[str, ...] = (
    "query",
    "key",
    "value",
    "attention_output",
    "attention_layer_norm",
    "intermediate",
    "output",
    "output_layer_norm",
    "embeddings_layer_norm",
    "embeddings_project",
    "pooler",
)


@dataclass(frozen=True)
class BitFitConfig:
    """Own copies of the biases train, and the head (Ben Zaken et al. 2022, arXiv:2106.10199).

    Args:
        terms: which biases: ``"all"`` that the model has, or some of ``query key value attention_output intermediate
            output`` (linear layers), ``attention_layer_norm output_layer_norm embeddings_layer_norm`` (LayerNorms),
            ``pooler`` and ``embeddings_project`` (where a model has them). The paper's small set is
            ``("query", "intermediate")``.

    Raises:
        ValueError, TypeError: naming the field, what was given and what is accepted.
    """

    terms: Literal["all"] | tuple[str, ...] = "all"

    def __post_init__(self) -> None:
        if self.terms == "all":
            return
        accepted = f"'all' or some of {', '.join(TERMS)}"
        terms = several("terms", self.terms, accepted)
        if not terms or not different(terms) or any(t not in TERMS for t in terms):
            raise ValueError(f"terms: got {self.terms!r}; accepted are {accepted}, each once")
        object.__setattr__(self, "terms", terms)


@dataclass(frozen=True)
class LayerNormConfig:
    """Own copies of the pretrained LayerNorms train, and the head: the small baseline of Houlsby et al. 2019, fig. 3.

    Args:
        layer_norms: ``"encoder"``, or ``"all"`` (the embeddings' too).

    Raises:
        ValueError: naming the field, what was given and what is accepted.
    """

    layer_norms: Literal["encoder", "all"] = "encoder"

    def __post_init__(self) -> None:
        choice("layer_norms", self.layer_norms, ("encoder", "all"))


@dataclass(frozen=True)
class HeadConfig:
    """The head trains and nothing else: the baseline that every paper compares with."""
