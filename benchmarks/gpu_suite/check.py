"""Every case's result against float64, in several processes at once, before anything is measured."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
    """The verdict on every case, by name; a case whose process dies costs no other case its own."""
    found: dict[str, Verdict] = {}
    alone = False  # once a process has died, and nobody knows of which of the cases under way
    while left := [case for case in cases if case.name not in found]:
        batch = left[:1] if alone else left
        with ProcessPoolExecutor(min(workers, len(batch)), multiprocessing.get_context("spawn")) as pool:
            jobs = {case.name: pool.submit(checked, case) for case in batch}
        for name, job in jobs.items():
            try:
                verdict = job.result()
            except BrokenProcessPool:
                verdict = Verdict("the process died", raised=True) if alone else None
            if verdict is not None:
                found[name] = verdict
        alone = alone or any(isinstance(job.exception(), BrokenProcessPool) for job in jobs.values())
    for case in cases:
        if (found[case.name].wrong or "").startswith("OutOfMemoryError"):
            found[case.name] = checked(case) or found[case.name]  # with the GPU to itself
    return found
