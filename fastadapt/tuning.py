"""``fastadapt tune``: measure launches of the Triton kernels on the GPU at hand, and keep the fastest in a table.

Nothing else in the library measures a launch, so that no capture and no first call ever waits for one. Only kernels
that leave their inputs alone are run: merging is not tuned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt import dispatch, ops
from fastadapt.errors import UserError

_WARPS, _STAGES, _ROWS = (4, 8), (1, 2, 3, 4), (16, 32, 64, 128)
_SLACK = 2.0  # times the error of the heuristic's launch, beyond which a launch is wrong
_GAIN = 0.97  # of the heuristic's time, above which it stays


@dataclass(frozen=True)
class Tuned:
    """What was found for one kernel at one shape; times in microseconds, medians."""

    heuristic: str
    key: str
    default: Any
    chosen: Any
    default_us: float
    chosen_us: float
    tried: int


def check_device() -> str:
    """The GPU's name; raises ``UserError`` where there is none that the kernels run on."""
    if not torch.cuda.is_available():
        raise UserError("tune: measures kernels on an NVIDIA GPU, and this torch can use none here")
    reason = dispatch.refusal("triton", "linear_forward", "cuda", torch.bfloat16)
    if reason is not None:
        raise UserError(f"tune: {reason}")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; accepted is a call outside of it")
    return torch.cuda.get_device_name()


def candidates(tile: Any, rows: int) -> Iterator[Any]:
    """The tile and others like it, of other rows, warps and pipeline stages; no more rows than there are."""
    yield tile
    most = max(16, 1 << max(rows - 1, 0).bit_length())
    for height, warps, stages in itertools.product(_ROWS, _WARPS, _STAGES):
        other = replace(tile, rows=height, warps=warps, stages=stages)
        if height <= most and other != tile:
            yield other


def tune(
    heuristic: str,
    rows: int,
    run: Callable[[], Tensor],
    exact: Tensor,
    *,
    measure: Callable[[Callable[[], Any]], float],
) -> Tuned | None:
    """The fastest launch of one kernel among its candidates whose output is right; None where it is not launched.

    Args:
        heuristic: name of the :mod:`~fastadapt.backends.triton.launch` function that chooses the tile.
        rows: of the launch.
        run: launches the kernel, and returns what it is judged by.
        exact: that in float64.
        measure: microseconds of a call.
    """
    from fastadapt.backends.triton import tuned

    asked: list[tuple[str, Any]] = []
    with _watching(heuristic, lambda arguments, tile: asked.append((tuned.key(arguments), tile))):
        error = _distance(run(), exact)
    if not asked:
        return None
    key, default = asked[0]
    times: dict[Any, float] = {}
    for tile in candidates(default, rows):
        with _forced(heuristic, tile):
            try:
                right = _distance(run(), exact) <= _SLACK * error
            except Exception as refused:
                if not _does_not_fit(refused):
                    raise
                continue
            if right:
                times[tile] = measure(run)
    if default not in times:
        raise RuntimeError(f"{heuristic}: the heuristic's own launch of {key} cannot be run")
    best = min(times, key=times.__getitem__)
    best = best if times[best] < _GAIN * times[default] else default
    return Tuned(heuristic, key, default, best, times[default], times[best], len(times))


def _does_not_fit(error: Exception) -> bool:
    """Whether a launch was refused for what it needs: shared memory, registers, or code that there is none for."""
    return type(error).__name__ in ("OutOfResources", "CompilationError", "PassManagerError", "PTXASError")


@contextmanager
def _watching(heuristic: str, see: Callable[[dict[str, Any], Any], None]) -> Iterator[None]:
    from fastadapt.backends.triton import launch

    honest = getattr(launch, heuristic)
    names = list(honest.__wrapped__.__code__.co_varnames[1:])

    def seen(arch: Any, *args: Any, **kwargs: Any) -> Any:
        tile = honest.__wrapped__(arch, *args, **kwargs)
        see(dict(zip(names, args, strict=False)) | kwargs, tile)
        return tile

    setattr(launch, heuristic, seen)
    try:
        yield
    finally:
        setattr(launch, heuristic, honest)


