"""The ops against eager PyTorch and torch.compile: what each computes, moves, and is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapt as fa

Tensors = dict[str, Tensor]


# A batch of rows that differ in their LoRA.
BATCH_ROWS, SLOTS = 32, 8
COMPILED_ROWS = (128, 4096, 65536)


@dataclass(frozen=True)
class OpCase:
    """One op at one shape. ``training``: forward with dropout 0.1 and backward; else forward alone. With
    ``backward_only`` the forward is made once and not timed.

    ``bottleneck`` is the rank of a LoRA. ``lora`` has no dropout, ``lora dropout`` has 0.1 of what A reads, and
    ``lora rows`` mixes eight LoRAs in a batch.
    """

    op: str
    rows: int
    hidden: int
    bottleneck: int
    dtype: str
    training: bool
    compiled: bool  # torch.compile takes a while: not at every shape
    backward_only: bool = False

    @property
    def name(self) -> str:
        kind = "backward" if self.backward_only else "training" if self.training else "inference"
        width = f"{'r' if self.lora else 'b'}={self.bottleneck}"
        return f"{self.op} {kind} rows={self.rows} H={self.hidden} {width} {self.dtype}"

    @property
    def lora(self) -> bool:
        return self.op.startswith("lora")

    @property
    def p(self) -> float:
        return 0.1 if self.training and self.op not in ("lora", "lora rows") else 0.0


def cases() -> Iterator[OpCase]:
    for training in (False, True):
        for rows in (1, 128, 512, 1024, 4096, 16384, 65536):
            if rows >= 128 or not training:
                yield OpCase("bottleneck", rows, 768, 64, "bfloat16", training, rows in COMPILED_ROWS)
        for b in (16, 256):
            yield OpCase("bottleneck", 16384, 768, b, "bfloat16", training, False)
        yield OpCase("bottleneck", 16384, 1024, 64, "float16", training, False)
        yield OpCase("bottleneck", 16384, 768, 64, "float32", training, False)
        for rows in (128, 4096, 65536):
            yield OpCase("add_norm", rows, 768, 0, "bfloat16", training, rows == 65536)
            if rows < 4096:
                continue
            yield OpCase("linear", rows, 768, 0, "bfloat16", training, rows == 65536)
            yield OpCase("lora", rows, 768, 16, "bfloat16", training, rows == 65536)
            yield OpCase("lora rows", rows, 768, 8, "bfloat16", training, False)
        yield OpCase("lora", 65536, 768, 64, "bfloat16", training, False)
        yield OpCase("lora", 16384, 1024, 8, "float16", training, False)
        yield OpCase("lora", 16384, 768, 16, "float32", training, False)
    yield OpCase("lora dropout", 65536, 768, 16, "bfloat16", True, False)
    for rows in (4096, 65536):
        yield OpCase("bottleneck", rows, 768, 64, "bfloat16", True, False, backward_only=True)


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
    if case.lora:
        made |= {"w": new(h, h, std=h**-0.5), "b": new(h, std=0.1)}
        for i in range(_loras(case)):
            made |= {f"lora_a{i}": new(b, h, std=h**-0.5), f"lora_b{i}": new(h, b, std=b**-0.5)}
        return made
    made |= {"gamma": new(h, std=0.1, mean=1.0), "beta": new(h, std=0.1)}
    if case.op == "bottleneck":
        made |= {"w_down": new(b, h, std=h**-0.5), "b_down": new(b, std=0.1)}
        made |= {"w_up": new(h, b, std=b**-0.5), "b_up": new(h, std=0.1)}
    return made


def _loras(case: OpCase) -> int:
    return SLOTS if case.op == "lora rows" else 1


def _slot_of(case: OpCase, device: torch.device) -> Tensor:
    return torch.arange(BATCH_ROWS, device=device) % SLOTS


# A linear's weights are frozen, and so is what a sublayer without an adapter holds.
_LORA = ("x", "lora_a0", "lora_b0")
TRAINED = {
    "bottleneck": ("x", "residual", "w_down", "b_down", "w_up", "b_up", "gamma", "beta"),
    "add_norm": ("x", "residual", "gamma", "beta"),
    "linear": ("x",),
    "lora": _LORA,
    "lora dropout": _LORA,
    "lora rows": ("x", *(f"lora_{m}{i}" for i in range(SLOTS) for m in "ab")),
}
LORA_SCALE = 2.0


def ours(case: OpCase, t: Tensors, p: float, seed: Tensor) -> Tensor:
    if case.op == "bottleneck":
        return fa.ops.bottleneck(
            t["x"], t["w_down"], t["b_down"], t["w_up"], t["b_up"], residual=t["residual"], norm_weight=t["gamma"],
            norm_bias=t["beta"], dropout_p=p, seed=seed,
        )  # fmt: skip
    if case.op == "add_norm":
        return fa.ops.add_norm(t["x"], t["residual"], t["gamma"], t["beta"], dropout_p=p, seed=seed)
    if case.op == "lora rows":
        loras = [fa.ops.LowRank(t[f"lora_a{i}"], t[f"lora_b{i}"], LORA_SCALE, slot=i) for i in range(SLOTS)]
        x = t["x"].view(BATCH_ROWS, -1, case.hidden)
        y = fa.ops.linear(x, t["w"], [t["b"]] * SLOTS, loras=loras, rows=_slot_of(case, t["x"].device))
        return y.view(t["x"].shape)
    if case.lora:
        return fa.ops.lora_linear(
            t["x"], t["w"], t["b"], t["lora_a0"], t["lora_b0"], scale=LORA_SCALE, dropout_p=p, seed=seed
        )
    return fa.ops.linear(t["x"], t["w"], t["b"], activation="gelu")


def eager(case: OpCase, t: Tensors, p: float) -> Tensor:
    """The same in plain PyTorch, with PyTorch's own dropout."""
    if case.op == "linear":
        return F.gelu(F.linear(t["x"], t["w"], t["b"]))
    if case.lora:
        return _peft(case, t, p)
    s = t["x"]
    if case.op == "bottleneck":
        o = F.linear(F.gelu(F.linear(t["x"], t["w_down"], t["b_down"])), t["w_up"], t["b_up"])
        s = F.dropout(o, p) + t["x"] + t["residual"]
    else:
        s = F.dropout(s, p) + t["residual"]
    return F.layer_norm(s, s.shape[-1:], t["gamma"], t["beta"], 1e-12)


