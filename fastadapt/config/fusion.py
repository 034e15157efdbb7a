"""AdapterFusion: several adapters of a model, mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastadapt.config.checks import choice, different, finite, is_number, several


@dataclass(frozen=True)
class FusionConfig:
    """A mix of adapters after the feed-forward network (Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2).

    Attention: q = W_q u + b_q with u = LN(f + x), k_n = W_k a_n + b_k, p = softmax_n(drop(q·k_n)), and
    y = LN(Σ p_n W_v a_n + f + x), where a_n is the output of adapter n. The adapters stay as they are, unless
    ``train_adapters``.

    Args:
        adapters: names of adaptations of the model, of Pfeiffer's form and one width.
        mix: ``"attention"``, ``"average"`` (Σ a_n / N) or ``"weights"`` (Σ w_n a_n).
        weights: of ``"weights"``: a number for each adapter, or None for learned ones, a set for each layer, that
            start at 1/N.
        value: whether there is a W_v; it starts at the identity.
        dropout: on the scores, in training; None is the model's own of attention probabilities.
        regularization: λ of λ·‖I - W_v‖², which joins the model's loss in training.
        train_adapters: train the adapters with the mix.

    Raises:
        ValueError, TypeError: naming the field, what was given and what is accepted.
    """

    adapters: tuple[str, ...]
    mix: Literal["attention", "average", "weights"] = "attention"
    weights: tuple[float, ...] | None = None
    value: bool = True
    dropout: float | None = None
    regularization: float = 0.01
    train_adapters: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.adapters, str) or not isinstance(self.adapters, (list, tuple)):
            raise TypeError(f"adapters: got {self.adapters!r}; accepted is a list of names")
        names = tuple(self.adapters)
        if len(names) < 2 or not different(names):
            raise ValueError(f"adapters: got {self.adapters!r}; accepted are two different names or more")
        object.__setattr__(self, "adapters", names)
        choice("mix", self.mix, ("attention", "average", "weights"))
        if self.weights is not None:
            if self.mix != "weights":
                raise ValueError(f"weights: got {self.weights!r}; accepted with mix={self.mix!r} is None")
            accepted = f"None and {len(names)} numbers"
            weights = several("weights", self.weights, accepted)
            if len(weights) != len(names):
                raise ValueError(f"weights: got {self.weights!r}; accepted are {accepted}")
            for i, w in enumerate(weights):
                finite(f"weights[{i}]", w)
            object.__setattr__(self, "weights", tuple(float(w) for w in weights))
        for field in ("value", "train_adapters"):
            choice(field, getattr(self, field), (True, False))
        if self.dropout is not None and (not is_number(self.dropout) or not 0.0 <= self.dropout <= 1.0):
            raise ValueError(f"dropout: got {self.dropout!r}; accepted are None and a probability from 0 to 1")
        finite("regularization", self.regularization, 0)
