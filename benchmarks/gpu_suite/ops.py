"""The ops against eager PyTorch and torch.compile: what each computes, moves, and is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapt as fa

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OpCase:
    """One op at one shape. ``training``: forward with dropout 0.1 and backward; else forward alone."""

    op: str
    rows: int
    hidden: int
    bottleneck: int
    dtype: str
    training: bool
    compiled: bool  # torch.compile takes a while: not at every shape

    @property
    def name(self) -> str:
        kind = "training" if self.training else "inference"
        return f"{self.op} {kind} rows={self.rows} H={self.hidden} b={self.bottleneck} {self.dtype}"

    @property
    def p(self) -> float:
        return 0.1 if self.training else 0.0


def cases() -> Iterator[OpCase]:
    for training in (False, True):
        for rows in (1024, 4096, 16384, 65536):
            yield OpCase("bottleneck", rows, 768, 64, "bfloat16", training, rows in (4096, 65536))
        for b in (16, 256):
            yield OpCase("bottleneck", 16384, 768, b, "bfloat16", training, False)
        yield OpCase("bottleneck", 16384, 1024, 64, "float16", training, False)
        yield OpCase("bottleneck", 16384, 768, 64, "float32", training, False)
        for rows in (4096, 65536):
            yield OpCase("add_norm", rows, 768, 0, "bfloat16", training, rows == 65536)
            yield OpCase("linear", rows, 768, 0, "bfloat16", training, rows == 65536)


def tensors(case: OpCase, device: str = "cuda") -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    h, b = case.hidden, max(case.bottleneck, 1)

    def new(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(shape, device=device, generator=generator) * std + mean
        return x.to(getattr(torch, case.dtype))

    made = {"x": new(case.rows, h), "residual": new(case.rows, h), "dy": new(case.rows, h)}
    if case.op == "linear":  # the feed-forward network's first layer
        made |= {"w": new(4 * h, h, std=h**-0.5), "b": new(4 * h, std=0.1), "dy": new(case.rows, 4 * h)}
        return made
    made |= {"gamma": new(h, std=0.1, mean=1.0), "beta": new(h, std=0.1)}
    if case.op == "bottleneck":
        made |= {"w_down": new(b, h, std=h**-0.5), "b_down": new(b, std=0.1)}
        made |= {"w_up": new(h, b, std=b**-0.5), "b_up": new(h, std=0.1)}
    return made


# A linear's weights are frozen, and so is what a sublayer without an adapter holds.
TRAINED = {
    "bottleneck": ("x", "residual", "w_down", "b_down", "w_up", "b_up", "gamma", "beta"),
    "add_norm": ("x", "residual", "gamma", "beta"),
    "linear": ("x",),
}


def ours(case: OpCase, t: Tensors, p: float, seed: Tensor) -> Tensor:
    if case.op == "bottleneck":
        return fa.ops.bottleneck(
            t["x"], t["w_down"], t["b_down"], t["w_up"], t["b_up"], residual=t["residual"], norm_weight=t["gamma"],
            norm_bias=t["beta"], dropout_p=p, seed=seed,
        )  # fmt: skip
    if case.op == "add_norm":
        return fa.ops.add_norm(t["x"], t["residual"], t["gamma"], t["beta"], dropout_p=p, seed=seed)
    return fa.ops.linear(t["x"], t["w"], t["b"], activation="gelu")


def eager(case: OpCase, t: Tensors, p: float) -> Tensor:
    """The same in plain PyTorch, with PyTorch's own dropout."""
    if case.op == "linear":
        return F.gelu(F.linear(t["x"], t["w"], t["b"]))
    s = t["x"]
    if case.op == "bottleneck":
        o = F.linear(F.gelu(F.linear(t["x"], t["w_down"], t["b_down"])), t["w_up"], t["b_up"])
        s = F.dropout(o, p) + t["x"] + t["residual"]
    else:
        s = F.dropout(s, p) + t["residual"]
    return F.layer_norm(s, s.shape[-1:], t["gamma"], t["beta"], 1e-12)


def step(case: OpCase, forward: Callable[[], Tensor], t: Tensors) -> Callable[[], Any]:
    """Forward, or forward and the gradients of what trains."""
    if not case.training:

        def inference() -> Tensor:
            with torch.no_grad():
                return forward()

        return inference
    leaves = [t[name].requires_grad_() for name in TRAINED[case.op]]
    return lambda: torch.autograd.grad(forward(), leaves, t["dy"])


def work(case: OpCase) -> tuple[float, float]:
    """(operations, least bytes): every input read once, every output written once; weights are small beside them."""
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    t, h, b = case.rows, case.hidden, case.bottleneck
    if case.op == "linear":  # forward, and dx
        return (16.0 if case.training else 8.0) * t * h * h, (15.0 if case.training else 5.0) * t * h * size
    if case.op == "add_norm":  # reads x, residual; writes y (and s); reads dy, s; writes dx, dresidual
        return 0.0, (8.0 if case.training else 3.0) * t * h * size
    if not case.training:
        return 4.0 * t * h * b, 3.0 * t * h * size
    # forward writes s as well; backward reads dy, s, x and writes dx, dresidual; z goes out and comes back
    return 12.0 * t * h * b, (4.0 + 5.0) * t * h * size + 2.0 * t * b * size


def wrong(case: OpCase, device: str = "cuda") -> str | None:
    """Why the op's output or gradients are off, without dropout: more than twice eager's error against float64."""
    t = tensors(case, device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    checked = TRAINED[case.op]

    def results(cast: torch.dtype, forward: Callable[[Tensors], Tensor]) -> list[Tensor]:
        leaves = {n: x.to(cast).requires_grad_(n in checked) for n, x in t.items()}
        y = forward(leaves)
        return [y, *torch.autograd.grad(y, [leaves[n] for n in checked], leaves["dy"])]

    same = getattr(torch, case.dtype)
    oracle = results(torch.float64, lambda u: eager(case, u, 0.0))
    plain = results(same, lambda u: eager(case, u, 0.0))
    with fa.backend("triton"):
        fused = results(same, lambda u: ours(case, u, 0.0, seed))
    for name, exact, theirs, mine in zip(("y", *checked), oracle, plain, fused, strict=True):
        allowed = 2.0 * (theirs.double() - exact).norm().item()
        off = (mine.double() - exact).norm().item()
        if not off <= allowed:
            return f"{name}: error {off:.3e}, allowed {allowed:.3e}"
    return None
