"""Prefix tuning, and its mix with parallel adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastadapt.config.bottleneck import BottleneckConfig, ParallelConfig
from fastadapt.config.checks import choice, is_number, layer_numbers, positive
from fastadapt.ops.activations import canonical


@dataclass(frozen=True)
class PrefixConfig:
    """Learned keys and values before those of every self-attention (Li and Liang 2021, arXiv:2101.00190).

    P = W₂ σ(W₁ e), one e and W₁ for all layers; positions are not shifted and the prefix is never masked.

    Args:
        length: positions of the prefix.
        bottleneck: width of the reparametrisation.
        flat: learn P itself.
        activation: σ, a name of ``fastadapt.ops.ACTIVATIONS`` or an alias of one.
        dropout: on P, in training, an own mask for each row of a batch.
        leave_out: layers, counted from 0, without a prefix.

    Raises:
        ValueError, TypeError: naming the field, what was given and what is accepted.
    """

    length: int = 30
    bottleneck: int = 512
    flat: bool = False
    activation: str = "tanh"
    dropout: float = 0.0
    leave_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive("length", self.length)
        positive("bottleneck", self.bottleneck)
        choice("flat", self.flat, (True, False))
        canonical(self.activation)
        if not is_number(self.dropout) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout: got {self.dropout!r}; accepted is a probability from 0 to 1")
        object.__setattr__(self, "leave_out", layer_numbers("leave_out", self.leave_out))


@dataclass(frozen=True)
class MAMConfig:
    """Mix-and-match: prefix tuning and a scaled parallel adapter (He et al. 2022, arXiv:2110.04366, section 4.6).

    Args:
        prefix: of the self-attentions; the paper's is of length 30.
        parallel: beside the feed-forward networks; the paper's has b = 512 and s = 4.

    Raises:
        TypeError: naming the field, what was given and what is accepted.
    """

    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    parallel: BottleneckConfig = field(default_factory=lambda: ParallelConfig(bottleneck=512))

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, PrefixConfig):
            raise TypeError(f"prefix: got {self.prefix!r}; accepted is a PrefixConfig")
        if not isinstance(self.parallel, BottleneckConfig):
            raise TypeError(f"parallel: got {self.parallel!r}; accepted is a ParallelConfig or another bottleneck's")
