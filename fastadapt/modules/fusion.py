"""AdapterFusion at one sublayer, computed in the bottleneck.

With a_n = U_n σ_n + β_n, σ_n = σ(W_down,n u + b_down,n), U_n and β_n with the adapter's scale in them:

    q·k_n     = (U_nᵀ W_kᵀ q)·σ_n + (W_kᵀ q)·β_n + q·b_k
    Σ p_n W_v a_n = W_v (Σ U_n (p_n σ_n) + Σ p_n β_n)

so that no a_n is ever made and 2N + 1 products of H by H become three. While nothing trains, and so no score is
dropped, q·b_k is the same for every n and cancels, and the rest folds into U_nᵀ W_kᵀ W_q and W_v U_n: none is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import dispatch, ops
from fastadapt.config import FusionConfig
from fastadapt.modules.active import Active, Part
from fastadapt.modules.bottleneck import Site, norm_of_sum
from fastadapt.modules.folded import Folded
from fastadapt.modules.plain import replaced
from fastadapt.ops.activations import activate
from fastadapt.ops.schemas import accumulation_dtype

_BERT_STD = 0.02


@dataclass(frozen=True, eq=False)
class _Stack:
    """All adapters side by side: [N·b, H], [N·b], and W_up and b_up as [H, N·b + N]."""

    down: Tensor
    b_down: Tensor
    both: Tensor


@dataclass(frozen=True, eq=False)
class _Products:
    """What is left at inference: scores from [N·b + N, H], [N·b + N]; the output from [H, N·b + N]."""

    score: Tensor
    b_score: Tensor
    out: Tensor


class Fusion(Part):
    """The mix of N adapters.

    Args:
        config: the adaptation's configuration.
        hidden: H.
        dropout: of the scores, in training.
        sites: the adapters, which belong to other adaptations.
        device, dtype: of the new parameters.
    """

    LayerNorm = None

    def __init__(
        self,
        config: FusionConfig,
        hidden: int,
        dropout: float,
        sites: Sequence[Site],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.config, self.dropout = config, dropout
        self.__dict__["sites"] = list(sites)
        self.count, self.width, self.activation = len(sites), sites[0].down.out_features, sites[0].activation
        self.query = self.key = self.value = self.mix = None
        if config.mix == "attention":
            self.query, self.key = nn.Linear(hidden, hidden, **kind), nn.Linear(hidden, hidden, **kind)
            for linear in (self.query, self.key):
                nn.init.normal_(linear.weight, std=_BERT_STD)
                nn.init.zeros_(linear.bias)
            if config.value:
                self.value = nn.Linear(hidden, hidden, bias=False, **kind)
                nn.init.eye_(self.value.weight)
        elif config.mix == "weights" and config.weights is None:
            self.mix = nn.Parameter(torch.full((self.count,), 1.0 / self.count, **kind))
        self._folded_stack, self._folded_products = Folded(), Folded()

    def join(self, active: Active, child: str) -> None:
        active.site = self

    def borrowed(self) -> list[Site]:
        return self.sites

    def asleep(self) -> bool:
        return False

    def rows(self) -> None:
        return None

    def ops(self, hidden: int) -> list[tuple[str, dict[str, int]]]:
        norm, stacked = ("add_norm", {"hidden": hidden}), self.count * self.width
        if self.config.mix != "attention":
            return [norm, ("bottleneck", {"hidden": hidden, "bottleneck": stacked})]
        mixed = ("mix", {"adapters": self.count, "bottleneck": self.width})
        products = [("linear", {"features": hidden})] * 2
        return [norm, *products, mixed, ("linear", {"features": stacked + self.count}), norm]

    @property
    def has_loss(self) -> bool:
        return self.value is not None and self.config.regularization > 0.0

    def take_loss(self) -> Tensor | None:
        if not self.has_loss or not self.value.weight.requires_grad:
            return None
        weight = self.value.weight.to(accumulation_dtype(self.value.weight.dtype))
        identity = torch.eye(weight.shape[0], device=weight.device, dtype=weight.dtype)
        return self.config.regularization * (identity - weight).square().sum()

    def forward(self, f: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
        """The sublayer's output; arguments as in :meth:`Site.forward`."""
        u, total = norm_of_sum(f, x, norm)
        borrowed = self._borrowed()
        own = list(self.parameters())
        grad = torch.is_grad_enabled()
        adapters_train = grad and any(p.requires_grad for p in borrowed)
        if self.config.mix != "attention":
            return self._summed(u, total, norm, borrowed, own)
        trains = adapters_train or (grad and (u.requires_grad or any(p.requires_grad for p in own)))
        trains = trains or dispatch.transformed()  # what is folded for inference would lose tangents
        if not trains and (not self.training or self.dropout == 0.0):
            return _closed(self._inferred(u, borrowed, own), total, norm)
        stack = self._stacked() if adapters_train else self._folded_stack.get(borrowed, self._stacked)
        return _closed(self._attended(u, stack, adapters_train), total, norm)

    def _borrowed(self) -> list[Tensor]:
        found = []
        for site in self.sites:
            found += [site.down.weight, site.down.bias, site.up.weight, site.up.bias]
            if isinstance(site.scale, Tensor):
                found.append(site.scale)
        return found

    # -- the mixes -----------------------------------------------------------------------------------------------

    def _attended(self, u: Tensor, stack: _Stack, adapters_train: bool) -> Tensor:
        """Σ p_n W_v a_n, every step differentiable."""
        if adapters_train:
            sigma = activate(self.activation, F.linear(u, stack.down, stack.b_down))
        else:
            sigma = ops.linear(u, stack.down, stack.b_down, activation=self.activation)
        q = self.query(u)
        t = F.linear(F.linear(q, self.key.weight.T), stack.both.T)
        shift = F.linear(q, self.key.bias[None]).squeeze(-1)
        mixed = ops.mix(sigma, t, self.count, shift=shift, dropout_p=self.dropout if self.training else 0.0)
        o = F.linear(mixed, stack.both)
        return o if self.value is None else self.value(o)

    def _inferred(self, u: Tensor, borrowed: list[Tensor], own: list[Tensor]) -> Tensor:
        """The same without a score dropped and without a gradient."""
        stack = self._folded_stack.get(borrowed, self._stacked)
        products = self._folded_products.get([*own, *borrowed], lambda: self._products(stack))
        with torch.no_grad():
            sigma = ops.linear(u, stack.down, stack.b_down, activation=self.activation)
            t = ops.linear(u, products.score, products.b_score)
            return ops.linear(ops.mix(sigma, t, self.count), products.out)

    def _summed(self, u: Tensor, total: Tensor, norm: nn.Module, borrowed: list[Tensor], own: list[Tensor]) -> Tensor:
        """LN(Σ w_n a_n + total): one bottleneck of width N·b."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in (*borrowed, *own))
        stack, up, b_up = self._weighted() if trains else self._folded_products.get([*own, *borrowed], self._weighted)
        fused = replaced(norm, nn.LayerNorm) is None
        y = ops.bottleneck(
            u,
            stack.down,
            stack.b_down,
            up,
            b_up,
            activation=self.activation,
            skip=False,
            residual=total,
            norm_weight=norm.weight if fused else None,
            norm_bias=norm.bias if fused else None,
            eps=norm.eps if fused else 1e-12,
        )
        return y if fused else norm(y)

    # -- what is folded ------------------------------------------------------------------------------------------

    def _stacked(self) -> _Stack:
        sites = self.sites
        return _Stack(
            torch.cat([s.down.weight for s in sites]),
            torch.cat([s.down.bias for s in sites]),
            torch.cat(
                [s.up.weight * _column(s.scale) for s in sites] + [(s.up.bias * s.scale)[:, None] for s in sites], dim=1
            ),
        )

    def _weighted(self) -> tuple[_Stack, Tensor, Tensor]:
        stack = self._stacked()
        if self.mix is not None:
            weights = self.mix
        else:
            fixed = self.config.weights or [1.0 / self.count] * self.count
            weights = torch.tensor(fixed, device=stack.both.device, dtype=stack.both.dtype)
        up, b_up = stack.both.split([self.count * self.width, self.count], dim=1)
        return stack, up * weights.repeat_interleave(self.width), b_up @ weights

    def _products(self, stack: _Stack) -> _Products:
        dtype = stack.both.dtype
        wide = accumulation_dtype(dtype)
        both = stack.both.to(wide)
        keys = (self.key.weight.to(wide) @ both).T  # what q is multiplied with
        out = both if self.value is None else self.value.weight.to(wide) @ both
        score = keys @ self.query.weight.to(wide)
        return _Products(score.to(dtype), (keys @ self.query.bias.to(wide)).to(dtype), out.to(dtype).contiguous())


def _column(scale: float | Tensor) -> float | Tensor:
    return scale[:, None] if isinstance(scale, Tensor) else scale


def _closed(o: Tensor, total: Tensor, norm: nn.Module) -> Tensor:
    if replaced(norm, nn.LayerNorm) is None:
        return ops.add_norm(o, total, norm.weight, norm.bias, eps=norm.eps)
    return norm(o + total)
