"""Every case's result against float64, in several processes at once, before anything is measured."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.gpu_suite import merging, models, ops

Case = ops.OpCase | merging.MergeCase | models.ModelCase

# Most of what is not measured is compilation, which takes a processor of the host each; a worker takes 1 GB of the GPU.
WORKERS = max(1, min(15, (os.cpu_count() or 1) - 1))


def checked(case: Case) -> str | None:
    """Why what the case computes is wrong; None where it is right. Compiles the kernels that it launches."""
    try:
        if isinstance(case, ops.OpCase):
            return ops.wrong(case) or ops.repeats(case)
        return merging.wrong(case) if isinstance(case, merging.MergeCase) else models.wrong(case)
    except Exception as error:  # one case that fails must not lose the others' results
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # which the other processes may need


def check_all(cases: list[Case], workers: int = WORKERS) -> dict[str, str | None]:
    """Every case :func:`checked`, in several processes at once, since nothing is measured yet."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = dict(zip((case.name for case in cases), pool.map(checked, cases), strict=True))
    for case in cases:
        if (found[case.name] or "").startswith("OutOfMemoryError"):
            found[case.name] = checked(case)  # with the GPU to itself
    return found
