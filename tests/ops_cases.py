"""Backends that run here, trap cases of every op, and the tolerance that is derived instead of chosen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastadapt as fa
from fastadapt import dispatch
from fastadapt.ops import ACTIVATIONS

# -- backends ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """One way to run an op: a backend, on a device, at a CPU capability where the backend knows several."""

    backend: str
    device: str = "cpu"
    capability: str | None = None

    @property
    def interpreted(self) -> bool:
        """Whether its kernels run in Triton's interpreter."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return "-".join(p for p in (self.backend, self.capability, self.device if self.device != "cpu" else None) if p)

    @contextmanager
    def running(self) -> Iterator[None]:
        level = nullcontext() if self.capability is None else dispatch.load("cpu").capability(self.capability)
        with level, fa.backend(self.backend):
            yield

    def refusal(self, op: str, dtype: torch.dtype, **facts: Any) -> str | None:
        return dispatch.refusal(self.backend, op, self.device, dtype, **facts)


def runners() -> list[Runner]:
    """Every backend that loads here; Triton on the GPU where there is one, else in its interpreter."""
    gpu = torch.cuda.is_available()
    found = [Runner("reference", "cuda" if gpu else "cpu")]
    cpu = dispatch.load("cpu")
    if not isinstance(cpu, str):
        found += [Runner("cpu", capability=name) for name in cpu.capabilities()]
    if not isinstance(dispatch.load("triton"), str):
        found.append(Runner("triton", "cuda" if gpu else "cpu"))
    return found


def cuda_runners() -> list[Runner]:
    """The CUDA C++ kernels, which have no backward: on the GPU where there is one, else emulated on the CPU."""
    if isinstance(dispatch.load("cuda"), str):
        return []
    return [Runner("cuda", "cuda" if torch.cuda.is_available() else "cpu")]


# -- cases -------------------------------------------------------------------------------------------------------

BOTTLENECKS = (1, 4, 7, 8, 12, 16, 24, 48, 64, 100, 256)
HIDDEN = (32, 48, 100, 384, 768, 1024)
ROWS = (0, 1, 3, 17, 64, 130)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("2d", "3d", "strided", "expanded")
_MOST_PAIRED_VALUES = 40  # longer pairs (b with H, ...) are covered value by value, not pair by pair


def pairwise(factors: Mapping[str, Sequence[Any]], draws: int = 24) -> list[dict[str, Any]]:
    """Few combinations that hold every pair of values of two short factors and every value of each; repeatable."""
    rng = random.Random(0)
    names = list(factors)
    missing = {((n, i),) for n in names for i in range(len(factors[n]))}
    for a, b in itertools.combinations(names, 2):
        if len(factors[a]) * len(factors[b]) <= _MOST_PAIRED_VALUES:
            missing |= {((a, i), (b, j)) for i in range(len(factors[a])) for j in range(len(factors[b]))}

    def covered(row: dict[str, int]) -> set:
        return {m for m in missing if all(row[n] == i for n, i in m)}

    rows = []
    while missing:
        seed = dict(rng.choice(sorted(missing)))
        candidates = [{n: seed.get(n, rng.randrange(len(factors[n]))) for n in names} for _ in range(draws)]
        best = max(candidates, key=lambda row: len(covered(row)))
        missing -= covered(best)
        rows.append({n: factors[n][i] for n, i in best.items()})
    return rows


BOTTLENECK_CASES = pairwise(
    {
        "dtype": DTYPES,
        "rows": ROWS,
        "hidden": HIDDEN,
        "bottleneck": BOTTLENECKS,
        "activation": ACTIVATIONS,
        "scale": ("one", "float", "[1]", "[H]"),
        "skip": (True, False),
        "residual": (True, False),
        "norm": (True, False),
        "biases": (True, False),
        "p": (0.0, 0.1, 1.0),
        "layout": LAYOUTS,
        "parameters": ("same", "float32"),
    }
)
# Rows of 768 floats are multiplied where they lie.
ROWS_IN_PLACE = {"dtype": torch.float32, "rows": 33, "activation": "gelu", "p": 0.0, "layout": LAYOUTS[0],
                 "parameters": "same"}  # fmt: skip
BOTTLENECK_CASES.append({
    **ROWS_IN_PLACE, "hidden": 768, "bottleneck": 48, "scale": "one", "skip": True, "residual": True, "norm": True,
    "biases": True,
})  # fmt: skip
ADD_NORM_CASES = pairwise(
    {
        "dtype": DTYPES,
        "rows": ROWS,
        "hidden": HIDDEN,
        "residual": (True, False),
        "p": (0.0, 0.1, 1.0),
        "layout": LAYOUTS,
        "return_sum": (True, False),
        "parameters": ("same", "float32"),
        "gamma": ("usual", "near zero"),
    }
)
LINEAR_CASES = pairwise(
    {
        "dtype": DTYPES,
        "rows": ROWS,
        "features": (32, 100, 384, 768),
        "outputs": ((48,), (100, 100, 100), (384,), (768, 768)),
        "activation": ACTIVATIONS,
        "biases": ("all", "none", "some"),
        "p": (0.0, 0.1, 1.0),
        "layout": LAYOUTS,
        "parameters": ("same", "float32"),
    }
)
ATTENTION_CASES = pairwise(
    {
        "dtype": DTYPES,
        "batch": (0, 1, 3),
        "length": (1, 7, 33, 128),
        "heads": (1, 12),
        "head_dim": (8, 32, 64),
        "prefix": (0, 1, 30),
        "prefix_by_row": (False, True),
        "parameters": ("same", "float32"),
        "mask": (None, "padding", "additive", "full"),
        "p": (0.0, 0.1, 1.0),
    }
)


