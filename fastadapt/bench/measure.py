"""Clocks and counters: systems take turns round by round, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MIN_ROUNDS = 5
MAX_ROUNDS = 200
TURN_SECONDS = 0.06  # a turn repeats a short call this long, so that it runs with its own caches warm


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def _turn(call: Callable[[], Any], device: str, repeats: int) -> float:
    if repeats > 1:
        call()  # the caches hold the previous system's weights
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


Progress = Callable[[int, float], None]


def _rounds(turns: dict[str, Callable[[], None]], budget: float, min_rounds: int, progress: Progress | None) -> None:
    names = list(turns)
    gc.collect()
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        left = budget - (time.perf_counter() - started)
        if done >= min_rounds and left <= 0:
            break
        first = done % len(names)  # another one begins each round, so none always follows the same neighbour's heat
        for name in names[first:] + names[:first]:
            turns[name]()
        if progress is not None:
            progress(done + 1, left)


def _repeats(seconds: float) -> int:
    return max(1, math.ceil(TURN_SECONDS / max(seconds, 1e-9)))


def take_turns(
    calls: dict[str, Callable[[], Any]],
    *,
    budget: float,
    device: str = "cpu",
    min_rounds: int = MIN_ROUNDS,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Milliseconds a call of every system in every round; sample i of one system is paired with sample i of another.

    Args:
        calls: what to time, by name; warmed up here.
        budget: seconds after which no further round starts, once ``min_rounds`` are done.
        device: ``cuda`` waits for the device around every turn.
        min_rounds: rounds in any case.
        progress: called after each round with the rounds done and the seconds left.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def turn(name: str, call: Callable[[], Any]) -> Callable[[], None]:
        call()
        repeats = _repeats(min(once(call, device) for _ in range(2)))
        return lambda: samples[name].append(_turn(call, device, repeats) * 1e3)

    _rounds({name: turn(name, call) for name, call in calls.items()}, budget, min_rounds, progress)
    return samples


Steps = dict[str, Callable[[], Any]]


def take_turns_in_steps(
    systems: dict[str, Steps],
    *,
    budget: float,
    device: str = "cpu",
    min_rounds: int = MIN_ROUNDS,
    progress: Progress | None = None,
) -> dict[str, dict[str, list[float]]]:
    """As :func:`take_turns` for systems of which a turn is several steps, each timed: {system: {step: milliseconds}}.

    The steps of a turn run in their order; after the last one the system is where it was before the first.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {step: [] for step in steps} for name, steps in systems.items()}

    def run(steps: Steps) -> dict[str, float]:
        return {step: once(call, device) for step, call in steps.items()}

    def turn(name: str, steps: Steps) -> Callable[[], None]:
        run(steps)
        repeats = _repeats(min(sum(run(steps).values()) for _ in range(2)))

        def take() -> None:
            if repeats > 1:
                run(steps)  # the caches hold the previous system's weights
            taken = [run(steps) for _ in range(repeats)]
            for step in steps:
                samples[name][step].append(statistics.fmean(each[step] for each in taken) * 1e3)

        return take

    _rounds({name: turn(name, steps) for name, steps in systems.items()}, budget, min_rounds, progress)
    return samples


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of samples[i] / base[i]."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's C++ part logs its start and its stop there, past every Python switch."""
    sys.stderr.flush()
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)


def _allocated(call: Callable[[], Any], device: str) -> tuple[int, int]:
    """(bytes that PyTorch's allocator holds after ``call``, the most it held during it), beyond those before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return torch.cuda.memory_allocated() - before, peak
    from torch.profiler import ProfilerActivity, profile

    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors held during ``call`` beyond what they held before.

    On a CPU without the work memory of PyTorch's and fastadapt's kernels, which no allocator reports.
    """
    return _allocated(call, device)[1]


def kept_bytes(call: Callable[[], Any], device: str) -> int:
    """The bytes that tensors hold after ``call``, its result dropped, beyond what they held before."""
    return _allocated(call, device)[0]


@contextmanager
def _storages_saved(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collects the storages kept for backward, by address, but not the model's parameters and buffers."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned and tensor.untyped_storage().nbytes():
            kept.setdefault(address, tensor.detach())
        return tensor.detach()  # keeping an op's own output would be a cycle that nothing frees

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that one forward keeps for backward.

    Parameters and buffers don't count, nor does what a second forward finds in place and keeps again (the inputs,
    packed copies of frozen weights): both graphs are alive at once, so what they share is no cost of a step.
    """
    forward()  # packs and caches, if it does
    with _storages_saved(model) as first:
        graph_one = forward()
    with _storages_saved(model) as second:
        graph_two = forward()
    shared = first.keys() & second.keys()
    total = sum(t.untyped_storage().nbytes() for address, t in second.items() if address not in shared)
    del graph_one, graph_two
    return total
