"""The reference backend: the plain PyTorch form of every op, on any device, in any floating dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastadapt.ops.attention import attention_backward, attention_forward
from fastadapt.ops.bottleneck import bottleneck_backward, bottleneck_forward
from fastadapt.ops.bottleneck_rows import bottleneck_rows_backward, bottleneck_rows_forward
from fastadapt.ops.dropout import dropout as drop
from fastadapt.ops.linear import linear_backward, linear_forward
from fastadapt.ops.lora import lora_backward, lora_forward
from fastadapt.ops.merge import remerge_
from fastadapt.ops.mix import mix_backward, mix_forward
from fastadapt.ops.norm import add_norm_backward, add_norm_forward

__all__ = [
    "add_norm_backward", "add_norm_forward", "attention_backward", "attention_forward", "bottleneck_backward",
    "bottleneck_forward", "bottleneck_rows_backward", "bottleneck_rows_forward", "drop", "linear_backward",
    "linear_forward", "lora_backward", "lora_forward", "mix_backward", "mix_forward", "refusal", "remerge_",
]  # fmt: skip


def refusal(op: str, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
    """The reference refuses nothing."""
    return None


def _as_given(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op in the dtypes of its arguments, which its caller has cast: autocast would cast some of its steps anew."""

    @functools.wraps(op)
    def run(first: torch.Tensor, *arguments: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return op(first, *arguments)
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *arguments)

    return run


add_norm_forward, add_norm_backward = map(_as_given, (add_norm_forward, add_norm_backward))
attention_forward, attention_backward = map(_as_given, (attention_forward, attention_backward))
bottleneck_forward, bottleneck_backward = map(_as_given, (bottleneck_forward, bottleneck_backward))
bottleneck_rows_forward, bottleneck_rows_backward = map(_as_given, (bottleneck_rows_forward, bottleneck_rows_backward))
drop = _as_given(drop)
linear_forward, linear_backward = map(_as_given, (linear_forward, linear_backward))
lora_forward, lora_backward = map(_as_given, (lora_forward, lora_backward))
mix_forward, mix_backward = map(_as_given, (mix_forward, mix_backward))
