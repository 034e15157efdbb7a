"""Other libraries' kernels for the ops: one setup function a peer.

A setup function takes a case and its tensors and gives the forward call, in which gradients reach the same tensors as
everywhere else. It raises :class:`AbsentError` where the library can't be had; what it needs is imported inside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_suite.ops import LORA_SCALE, OpCase, Tensors, eager

Forward = Callable[[], Tensor]
Setup = Callable[[OpCase, Tensors, float], Forward]

# A peer may be off by eight times what eager code of the same dtype is, as in `fastadapt bench`.
FACTOR = 8.0


class AbsentError(Exception):
    """The peer can't be had here; says why."""


def _library(name: str, attribute: str) -> Any:
    try:
        module: ModuleType = importlib.import_module(name)
        return getattr(module, attribute)
    except Exception as error:  # a library for GPUs may raise anything on import; all of it means that it is not there
        first_line = (str(error).splitlines() or [""])[0]
        raise AbsentError(f"{name}: {type(error).__name__}: {first_line}") from error


def peft(case: OpCase, t: Tensors, p: float) -> Forward:
    """PEFT's own LoRA layer around the linear."""
    get, config = _library("peft", "get_peft_model"), _library("peft", "LoraConfig")
    out, width = t["w"].shape
    base = nn.Sequential()
    base.add_module("linear", nn.Linear(width, out, device=t["w"].device, dtype=t["w"].dtype))
    r = t["lora_a0"].shape[0]
    model = get(base, config(r=r, lora_alpha=LORA_SCALE * r, lora_dropout=p, target_modules=["linear"]))
    prefix = "base_model.model.linear."
    own = {
        prefix + "base_layer.weight": t["w"], prefix + "base_layer.bias": t["b"],
        prefix + "lora_A.default.weight": t["lora_a0"], prefix + "lora_B.default.weight": t["lora_b0"],
    }  # fmt: skip
    return lambda: torch.func.functional_call(model, own, (t["x"],))


def adapterhub(case: OpCase, t: Tensors, p: float) -> Forward:
    """AdapterHub's formulas, op by op: the adapter's output times its scale, the two sums, the LayerNorm."""

    def forward() -> Tensor:
        down = F.gelu(F.linear(t["x"], t["w_down"], t["b_down"]))
        up = F.dropout(F.linear(down, t["w_up"], t["b_up"]) * 1.0, p)
        output = up + t["x"]
        return F.layer_norm(output + t["residual"], output.shape[-1:], t["gamma"], t["beta"], 1e-12)

    return forward


def liger(case: OpCase, t: Tensors, p: float) -> Forward:
    """Eager products with Liger's LayerNorm."""
    layer_norm = _library("liger_kernel.transformers.functional", "liger_layer_norm")

    def forward() -> Tensor:
        s = t["x"]
        if case.op == "bottleneck":
            o = F.linear(F.gelu(F.linear(t["x"], t["w_down"], t["b_down"])), t["w_up"], t["b_up"])
            s = F.dropout(o, p) + t["x"] + t["residual"]
        else:
            s = F.dropout(s, p) + t["residual"]
        return layer_norm(s, t["gamma"], t["beta"], 1e-12)

    return forward


def unsloth(case: OpCase, t: Tensors, p: float) -> Forward:
    """Unsloth's LoRA linear, which has no bias of its own."""
    lora = _library("unsloth.kernels.fast_lora", "LoRA_W")
    if p:
        raise AbsentError("unsloth: its LoRA linear has no dropout")
    return lambda: lora.apply(t["x"][None], t["w"], None, t["lora_a0"], t["lora_b0"], LORA_SCALE)[0] + t["b"]


def lorafusion(case: OpCase, t: Tensors, p: float) -> Forward:
    """LoRAFusion's linear."""
    fused = _library("lorafusion.ops.lora_v1", "fused_linear_lora")

    def forward() -> Tensor:
        options = {"alpha": LORA_SCALE, "dropout_p": p, "linear_bias": t["b"]}
        return fused(t["x"][None], t["w"], t["lora_a0"], t["lora_b0"], **options)[0]

    return forward


OF: dict[str, dict[str, Setup]] = {
    "bottleneck": {"adapterhub": adapterhub, "liger": liger},
    "add_norm": {"liger": liger},
    "linear": {},
    "lora": {"peft": peft, "unsloth": unsloth, "lorafusion": lorafusion},
    "lora dropout": {"peft": peft, "lorafusion": lorafusion},
    "lora rows": {},  # PEFT's way with rows that differ is the eager system itself
}


def wrong(case: OpCase, t: Tensors, setup: Setup) -> str | None:
    """Why the peer's output, without dropout, is not the op's; raises :class:`AbsentError`."""
    with torch.no_grad():
        exact = eager(case, {n: x.double() for n, x in t.items()}, 0.0)
        allowed = FACTOR * (eager(case, t, 0.0).double() - exact).norm().item()
        off = (setup(case, t, 0.0)().double() - exact).norm().item()
    return None if off <= allowed else f"y: error {off:.3e}, allowed {allowed:.3e}"
