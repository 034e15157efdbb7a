"""What of the active adaptations runs in one sublayer, and the parts that adaptations are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from fastadapt.modules.bias import Bias
    from fastadapt.modules.bottleneck import Site
    from fastadapt.modules.fusion import Fusion
    from fastadapt.modules.lora import LoRA
    from fastadapt.modules.prefix import Prefix
    from fastadapt.modules.step import Step


@dataclass(eq=False)
class Active:
    """A plain attribute of a fused sublayer, made anew whenever another adaptation is activated; what it is in routed
    batches each adaptation keeps (:meth:`Adaptation.actives`).

    It refers to parts that live in the model's container, so that copies and pickles of a model keep the two in step.

    Args:
        site: adapter, copy of the sublayer's LayerNorm, or both; or a mix of adapters.
        loras: a linear child's name -> the LoRAs that add to it, summed.
        biases: a linear child's name -> the part whose bias runs instead of its own.
        prefix: keys and values before the sublayer's own.
        norm: the part whose bias runs instead of the LayerNorm's.
        merged: the LoRAs that are merged into the weights now, and therefore not among ``loras``.
    """

    site: Site | Fusion | None = None
    loras: dict[str, list[LoRA]] = field(default_factory=dict)
    biases: dict[str, LoRA | Bias] = field(default_factory=dict)
    prefix: Prefix | None = None
    norm: Bias | None = None
    merged: dict[str, list[LoRA]] = field(default_factory=dict)

    @property
    def norm_bias(self) -> nn.Parameter | None:
        """The bias that runs instead of the LayerNorm's."""
        return None if self.norm is None else self.norm.bias

    def bias(self, child: str, own: nn.Parameter | None) -> nn.Parameter | None:
        """What runs as the bias of a linear child, whose own is ``own``."""
        part = self.biases.get(child)
        return own if part is None else part.bias

    def touches(self, child: str) -> bool:
        """Whether that linear child computes something else than its own weights say."""
        return child in self.loras or child in self.biases or child in self.merged

    def rank(self, children: Iterable[str]) -> int:
        """Ranks of the LoRAs of these children, in all."""
        return sum(part.rank for name in children for part in self.loras.get(name, ()))


class Part(nn.Module):
    """What an adaptation owns at one place: a sublayer, or one of its children.

    A class or an instance sets ``step`` where it has to know the running forward, ``has_loss`` where it adds to the
    loss, and ``averaged`` where that is a mean over parts and no sum.
    """

    step: Step | None = None
    has_loss: bool = False
    averaged: bool = False

    def join(self, active: Active, child: str) -> None:
        """Take the own place in what runs in the sublayer; ``child`` is the part's path in it, "" for the sublayer."""
        raise NotImplementedError

    def take_loss(self) -> Tensor | None:
        """What this part adds to the loss of the forward that has just run, once."""
        return None

    def training_only(self) -> list[nn.Parameter]:
        """Parameters without a use at inference, counted apart."""
        return []