def case_id(case: Mapping[str, Any]) -> str:
    return "-".join(f"{n}={str(v).removeprefix('torch.').replace(' ', '')}" for n, v in case.items())


def stored(rows: int, width: int, layout: str, generator: torch.Generator) -> Tensor:
    """A float64 leaf from which :func:`laid_out` makes [rows, width] activations."""
    shape = {"strided": (rows, 2 * width), "expanded": (1, width)}.get(layout, (rows, width))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def laid_out(x: Tensor | None, rows: int, layout: str, pad: int = 0) -> Tensor | None:
    """The view of a stored leaf: every second column, one row many times, or a batch dimension in front.

    ``pad`` adds rows of zeros behind.
    """
    if x is None:
        return None
    if layout == "strided":
        x = x[:, ::2]
    elif layout == "expanded":
        x = x.expand(rows, -1)
    x = torch.cat([x, x.new_zeros(pad, x.shape[1])]) if pad else x
    return x.unsqueeze(0) if layout == "3d" else x


def without(pad: int, y: Any) -> Any:
    """The output, or outputs, without the rows that ``pad`` added."""
    if isinstance(y, tuple):
        return tuple(without(pad, part) for part in y)
    return y[..., : y.shape[-2] - pad, :] if pad else y


def normal(*shape: int, generator: torch.Generator, std: float = 1.0, mean: float = 0.0) -> Tensor:
    return mean + std * torch.randn(shape, dtype=torch.float64, generator=generator)


# -- tolerance ---------------------------------------------------------------------------------------------------

# A backend may be off from the float64 oracle by twice what eager code in the same dtype is, in the largest error
# and in the root mean square. No other slack, but one floor: an output has to be rounded to its own dtype, which
# alone may cost half a unit in the last place; eager can be exact where a sum has a single term.
FACTOR = 2.0
# The draws of one case are judged together, so that the bound compares distributions and not two single roundings;
# eager, which is cheap, is drawn more often, so that the largest error of its smallest output is known. The mean
# square of fewer than LEAST_FOR_RMS elements is noise: there the largest error alone is judged.
ELEMENTS, MOST_DRAWS = 4096, 12
MOST_INTERPRETED_DRAWS = 2  # an interpreted kernel takes seconds
EAGER_ELEMENTS, MOST_EAGER_DRAWS = 32768, 32
LEAST_FOR_RMS = 64
# A largest error is one rounding out of thousands, and some hundred outputs are judged: what is over its bound is drawn
# anew, and fails where independent draws are over it again.
ATTEMPTS = 2
# BLAS sums a product of few rows in another order (a vector's) than one of many. Eager is run with rows of zeros
# behind as well, which change nothing else, and the larger of its two errors counts.
FEW_ROWS = 16


class Errors:
    """Largest and mean square error of the outputs of one name, over all draws."""

    def __init__(self) -> None:
        self.largest = self.squares = self.peak = self.power = 0.0
        self.count = 0
        self.eps = 0.0

    def add(self, got: Tensor, oracle: Tensor) -> None:
        got, oracle = got.detach(), oracle.detach().cpu()
        self.eps = max(self.eps, torch.finfo(got.dtype).eps)
        error = got.cpu().double() - oracle
        assert torch.isfinite(error).all(), f"{int((~torch.isfinite(error)).sum())} elements are NaN or infinite"
        if error.numel():
            self.largest = max(self.largest, error.abs().max().item())
            self.peak = max(self.peak, oracle.abs().max().item())
        self.squares += error.square().sum().item()
        self.power += oracle.square().sum().item()
        self.count += error.numel()

    @property
    def rms(self) -> float:
        return (self.squares / max(self.count, 1)) ** 0.5

    @property
    def floor(self) -> tuple[float, float]:
        half_unit = 0.5 * self.eps
        return half_unit * self.peak, half_unit * (self.power / max(self.count, 1)) ** 0.5


def excess(errors: Errors, eager: Sequence[Errors], name: str) -> str | None:
    """What is over its bound; None where nothing is."""
    largest, rms = errors.floor
    judged = [("largest", errors.largest, max(e.largest for e in eager), largest)]
    if errors.count >= LEAST_FOR_RMS:
        judged.append(("rms", errors.rms, max(e.rms for e in eager), rms))
    for kind, mine, theirs, least in judged:
        bound = max(FACTOR * theirs, least)
        if not mine <= bound:
            return f"{name}: {kind} error {mine:.3e}, eager {theirs:.3e}, bound {bound:.3e}"
    return None


