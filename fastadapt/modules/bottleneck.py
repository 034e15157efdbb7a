"""What a bottleneck adaptation owns at one sublayer: the adapter, and its copy of the sublayer's LayerNorm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.config import BottleneckConfig
from fastadapt.modules.active import Active, Part
from fastadapt.modules.plain import parameter, replaced
from fastadapt.ops.activations import canonical

if TYPE_CHECKING:
    from fastadapt.modules.step import Step

_HOULSBY_STD = 1e-3
_BERT_STD = 0.02


class Site(Part):
    """An adapter after (or beside) a sublayer, a trainable copy of that sublayer's LayerNorm, or both.

    Args:
        config: the adaptation's configuration.
        hidden: H.
        width: b, or None where the adapter is left out and only the LayerNorm is owned.
        norm: the pretrained LayerNorm to copy, or None to go on using the model's.
        device, dtype: of the new parameters.
    """

    def __init__(
        self,
        config: BottleneckConfig,
        hidden: int,
        width: int | None,
        norm: nn.LayerNorm | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.config = config
        self.down = self.up = self.gate = self.norm_before = self.norm_after = self.LayerNorm = None
        self.activation = canonical(config.activation)
        self.scale: float | nn.Parameter = 1.0
        if width is not None:
            self.down, self.up = nn.Linear(hidden, width, **kind), nn.Linear(width, hidden, **kind)
            self.gate = nn.Linear(hidden, 1, **kind) if config.gate else None
            self.norm_before = nn.LayerNorm(hidden, **kind) if config.ln_before else None
            self.norm_after = nn.LayerNorm(hidden, **kind) if config.ln_after else None
            if isinstance(config.scale, str):
                size = 1 if config.scale == "learned" else hidden
                del self.scale
                self.scale = nn.Parameter(torch.ones(size, **kind))
            else:
                self.scale = float(config.scale)
            self.initialise()
        if norm is not None:
            self.LayerNorm = nn.LayerNorm(hidden, eps=norm.eps, **kind)
            with torch.no_grad():
                self.LayerNorm.weight.copy_(norm.weight)
                self.LayerNorm.bias.copy_(norm.bias)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the adapter's weights from PyTorch's generator, as ``config.init`` says."""
        down, up = self.down.weight, self.up.weight
        if self.config.init == "houlsby":
            for w in (down, up):
                nn.init.trunc_normal_(w, std=_HOULSBY_STD, a=-2 * _HOULSBY_STD, b=2 * _HOULSBY_STD)
        elif self.config.init == "bert":
            for w in (down, up):
                nn.init.normal_(w, std=_BERT_STD)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.zeros_(up)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=_BERT_STD)
            nn.init.zeros_(self.gate.bias)

    def join(self, active: Active, child: str) -> None:
        active.site = self

    def up_weight(self) -> Tensor:
        """W_up, [H, b]."""
        return parameter(self._modules["up"], "weight")

    def ops(self, hidden: int) -> list[tuple[str, dict[str, int]]]:
        """The ops that run here after the sublayer's product, and the facts by which their backends are picked."""
        if self.down is None:
            return [("add_norm", {"hidden": hidden})]
        return [("bottleneck", {"hidden": hidden, "bottleneck": self.down.out_features})]

    def form(self) -> str | None:
        """The one op that this adapter is: ``"after"`` reads f, ``"beside"`` reads x, ``"normed"`` reads LN(f + x).

        None where it takes several ops, or has another sum.
        """
        config = self.config
        if not config.original_ln_after or any(m is not None for m in (self.gate, self.norm_before, self.norm_after)):
            return None
        if config.parallel:
            return "beside"
        if not config.original_ln_before:
            return "after"
        return "normed" if config.residual_before_ln is True and self.LayerNorm is None else None

    def slot(self, norm_weight: Tensor, norm_bias: Tensor, *, skip: bool) -> ops.Slot:
        """This adapter as what some rows of a batch have; f and x, or for ``"normed"`` LN(f + x) and f + x, are given
        to the op."""
        return ops.Slot(
            norm_weight,
            norm_bias,
            self.down.weight,
            self.down.bias,
            self.up_weight(),
            self.up.bias,
            activation=self.activation,
            scale=self.scale,
            skip=skip,
            swap=self.config.parallel,
            dropout_p=self.config.dropout if self.training else 0.0,
        )

    def follow(self, step: Step, layer: int) -> None:
        """Know the running forward; ``layer`` is the own one, -1 for the embeddings."""
        self.__dict__["step"], self.layer = step, layer

    def asleep(self) -> bool:
        """Whether the base alone runs here, in this forward, for every row."""
        return self.step is not None and self.step.dropped(self.layer)

    def rows(self) -> Tensor | None:
        """[B] on the CPU: the rows of this forward that are adapted here; None where it is all of them."""
        return None if self.step is None else self.step.rows(self.layer)

    def forward(self, f: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
        """The sublayer's output.

        Args:
            f: [B, S, H], the sublayer's output after its dropout.
            x: [B, S, H], the sublayer's input.
            norm: the LayerNorm that closes the sublayer.
        """
        if self._modules.get("down") is None:
            return norm_of_sum(f, x, norm)[0]
        config = self.config
        outer = x if config.original_ln_after else None  # what joins the sum under the closing LayerNorm
        joined = None  # own + outer, where it is at hand
        if config.parallel:
            read, own = x, f
        elif not config.original_ln_before:
            read = own = f
        else:
            read, total = norm_of_sum(f, x, norm)
            own = {True: f, "post_add": total, False: read}[config.residual_before_ln]
            if own is f and outer is not None:
                joined = total
        closing = norm if config.original_ln_after else None

        if self.gate is None and self.norm_after is None:
            if self.norm_before is not None:
                return self._adapter(self.norm_before(read), joined=_sum(joined, own, outer), norm=closing)
            if joined is not None:
                return self._adapter(read, joined=joined, norm=closing)
            if read is own:
                return self._adapter(read, skip=True, joined=outer, norm=closing)
            if read is outer:
                return self._adapter(read, skip=True, joined=own, norm=closing)
            return self._adapter(read, joined=_sum(None, own, outer), norm=closing)

        y = self._adapter(read if self.norm_before is None else self.norm_before(read))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(read)).mean(1, keepdim=True)
        # Beside a sublayer f joins after the new LayerNorm; after one, where the configuration says.
        under = config.adapter_residual_before_ln and not config.parallel
        if under:
            y = y + own
        if self.norm_after is not None:
            y = self.norm_after(y)
        rest = outer if under else _sum(joined, own, outer)
        if closing is None:
            return y if rest is None else y + rest
        return norm_of_sum(y, rest, closing)[0]

    def _adapter(
        self, read: Tensor, *, skip: bool = False, joined: Tensor | None = None, norm: nn.Module | None = None
    ) -> Tensor:
        fused = norm is not None and replaced(norm, nn.LayerNorm) is None
        down, up = self._modules["down"], self._modules["up"]
        y = ops.bottleneck(
            read,
            parameter(down, "weight"),
            parameter(down, "bias"),
            self.up_weight(),
            parameter(up, "bias"),
            activation=self.activation,
            scale=self.scale,
            skip=skip,
            residual=joined,
            norm_weight=parameter(norm, "weight") if fused else None,
            norm_bias=parameter(norm, "bias") if fused else None,
            eps=norm.eps if fused else 1e-12,
            dropout_p=self.config.dropout if self.training else 0.0,
        )
        return y if fused or norm is None else norm(y)


def _sum(joined: Tensor | None, own: Tensor, outer: Tensor | None) -> Tensor:
    if joined is not None:
        return joined
    return own if outer is None else own + outer


def norm_alone(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LN(x), where nothing is added to x: PyTorch's own on a GPU, where it is as good as can be."""
    if x.device.type == "cpu":
        return ops.add_norm(x, None, weight, bias, eps=eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def norm_of_sum(f: Tensor, x: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(LN(f + x), f + x)."""
    if replaced(norm, nn.LayerNorm) is None:
        return ops.add_norm(f, x, norm.weight, norm.bias, eps=norm.eps, return_sum=True)
    total = f if x is None else f + x
    return norm(total), total