def _peft(case: OpCase, t: Tensors, p: float) -> Tensor:
    """PEFT's way: the linear's own output, and onto it what each LoRA gives for the rows that are its own."""
    y = F.linear(t["x"], t["w"], t["b"])
    if case.op != "lora rows":
        return y + F.linear(F.linear(F.dropout(t["x"], p), t["lora_a0"]), t["lora_b0"]) * LORA_SCALE
    y, x = (u.view(BATCH_ROWS, -1, case.hidden) for u in (y, t["x"]))
    for i in range(SLOTS):
        mine = torch.arange(i, BATCH_ROWS, SLOTS, device=x.device)
        y = y.index_add(0, mine, F.linear(F.linear(x[mine], t[f"lora_a{i}"]), t[f"lora_b{i}"]) * LORA_SCALE)
    return y.view(t["x"].shape)


def frozen(case: OpCase, t: Tensors) -> Tensor:
    """The linear that a LoRA stands at, without it: what its own cost is held against."""
    return F.linear(t["x"], t["w"], t["b"])


def step(case: OpCase, forward: Callable[[], Tensor], t: Tensors, trained: tuple[str, ...] = ()) -> Callable[[], Any]:
    """Forward, or forward and the gradients of what trains (or of ``trained``)."""
    if not case.training:

        def inference() -> Tensor:
            with torch.no_grad():
                return forward()

        return inference
    leaves = [t[name].requires_grad_() for name in trained or TRAINED[case.op]]
    if case.backward_only:
        made = cache(forward)  # at the first call: backward runs on the stream that its forward ran on
        return lambda: torch.autograd.grad(made(), leaves, t["dy"], retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, t["dy"])


def work(case: OpCase) -> tuple[float, float]:
    """(operations, least bytes): every input read once, every output written once; weights are small beside them."""
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    t, h, b = case.rows, case.hidden, case.bottleneck
    if case.op == "linear":  # forward, and dx
        return (16.0 if case.training else 8.0) * t * h * h, (15.0 if case.training else 5.0) * t * h * size
    if case.lora:  # the product, dx, and of each LoRA the two of forward and four of backward; x, dy in and y, dx out
        products, low = (4.0, 12.0) if case.training else (2.0, 4.0)
        return products * t * h * h + low * t * h * b, (5.0 if case.training else 2.0) * t * h * size
    if case.op == "add_norm":  # reads x, residual; writes y (and s); reads dy, s; writes dx, dresidual
        return 0.0, (8.0 if case.training else 3.0) * t * h * size
    if not case.training:
        return 4.0 * t * h * b, 3.0 * t * h * size
    if case.backward_only:
        return 8.0 * t * h * b, 5.0 * t * h * size + t * b * size
    # forward writes s as well; backward reads dy, s, x and writes dx, dresidual; z goes out and comes back
    return 12.0 * t * h * b, (4.0 + 5.0) * t * h * size + 2.0 * t * b * size


def repeats(case: OpCase, device: str = "cuda", backend: str = "triton") -> str | None:
    """Why the op is not deterministic: what differs in some bit between two runs, dropout included."""
    t = tensors(case, device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    with fa.backend(backend):
        call = step(case, lambda: ours(case, t, case.p, seed), t)
        first, second = (r if isinstance(r, tuple) else (r,) for r in (call(), call()))
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return f"result {number} differs between two runs"
    return None


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