def evaluate(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    dtypes: Mapping[str, torch.dtype],
    device: str,
    seed: int,
    **options: Any,
) -> dict[str, Tensor]:
    """The outputs of ``call`` and the gradients of every input, under an output gradient that ``seed`` draws."""
    leaves = {n: None if x is None else x.to(device, dtypes[n], copy=True).requires_grad_() for n, x in inputs.items()}
    outputs = call(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for y in outputs:
        g = torch.randn(y.shape, dtype=torch.float64, generator=generator)
        grads.append(g.to(dtypes["grad"]).to(y.dtype).to(device))
    wanted = {n: x for n, x in leaves.items() if x is not None}
    found = torch.autograd.grad(outputs, list(wanted.values()), grads)
    results = {f"y{i}": y for i, y in enumerate(outputs)}
    for (n, x), g in zip(wanted.items(), found, strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape
        results[f"d{n}"] = g
    return results


@dataclass
class Draw:
    """Inputs of one evaluation and what float64 makes of them."""

    seed: int
    inputs: dict[str, Tensor | None]
    oracle: dict[str, Tensor]


@dataclass
class Yardstick:
    """What eager code is off by on each padding, by the output's name, and the draws that a runner is judged on."""

    eager: dict[str, list[Errors]]
    draws: list[Draw]


_last: tuple[Any, Yardstick] | None = None  # all runners of a case follow each other and share it


def check(
    runner: Runner,
    call: Callable[..., Any],
    build: Callable[[torch.Generator], dict[str, Tensor | None]],
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    activations: Sequence[str] = ("x", "residual"),
    rows: int | None = None,
    distinct: float = 1.0,
    case: Mapping[str, Any] | None = None,
) -> None:
    """Outputs and gradients of ``call`` in ``runner`` against float64, bounded by eager code of the same dtype.

    ``call`` takes what ``build`` makes, by name, and ``pad`` where ``rows`` is given; ``distinct`` is the share of
    the output's rows that differ from each other. ``case`` says all that ``call`` and ``build`` depend on, where other
    runners get the same.
    """
    global _last
    pads = (0, FEW_ROWS) if rows is not None and 0 < rows < FEW_ROWS else (0,)

    def dtypes(names: Iterable[str]) -> dict[str, torch.dtype]:
        return {n: dtype if n in activations else parameter_dtype for n in names} | {"grad": dtype}

    for attempt in range(ATTEMPTS):
        key = None if case is None else (call.__qualname__, case_id(case), runner.device, attempt)
        if key is None or _last is None or _last[0] != key:
            first = attempt * MOST_EAGER_DRAWS
            _last = (key, _yardstick(runner.device, call, build, dtypes, pads, distinct, first))
        stick = _last[1]
        found: dict[str, Errors] = {}
        for draw in stick.draws[: MOST_INTERPRETED_DRAWS if runner.interpreted else None]:
            with runner.running():
                got = evaluate(call, draw.inputs, dtypes(draw.inputs), runner.device, draw.seed)
            for n, want in draw.oracle.items():
                found.setdefault(n, Errors()).add(got[n], want)
        over = [line for n in found if (line := excess(found[n], stick.eager[n], n)) is not None]
        if not over:
            return
    raise AssertionError("\n".join(over))


def _yardstick(
    device: str,
    call: Callable[..., Any],
    build: Callable[[torch.Generator], dict[str, Tensor | None]],
    dtypes_of: Callable[[Iterable[str]], dict[str, torch.dtype]],
    pads: Sequence[int],
    distinct: float,
    first_seed: int,
) -> Yardstick:
    stick, elements = Yardstick({}, []), 0.0
    for number in range(MOST_EAGER_DRAWS):
        seed = first_seed + number
        inputs = build(torch.Generator().manual_seed(seed))
        dtypes = dtypes_of(inputs)
        exact_inputs = {n: None if x is None else x.to(dtypes[n]).double() for n, x in inputs.items()}
        exact = dict.fromkeys(inputs, torch.float64) | {"grad": dtypes["grad"]}
        with fa.backend("reference"):
            oracle = evaluate(call, exact_inputs, exact, "cpu", seed)
            mine = [evaluate(call, inputs, dtypes, device, seed, **({"pad": pad} if pad else {})) for pad in pads]
        for n, want in oracle.items():
            for errors, results in zip(stick.eager.setdefault(n, [Errors() for _ in pads]), mine, strict=True):
                errors.add(results[n], want)
        if elements < ELEMENTS and number < MOST_DRAWS:
            stick.draws.append(Draw(seed, inputs, {n: y.detach() for n, y in oracle.items()}))
        elements += oracle["y0"].numel() * distinct
        enough = elements >= EAGER_ELEMENTS and all(e[0].count >= LEAST_FOR_RMS for e in stick.eager.values())
        if enough or not elements:
            break
    return stick
