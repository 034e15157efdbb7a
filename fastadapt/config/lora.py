"""Low-rank adaptation of linear layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fastadapt.config.checks import choice, different, finite, is_number, positive, several

TARGETS: tuple[str, ...] = ("query", "key", "value", "attention_output", "intermediate", "output")
INITS: tuple[str, ...] = ("kaiming", "gaussian")
BIASES: tuple[str, ...] = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA: y = Wx + b + s·B A drop(x), s = α/r (arXiv:2106.09685, eq. 3).

    Args:
        r: rank.
        alpha: α, a number above 0.
        targets: which linear layers of every layer: of ``query``, ``key``, ``value``, ``attention_output``,
            ``intermediate`` and ``output``. A path of the base model (``encoder.layer.0.attention.self.query``,
            ``pooler.dense``) stands for that one layer.
        dropout: of what A reads, in training; every target draws its own mask.
        init: of A: ``"kaiming"`` (uniform, a = √5, as PEFT), or ``"gaussian"`` (std 1/r). B is zero.
        rslora: s = α/√r (arXiv:2312.03732).
        dora: y = m·(W + s·BA)x/‖W + s·BA‖ + b, the norm taken over each row of the weight and not differentiated; m
            starts at ‖W‖ (arXiv:2402.09353, eq. 5 and 11).
        bias: which biases train with it, as copies of the adaptation's own: ``"none"``, those of the targets
            (``"lora_only"``), or ``"all"`` of the base.
        rank_pattern, alpha_pattern: another r or α for some targets: a mapping from one of the names above, or from a
            path or a regular expression for the end of one (as PEFT has it), to the number. The first that fits counts.

    Raises:
        ValueError, TypeError: naming the field, what was given and what is accepted.
    """

    r: int = 8
    alpha: float = 8
    targets: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rslora: bool = False
    dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive("r", self.r)
        finite("alpha", self.alpha, above=0)
        self._check_targets()
        if not is_number(self.dropout) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout: got {self.dropout!r}; accepted is a probability from 0 to 1")
        choice("init", self.init, INITS)
        choice("rslora", self.rslora, (True, False))
        choice("dora", self.dora, (True, False))
        choice("bias", self.bias, BIASES)
        self._check_pattern("rank_pattern", positive)
        self._check_pattern("alpha_pattern", partial(finite, above=0))

    def _check_targets(self) -> None:
        accepted = f"some of {', '.join(TARGETS)}, or paths of linear layers in the base model"
        targets = several("targets", self.targets, accepted)
        if not targets or not different(targets) or any(t not in TARGETS and "." not in t for t in targets):
            raise ValueError(f"targets: got {self.targets!r}; accepted are {accepted}, each once")
        object.__setattr__(self, "targets", targets)

    def _check_pattern(self, name: str, check: Any) -> None:
        given = getattr(self, name)
        if not isinstance(given, Mapping):
            raise TypeError(f"{name}: got {given!r}; accepted is a mapping from targets to numbers")
        for key, value in given.items():
            if not isinstance(key, str):
                raise TypeError(f"{name}: got the key {key!r}; accepted are strings")
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{name}: got the key {key!r}, which is no regular expression: {error}") from None
            check(f"{name}[{key!r}]", value)
        object.__setattr__(self, name, dict(given))

    def rank(self, target: str, path: str) -> int:
        """r of the linear layer at ``path``, one of those that ``target`` names."""
        return _first(self.rank_pattern, target, path, self.r)

    def scale(self, target: str, path: str) -> float:
        """s of the linear layer at ``path``."""
        rank = self.rank(target, path)
        return self.alpha_of(target, path) / (math.sqrt(rank) if self.rslora else rank)

    def alpha_of(self, target: str, path: str) -> float:
        """α of the linear layer at ``path``."""
        return _first(self.alpha_pattern, target, path, self.alpha)


def fits(key: str, target: str, path: str) -> bool:
    """Whether a pattern's key means this layer: by the target's name, or as PEFT has it by the end of the path."""
    return key in (target, path) or re.match(rf"(.*\.)?({key})$", path) is not None


def _first(pattern: Mapping[str, Any], target: str, path: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if fits(key, target, path)), default)
