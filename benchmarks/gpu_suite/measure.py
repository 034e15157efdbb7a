"""Device time of captured calls, with a warm and with a cold L2 cache, and the two ceilings they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]
_FLUSH_BYTES = 512 * 2**20  # several times the largest L2


@dataclass(frozen=True)
class Times:
    """Microseconds, one a round."""

    rounds: tuple[float, ...]

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """p20, p50, p80."""
        ordered = sorted(self.rounds)
        return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """The call as a graph, so that its launches' cost on the host stays out of the measurement."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation, handles, allocations
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def _once(replay: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def in_turns(calls: dict[str, Call], rounds: int, *, cold: bool) -> dict[str, Times]:
    """Every call once a round. Before each, ``cold`` overwrites the cache; otherwise the call itself warms it."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cold else None
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if flush is None:
                call()
            else:
                flush.zero_()
            found[name].append(_once(call))
    return {name: Times(tuple(times)) for name, times in found.items()}


def paired_ratio(mine: Times, other: Times) -> float:
    """The median over rounds of mine / other."""
    return statistics.median(a / b for a, b in zip(mine.rounds, other.rounds, strict=True))


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes a second of a copy (read plus written), operations a second of a product."""

    copy: float
    product: dict[str, float]

    def floor_us(self, flops: float, bytes_: float, dtype: str) -> float:
        """The larger of the time for the arithmetic and the time for the bytes."""
        return max(flops / self.product[dtype], bytes_ / self.copy) * 1e6


def ceilings() -> Ceilings:
    elements = 2**28
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    copy = in_turns({"copy": lambda: target.copy_(source)}, 20, cold=False)["copy"].percentiles[1]
    product = {}
    n = 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        time = in_turns({"mm": multiply}, 10, cold=False)["mm"].percentiles[1]
        product[str(dtype).removeprefix("torch.")] = 2 * n**3 / (time * 1e-6)
    return Ceilings(2 * 4 * elements / (copy * 1e-6), product)
