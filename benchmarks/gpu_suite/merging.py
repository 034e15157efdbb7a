"""A LoRA merged into every linear of BERT-base and taken out again, against a copy of as many bytes and PEFT's way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastadapt as fa
from fastadapt import dispatch

HIDDEN, LAYERS, SCALE = 768, 12, 1.0
# Of a layer: query, key, value, attention output, intermediate, output.
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]


@dataclass(frozen=True)
class MergeCase:
    rank: int
    dtype: str

    @property
    def name(self) -> str:
        return f"merge and unmerge BERT-base r={self.rank} {self.dtype}"


def cases() -> Iterator[MergeCase]:
    for dtype in ("bfloat16", "float32"):
        for rank in (8, 64):
            yield MergeCase(rank, dtype)


def matrices(case: MergeCase, device: str = "cuda", layers: int = LAYERS) -> tuple[list[Tensor], ...]:
    """(weights, every a, every b)."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int, std: float) -> Tensor:
        x = torch.randn(shape, device=device, generator=generator) * std
        return x.to(getattr(torch, case.dtype))

    shapes = SHAPES * layers
    weights = [new(n, k, std=0.02) for n, k in shapes]
    return (
        weights,
        [new(case.rank, k, std=k**-0.5) for _, k in shapes],
        [new(n, case.rank, std=0.01) for n, _ in shapes],
    )


def _pair(weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> None:
    residues: list[Any] = []
    scales = [SCALE] * len(weights)
    fa.ops.merge_(weights, a, b, scales, residues)
    fa.ops.unmerge_(weights, a, b, scales, residues)


def systems(case: MergeCase) -> dict[str, Callable[[], None]]:
    """Each merges and unmerges once a call; the copy writes as many weights, there and back.

    ``cuda``: the CUDA C++ kernels, where they are compiled.
    """
    own, plain = matrices(case), matrices(case)
    aside = [torch.empty_like(w) for w in plain[0]]

    @torch.no_grad()
    def peft() -> None:
        for sign in (1.0, -1.0):
            for w, a, b in zip(*plain, strict=True):
                w.data += sign * SCALE * (b @ a)

    @torch.no_grad()
    def copy() -> None:
        torch._foreach_copy_(aside, plain[0])
        torch._foreach_copy_(plain[0], aside)

    found = {"ours": lambda: _pair(*own), "eager": peft, "copy": copy}
    if not isinstance(dispatch.load("cuda"), str):
        forced = matrices(case)

        def cuda() -> None:
            with fa.backend("cuda"):
                _pair(*forced)

        found["cuda"] = cuda
    return found


def work(case: MergeCase) -> tuple[float, float]:
    """(operations, least bytes) of a merge and an unmerge: every weight read and written, twice."""
    weights = sum(n * k for n, k in SHAPES) * LAYERS
    return 2 * 2.0 * weights * case.rank, 2 * 2.0 * weights * torch.finfo(getattr(torch, case.dtype)).bits / 8


def wrong(case: MergeCase, device: str = "cuda", layers: int = LAYERS) -> str | None:
    """How many bits of the weights a merge and an unmerge changed, or that the merge changed nothing."""
    weights, a, b = matrices(case, device, layers)
    before = [w.clone() for w in weights]
    residues: list[Any] = []
    scales = [SCALE] * len(weights)
    fa.ops.merge_(weights, a, b, scales, residues)
    for i, (w, was) in enumerate(zip(weights, before, strict=True)):
        exact = was.double() + SCALE * (b[i].double() @ a[i].double())
        allowed = 2.0 * (exact.to(w.dtype).double() - exact).norm().item()
        off = (w.double() - exact).norm().item()
        if not off <= allowed:
            return f"merged weight {i}: error {off:.3e}, allowed {allowed:.3e}"
    fa.ops.unmerge_(weights, a, b, scales, residues)
    changed = sum(int((w != was).sum()) for w, was in zip(weights, before, strict=True))
    return f"{changed} weights changed after unmerging" if changed else None