def _forced(heuristic: str, tile: Any):
    from fastadapt.backends.triton import launch

    return launch.forcing(heuristic, tile)


def _distance(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).square().mean().sqrt())


# -- what is tuned -----------------------------------------------------------------------------------------------


def jobs(
    rows: int, hidden: int, bottleneck: int, rank: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, str, Callable[[torch.dtype], Tensor]]]:
    """(name, heuristic, what runs in a dtype) of every kernel that is tuned, at one shape."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    x, residual, g = new(rows, hidden), new(rows, hidden), new(rows, hidden)
    down, b_down = new(bottleneck, hidden) * hidden**-0.5, new(bottleneck)
    up, b_up = new(hidden, bottleneck), new(hidden)
    norm, w, bias = new(hidden), new(hidden, hidden) * hidden**-0.5, new(hidden)
    a, b = new(rank, hidden) * hidden**-0.5, new(hidden, rank)

    graphs: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}

    def adapter(kind: torch.dtype, read: Tensor) -> Tensor:
        p = [t.to(kind) for t in (down, b_down, up, b_up)]
        return ops.bottleneck(read, *p, residual=residual.to(kind), norm_weight=norm.to(kind), norm_bias=norm.to(kind))

    def adapter_backward(kind: torch.dtype) -> Tensor:
        if kind not in graphs:  # so that backward alone is timed
            read = x.to(kind, copy=True).requires_grad_()
            graphs[kind] = adapter(kind, read), read, g.to(kind)
        y, read, dy = graphs[kind]
        return torch.autograd.grad(y, read, dy, retain_graph=True)[0]

    def low_rank(kind: torch.dtype) -> Tensor:
        return ops.lora_linear(x.to(kind), *(t.to(kind) for t in (w, bias, a, b)))

    yield "bottleneck", "bottleneck_rows", lambda kind: adapter(kind, x.to(kind))
    yield "bottleneck backward", "bottleneck_rows", adapter_backward
    yield "linear", "linear_product", lambda kind: ops.linear(x.to(kind), w.to(kind), bias.to(kind), activation="gelu")
    yield "lora product", "lora_product", low_rank
    yield "lora low", "lora_low", low_rank


def tune_all(
    out: Path | None,
    rows: Sequence[int],
    hidden: int,
    bottlenecks: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype],
    tell: Callable[[str], None],
) -> Path:
    """Tune every kernel at every shape and write the table; ``out``: None is where the backend reads it."""
    name = check_device()
    from triton.testing import do_bench

    from fastadapt.backends.triton import tuned

    def measure(run: Callable[[], Any]) -> float:
        return 1e3 * do_bench(run, warmup=10, rep=50, return_mode="median")

    file, table = out or tuned.path(), {}
    tuned.read(file)  # before the work: a file that is no such table is not overwritten
    for dtype, count, bottleneck, rank in itertools.product(dtypes, rows, bottlenecks, ranks):
        for kernel, heuristic, run in jobs(count, hidden, bottleneck, rank, dtype, "cuda"):
            with dispatch.backend("reference"):
                exact = run(torch.float64).detach()
            with dispatch.backend("triton"):
                found = tune(heuristic, count, lambda run=run, dtype=dtype: run(dtype).detach(), exact, measure=measure)
            if found is None:
                continue
            tell(f"{kernel:20} {found.key}: {found.default_us:.1f} -> {found.chosen_us:.1f} us of {found.tried}, "
                 f"{_differences(found)}")  # fmt: skip
            table.setdefault(heuristic, {})[found.key] = tuned.entry(found.chosen)
    tuned.write(file, name, table)
    return file


def _differences(found: Tuned) -> str:
    changed = [f.name for f in fields(found.chosen) if getattr(found.chosen, f.name) != getattr(found.default, f.name)]
    return ", ".join(f"{name} {getattr(found.chosen, name)}" for name in changed) or "the heuristic's"
