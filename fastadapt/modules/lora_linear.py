"""LoRA as a layer, for models that no wiring knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.config.lora import LoRAConfig
from fastadapt.modules.lora import LoRA, draw
from fastadapt.modules.merged import Merged, changes
from fastadapt.modules.plain import replaced


class LoRALinear(nn.Linear):
    """``nn.Linear`` with a frozen weight and bias, and a LoRA beside them: y = Wx + b + s·B A drop(x).

    Keys of its ``state_dict``: ``weight`` [out, in], ``bias`` [out], ``lora_A.weight`` [r, in], ``lora_B.weight``
    [out, r]. LoRA is Hu et al. 2021 (arXiv:2106.09685, eq. 3).

    Args:
        in_features, out_features, bias, device, dtype: as of ``nn.Linear``.
        r: rank, at most the smaller of both features.
        alpha: α; s = α/r.
        dropout: of what A reads, in training.
        init: of A, ``"kaiming"`` or ``"gaussian"``; B is zero.
        rslora: s = α/√r.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted.
    """

    lora_magnitude_vector = None  # as a LoRA's: this is no DoRA

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        init: Literal["kaiming", "gaussian"] = "kaiming",
        rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = LoRAConfig(r=r, alpha=alpha, dropout=dropout, init=init, rslora=rslora)
        _check_rank(r, in_features, out_features)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._add(config)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        *,
        init: Literal["kaiming", "gaussian"] = "kaiming",
        rslora: bool = False,
    ) -> LoRALinear:
        """One around an existing layer: it shares its weight and bias, the same parameters, which it freezes.

        Args:
            linear: of floating weights, and plain: no subclass, hooks or forward of its own, which would be left out.
            r, alpha, dropout, init, rslora: as of the class.

        Raises:
            ValueError, TypeError: naming the argument, what was given and what is accepted.
        """
        kind = type(linear)
        if kind is not nn.Linear:
            name = kind.__name__ if kind.__name__ != nn.Linear.__name__ else f"{kind.__module__}.{kind.__name__}"
            raise TypeError(f"linear: got {name}; accepted is a plain nn.Linear")
        if reason := replaced(linear, nn.Linear):
            raise ValueError(f"linear: {reason}; accepted is a plain nn.Linear")
        if not linear.weight.is_floating_point():
            raise TypeError(f"linear: has weights of {linear.weight.dtype}; accepted are floating ones")
        config = LoRAConfig(r=r, alpha=alpha, dropout=dropout, init=init, rslora=rslora)
        _check_rank(r, linear.in_features, linear.out_features)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        module.weight, module.bias = linear.weight, linear.bias
        module._add(config)
        module.train(linear.training)
        return module

    def _add(self, config: LoRAConfig) -> None:
        part = LoRA(self, config.r, config.alpha / (math.sqrt(config.r) if config.rslora else config.r),
                    dropout=config.dropout, init=config.init)  # fmt: skip
        self.lora_A, self.lora_B = part.lora_A, part.lora_B
        self.scale, self.dropout, self.init = part.scale, part.dropout, config.init
        self._merge: Merged | None = None
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw everything anew from PyTorch's generator, as at construction."""
        if "lora_A" in self._modules:
            if self.merged:
                raise ValueError("reset_parameters: the LoRA is merged into the weight; unmerge first")
            draw(self.lora_A.weight, self.lora_B.weight, self.init)
        super().reset_parameters()

    @property
    def merged(self) -> bool:
        """Whether the LoRA is merged into the weight now."""
        return self._merge is not None

    def merge(self, exact: bool = True) -> LoRALinear:
        """W += s·BA in place, rounded once; the forward is a plain linear layer's until :meth:`unmerge`.

        Args:
            exact: keep about one byte a weight, with which :meth:`unmerge` gives back every bit of W.

        Raises:
            ValueError, TypeError: where it is merged already, for NaN or infinity, and for a weight that is on meta,
                not contiguous, or of another dtype than float32, bfloat16 and float16; nothing is changed.
        """
        if self.merged:
            raise ValueError("merge: the LoRA is merged already; accepted is unmerge")
        self._merge = Merged({"LoRALinear": (self, [self])}, exact=exact)
        return self

    def unmerge(self) -> LoRALinear:
        """Take out what :meth:`merge` put in, whatever happened to A and B since.

        Raises:
            ValueError: where nothing is merged, and where the weight was written since.
        """
        if not self.merged:
            raise ValueError("unmerge: nothing is merged; accepted is merge")
        self._merge.take_out()
        self._merge = None
        return self

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            if self.training and torch.is_grad_enabled() and self.lora_A.weight.requires_grad:
                raise RuntimeError("LoRALinear: a merged LoRA can't train; call unmerge, or eval")
            return ops.linear(input, self.weight, self.bias)
        dropout_p = self.dropout if self.training else 0.0
        term = ops.LowRank(self.lora_A.weight, self.lora_B.weight, self.scale, dropout_p=dropout_p)
        return ops.linear(input, self.weight, self.bias, loras=[term])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        # What was kept for the way back is of this dtype and on this device.
        if self.merged and changes(self.weight, fn):
            self.unmerge()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            args[-1].append(f"{prefix}weight: an adaptation is merged into it; call unmerge before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, r={self.lora_A.out_features}, scale={self.scale:g}{merged}"


def _check_rank(r: int, in_features: int, out_features: int) -> None:
    if r > min(in_features, out_features):
        raise ValueError(
            f"r: got {r} for {in_features} to {out_features} features; accepted is up to "
            f"{min(in_features, out_features)}"
        )
