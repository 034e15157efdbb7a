"""Every case's result against float64, in several processes at once, before anything is measured."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks.gpu_suite import merging, models, ops

Case = ops.OpCase | merging.MergeCase | models.ModelCase

# Most of what is not measured is compilation, which takes a processor of the host each, and the tests have more of it.
WORKERS = max(1, (os.cpu_count() or 1) // 4)


@dataclass(frozen=True)
class Verdict:
    """Why what a case computes is wrong (None: it is right), and whether it raised instead of giving a result."""

    wrong: str | None
    raised: bool = False


_usable = True  # whether this process can go on using the GPU: after an illegal access it can't


def checked(case: Case) -> Verdict | None:
    """The verdict on one case; None where this process can't tell any more. Compiles the kernels that are launched."""
    global _usable
    if not _usable:
        return None
    try:
        if isinstance(case, ops.OpCase):
            return Verdict(ops.wrong(case) or ops.repeats(case))
        return Verdict(merging.wrong(case) if isinstance(case, merging.MergeCase) else models.wrong(case))
    except Exception as error:  # one case that fails must not lose the others' results
        return Verdict(f"{type(error).__name__}: {error}", raised=True)
    finally:
        try:
            torch.cuda.empty_cache()  # which the other processes may need
        except RuntimeError:
            _usable = False


def check_all(cases: list[Case], workers: int = WORKERS) -> dict[str, Verdict]:
    """The verdict on every case, by name."""
    found: dict[str, Verdict] = {}
    while left := [case for case in cases if case.name not in found]:
        with ProcessPoolExecutor(min(workers, len(left)), multiprocessing.get_context("spawn")) as pool:
            verdicts = zip(left, pool.map(checked, left), strict=True)
            found |= {case.name: verdict for case, verdict in verdicts if verdict is not None}
    for case in cases:
        if (found[case.name].wrong or "").startswith("OutOfMemoryError"):
            found[case.name] = checked(case) or found[case.name]  # with the GPU to itself
    return found
