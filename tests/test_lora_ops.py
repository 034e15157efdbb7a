"""Linears with LoRAs, and rows with LoRAs and biases of their own, in every backend that has kernels of them."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastadapt as fa
from fastadapt import dispatch
from fastadapt.ops import LowRank
from tests import ops_cases as cases
from tests.ops_cases import case_id, laid_out, normal, stored, without

RUNNERS = cases.runners()
KERNELS = [r for r in RUNNERS if r.backend != "reference"]
every_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
every_kernel = pytest.mark.parametrize("runner", KERNELS, ids=str)
pytestmark = pytest.mark.usefixtures("poison")

RANKS = (1, 3, 4, 8, 12, 16, 24, 48, 64, 100, 256)
DROPPED = {"none": (0.0, 0.0), "some": (0.3, 0.3), "one": (0.0, 0.3), "all": (1.0, 1.0)}  # of even and odd LoRAs
LORA_CASES = cases.pairwise(
    {
        "dtype": cases.DTYPES,
        "rows": cases.ROWS,
        "features": (32, 100, 384, 768),
        "outputs": ((48,), (100, 36, 7), (384,), (768, 768, 768)),
        "rank": RANKS,
        "loras": ("one", "each", "sum", "crossed"),
        "dropped": tuple(DROPPED),
        "activation": ("none", "relu", "gelu"),
        "biases": ("all", "none", "some"),
        "p": (0.0, 0.1, 1.0),
        "layout": cases.LAYOUTS,
        "parameters": ("same", "float32"),
    }
)
LORA_CASES.append({
    **cases.ROWS_IN_PLACE, "features": 768, "outputs": (100, 36, 7), "rank": 8, "loras": "each", "dropped": "none",
    "biases": "all",
})  # fmt: skip
# Sums over more columns or rows than the C++ kernels multiply in one go, forward (features) and backward (outputs).
LONG_CASES = [
    {**cases.ROWS_IN_PLACE, "dtype": dtype, "features": features, "outputs": outputs, "rank": rank, "loras": loras,
     "dropped": dropped, "activation": "none", "biases": "some"}
    for dtype in (torch.float32, torch.bfloat16)
    for features, outputs, rank, loras, dropped in [
        (3072, (100, 36), 5, "each", "none"), (800, (33,), 400, "one", "none"), (36, (2500, 770), 33, "each", "some"),
        (1601, (33,), 768, "one", "some"),
    ]
]  # fmt: skip
ROUTED_CASES = cases.pairwise(
    {
        "dtype": cases.DTYPES,
        "batch": (0, 1, 2, 5),
        "length": (1, 7, 33, 128),
        "features": (32, 100, 384),
        "outputs": ((48,), (100, 36, 7), (64, 64, 64)),
        "rank": RANKS,
        "table": ("mixed", "one slot", "no LoRAs"),
        "dropped": tuple(DROPPED),
        "activation": ("none", "relu", "gelu"),
        "biases": ("all", "none", "some"),
        "p": (0.0, 0.1),
        "parameters": ("same", "float32"),
    }
)


def _need(runner, dtype, features, rank):
    for op in ("lora_forward", "lora_backward"):
        reason = runner.refusal(op, dtype, features=features, rank=rank)
        if reason is not None:
            pytest.skip(reason)


def _parameter_dtype(case):
    return torch.float32 if case["parameters"] == "float32" else case["dtype"]


def _placed(arrangement, rank, weights):
    """(rank, weight, slot) of each LoRA."""
    last = weights - 1
    return {
        "one": [(rank, last, 0)],
        "each": [(rank if i == 0 else 4 + i, i, 0) for i in range(weights)],
        "sum": [(rank, 0, 0), (5, 0, 0)],
        "crossed": [(rank, last, 0), (3, 0, 0), (8, last, 0)],  # not in the order of the weights
        # Ranks that differ by slot, a slot without a LoRA (2), one with two at one weight.
        "mixed": [(rank, 0, 0), (rank, last, 0), (4, 0, 1), (24, last, 3), (1, last, 3), (2, 0, 3)],
        "one slot": [(rank, last, 1)],
        "no LoRAs": [],
    }[arrangement]


def _matrices(placed, outputs, features, generator):
    """Low-rank additions as large as what they are added to."""
    made = {}
    for i, (rank, weight, _) in enumerate(placed):
        made[f"a{i}"] = normal(rank, features, std=features**-0.5, generator=generator)
        made[f"m{i}"] = normal(outputs[weight], rank, std=rank**-0.5, generator=generator)
    return made


def _loras(placed, given, dropped="none"):
    return [
        LowRank(given[f"a{i}"], given[f"m{i}"], (1.5, 0.25)[i % 2], weight, slot, DROPPED[dropped][i % 2], 100 + i)
        for i, (_, weight, slot) in enumerate(placed)
    ]


def _frozen(outputs, features, case, x, given):
    """Rounded as the parameters are, and float64 for the oracle."""
    generator = torch.Generator().manual_seed(77)
    dtype = next((m.dtype for n, m in given.items() if n != "x"), x.dtype)
    weights = [normal(n, features, std=features**-0.5, generator=generator) for n in outputs]
    return [w.to(_parameter_dtype(case)).to(dtype).to(x.device) for w in weights]


def _has_bias(case, i):
    return case["biases"] == "all" or (case["biases"] == "some" and i % 3 == 0)


# -- accuracy over the trap cases --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runner", "case"),
    [(r, c) for r in KERNELS for c in LORA_CASES] + [(r, c) for r in KERNELS if r.backend == "cpu" for c in LONG_CASES],
    ids=lambda v: case_id(v) if isinstance(v, dict) else str(v),
)
def test_lora(runner, case):
    rows, features, outputs = case["rows"], case["features"], case["outputs"]
    placed = _placed(case["loras"], case["rank"], len(outputs))
    _need(runner, case["dtype"], features, case["rank"])

    def build(generator):
        biases = {f"b{i}": normal(n, generator=generator) for i, n in enumerate(outputs) if _has_bias(case, i)}
        x = stored(rows, features, case["layout"], generator)
        return {"x": x} | biases | _matrices(placed, outputs, features, generator)

    def call(x, pad=0, **given):
        weights = _frozen(outputs, features, case, x, given)
        y = fa.ops.linear(
            laid_out(x, rows, case["layout"], pad), weights, [given.get(f"b{i}") for i in range(len(outputs))],
            activation=case["activation"], dropout_p=case["p"], seed=3, loras=_loras(placed, given, case["dropped"]),
        )  # fmt: skip
        return without(pad, y)

    distinct = 1.0 / max(rows, 1) if case["layout"] == "expanded" else 1.0
    cases.check(runner, call, build, case["dtype"], _parameter_dtype(case), rows=rows, distinct=distinct, case=case)


@every_kernel
@pytest.mark.parametrize("case", ROUTED_CASES, ids=case_id)
def test_rows_with_loras_and_biases_of_their_own(runner, case):
    batch, length, features, outputs = case["batch"], case["length"], case["features"], case["outputs"]
    placed = _placed(case["table"], case["rank"], len(outputs))
    _need(runner, case["dtype"], features, case["rank"])
    count, slots = batch * length, 4
    slot_of = torch.tensor([3, 0, 2, 1, 0][:batch], dtype=torch.int64)

    def build(generator):
        biases = {
            f"b{i}": normal(outputs[i % len(outputs)], generator=generator)
            for i in range(slots * len(outputs))
            if _has_bias(case, i)
        }
        x = normal(count, features, generator=generator)
        return {"x": x} | biases | _matrices(placed, outputs, features, generator)

    def call(x, pad=0, **given):
        more = -(-pad // length)  # batch rows of zeros
        x = torch.cat([x, x.new_zeros(more * length, features)]) if more else x
        table = torch.cat([slot_of, slot_of.new_zeros(more)]).to(x.device)
        y = fa.ops.linear(
            x.view(-1, length, features), _frozen(outputs, features, case, x, given),
            [given.get(f"b{i}") for i in range(slots * len(outputs))], activation=case["activation"],
            dropout_p=case["p"], seed=3, loras=_loras(placed, given, case["dropped"]), rows=table,
        )  # fmt: skip
        return y[:batch]

    cases.check(runner, call, build, case["dtype"], _parameter_dtype(case), rows=count, case=case)


# -- the reference itself ----------------------------------------------------------------------------------------


def _small(generator, rank=2):
    shapes = {"x": (6, 5), "b0": (4,), "b3": (3,), "a0": (rank, 5), "m0": (4, rank), "a1": (3, 5), "m1": (3, 3),
              "a2": (1, 5), "m2": (4, 1)}  # fmt: skip
    return {n: normal(*shape, generator=generator).requires_grad_() for n, shape in shapes.items()}


_SMALL_PLACES = [(0, 0), (1, 1), (0, 1)]  # (weight, slot)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("routed", [False, True])
def test_reference_gradients_are_numerically_right(activation, routed):
    generator = torch.Generator().manual_seed(1)
    t = _small(generator)
    weights = [normal(4, 5, generator=generator), normal(3, 5, generator=generator)]

    def f(*leaves):
        u = dict(zip(t, leaves, strict=True))
        loras = [
            LowRank(u[f"a{i}"], u[f"m{i}"], 1.5, weight, slot if routed else 0, 0.3 if i else 0.0, 20 + i)
            for i, (weight, slot) in enumerate(_SMALL_PLACES)
        ]
        biases = [u["b0"], None, None, u["b3"]] if routed else [u["b0"], u["b3"]]
        rows = torch.tensor([1, 0, 1]) if routed else None
        x = u["x"].view(3, 2, 5)
        return fa.ops.linear(x, weights, biases, activation=activation, dropout_p=0.3, seed=2, loras=loras, rows=rows)

    with fa.backend("reference"):
        assert torch.autograd.gradcheck(f, list(t.values()))


def test_reference_is_the_equation():
    generator = torch.Generator().manual_seed(2)
    t = {n: x.detach() for n, x in _small(generator).items()}
    w = normal(4, 5, generator=generator)
    want = F.linear(t["x"], w, t["b0"]) + 0.5 * F.linear(F.linear(t["x"], t["a0"]), t["m0"])
    with fa.backend("reference"):
        torch.testing.assert_close(fa.ops.lora_linear(t["x"], w, t["b0"], t["a0"], t["m0"], scale=0.5), want)


# -- the kernel contract -----------------------------------------------------------------------------------------


def _arguments(device, dtype=torch.float32, routed=True, p=0.2):
    """(x, weights, biases, a, b and what follows, as lora_forward takes them), dy."""
    generator = torch.Generator().manual_seed(4)
    outputs, placed = (48, 7), [(5, 1, 0), (16, 0, 1), (3, 1, 1)] if routed else [(5, 1, 0), (16, 0, 0)]

    def new(*shape):
        return normal(*shape, generator=generator).to(device, dtype)

    weights = [new(n, 36) / 6 for n in outputs]
    biases = [new(n) if i else None for i, n in enumerate(outputs * (2 if routed else 1))]
    a, b = [new(r, 36) / 6 for r, _, _ in placed], [new(outputs[w], r) / r for r, w, _ in placed]
    rows = torch.tensor([1, 0, 1], device=device) if routed else None
    seeds = torch.arange(len(placed), device=device) + 40
    how = ([0.5 + i for i in range(len(placed))], [w for _, w, _ in placed], [s for _, _, s in placed], rows,
           [p] * len(placed), seeds if p else None, "gelu", 0.1, torch.tensor(9, device=device))  # fmt: skip
    return (new(51, 36), weights, biases, a, b, *how), new(51, sum(outputs))


def _close(got, want):
    """That it is the same thing; how exact it is the trap cases judge."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _flattened(found):
    return [t for part in found for t in (part if isinstance(part, (list, tuple)) else [part])]


def _meta(arguments):
    def moved(a):
        if isinstance(a, (list, tuple)):
            return [moved(part) for part in a]
        return a.to("meta") if isinstance(a, torch.Tensor) else a

    return [moved(a) for a in arguments]


def _kernel(runner, op, dtype=torch.float32):
    return dispatch.pick(op, runner.device, dtype, features=36, rank=19)


@every_runner
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_forward_gives_what_is_promised(runner, save, routed, p):
    _need(runner, torch.float32, 36, 19)
    arguments, _ = _arguments(runner.device, routed=routed, p=p)
    with runner.running():
        found = _kernel(runner, "lora_forward")(*arguments, save)
    promised = torch.ops.fastadapt.lora_forward(*_meta(arguments), save)
    wanted = dispatch.load("reference").lora_forward(*arguments, save)
    for got, promise, want in zip(found, promised, wanted, strict=True):
        assert (got.shape, got.dtype) == (promise.shape, promise.dtype) == (want.shape, want.dtype)
        assert torch.isfinite(got).all()
    _close(found[0], wanted[0])


@every_runner
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(
    "flags", list(itertools.product([False, True], repeat=3)), ids=lambda f: "".join("ny"[v] for v in f)
)
def test_backward_gives_what_is_promised_and_nothing_else(runner, routed, p, flags):
    _need(runner, torch.float32, 36, 19)
    arguments, dy = _arguments(runner.device, routed=routed, p=p)
    (x, weights, biases), rest = arguments[:3], arguments[3:]
    slots = len(biases) // len(weights)
    with runner.running():
        _, z, s = _kernel(runner, "lora_forward")(*arguments, True)
        if not flags[2]:  # neither is kept where no LoRA trains
            x, s = x.new_empty(0), s.new_empty(0)
        found = _kernel(runner, "lora_backward")(dy, x, z, s, weights, slots, *rest, *flags)
    _, z, s = dispatch.load("reference").lora_forward(*arguments, True)
    wanted = dispatch.load("reference").lora_backward(dy, arguments[0], z, s, weights, slots, *rest, *flags)
    promised = torch.ops.fastadapt.lora_backward(*_meta((dy, arguments[0], z, s, weights, slots, *rest, *flags)))
    assert [len(part) if isinstance(part, list) else None for part in found] == [
        len(part) if isinstance(part, list) else None for part in promised
    ]
    for got, promise, want in zip(*map(_flattened, (found, promised, wanted)), strict=True):
        assert (got.shape, got.dtype) == (promise.shape, promise.dtype) == (want.shape, want.dtype)
        _close(got, want)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routed", [False, True])
def test_gradients_repeat_bit_for_bit(runner, dtype, routed):
    _need(runner, dtype, 36, 19)
    arguments, dy = _arguments(runner.device, dtype, routed)
    slots = len(arguments[2]) // len(arguments[1])

    def run():
        y, z, s = _kernel(runner, "lora_forward", dtype)(*arguments, True)
        backward = _kernel(runner, "lora_backward", dtype)
        return [y, *backward(dy, arguments[0], z, s, arguments[1], slots, *arguments[3:], True, True, True)]

    with runner.running():
        for first, second in zip(_flattened(run()), _flattened(run()), strict=True):
            assert torch.equal(first, second)


# -- masks -------------------------------------------------------------------------------------------------------


def _masks(runner, seeds, p=0.3, rows=9, features=70):
    """The mask of each of two LoRAs, read off the output: both project by the identity."""
    x, eye = torch.ones(rows, features, device=runner.device), torch.eye(features, device=runner.device)
    zero = torch.zeros(features, features, device=runner.device)
    loras = [LowRank(eye, eye, 1.0 - p, weight=i, dropout_p=p, seed=seed) for i, seed in enumerate(seeds)]
    with runner.running():
        return fa.ops.linear(x, [zero, zero], loras=loras).split(features, dim=1)


@every_runner
def test_each_lora_has_a_mask_of_its_own(runner):
    _need(runner, torch.float32, 70, 140)
    for found, seed in zip(_masks(runner, (5, 6)), (5, 6), strict=True):
        want = fa.ops.dropout.keep_mask(9, 70, 0.3, torch.tensor(seed, device=runner.device))
        torch.testing.assert_close(found, want.float())
    torch.manual_seed(0)
    first, second = _masks(runner, (None, None))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    for drawn, again in zip((first, second), _masks(runner, (None, None)), strict=True):
        assert torch.equal(drawn, again)


@every_runner
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_masks(runner, reentrant):
    _need(runner, torch.float32, 36, 5)
    arguments, _ = _arguments(runner.device)
    found = []
    for checkpointed in (False, True):
        x, a, b = (t.clone().requires_grad_() for t in (arguments[0], arguments[3][0], arguments[4][0]))
        torch.manual_seed(3)
        with runner.running():

            def f(x, a=a, b=b):
                return fa.ops.lora_linear(x, arguments[1][1], None, a, b, dropout_p=0.5)

            y = checkpoint(f, x, use_reentrant=reentrant) if checkpointed else f(x)
            y.square().sum().backward()
        found.append((y.detach(), x.grad, a.grad, b.grad))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


# -- hygiene -----------------------------------------------------------------------------------------------------


def _surrounded(x):
    """x as the middle of a larger buffer of NaN, so that a read past either end shows."""
    margin = 4096
    buffer = x.new_full((x.numel() + 2 * margin,), float("nan"))
    return buffer[margin : margin + x.numel()].view(x.shape).copy_(x)


def _everything(t, rows=None, p=0.2):
    """Output and all gradients of a two-weight linear over the tensors of :func:`_leaves`."""
    slots = 1 if rows is None else 2
    loras = [
        LowRank(t["a0"], t["m0"], 1.5, 1, 0, p, 7),
        LowRank(t["a1"], t["m1"], 0.5, 0, slots - 1, 0.0),
        LowRank(t["a2"], t["m2"], 1.0, 1, slots - 1, p, 8),
    ]
    biases = [t["b0"], None] * slots
    x = t["x"] if rows is None else t["x"].view(rows.shape[0], -1, t["x"].shape[1])
    y = fa.ops.linear(x, [t["w0"], t["w1"]], biases, activation="gelu", loras=loras, rows=rows, dropout_p=p, seed=2)
    y = y.flatten(0, -2)
    leaves = [x for n, x in t.items() if x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, t["dy"])]


def _leaves(device, dtype=torch.float32, rows=51, features=36):
    generator = torch.Generator().manual_seed(6)
    shapes = {"x": (rows, features), "w0": (48, features), "w1": (7, features), "b0": (48,), "a0": (5, features),
              "m0": (7, 5), "a1": (16, features), "m1": (48, 16), "a2": (3, features), "m2": (7, 3),
              "dy": (rows, 55)}  # fmt: skip
    made = {n: normal(*shape, generator=generator).to(device, dtype) for n, shape in shapes.items()}
    return {n: x if n in ("w0", "w1", "dy") else x.requires_grad_() for n, x in made.items()}


def _with(t, change):
    """The same tensors, each changed and a leaf again."""
    return {n: change(x.detach()).requires_grad_(x.requires_grad) for n, x in t.items()}


@every_kernel
@pytest.mark.parametrize("routed", [False, True])
def test_nothing_outside_the_operands_is_read(runner, routed):
    _need(runner, torch.float32, 36, 19)
    t = _leaves(runner.device)
    rows = torch.tensor([1, 0, 1], device=runner.device) if routed else None
    with runner.running():
        for plain, walled in zip(_everything(t, rows), _everything(_with(t, _surrounded), rows), strict=True):
            assert torch.equal(plain, walled)


@every_kernel
def test_a_lora_of_another_slot_or_weight_touches_nothing(runner):
    """0 · NaN is NaN: what does not belong to a row or a column has to be selected away, not multiplied away."""
    _need(runner, torch.float32, 36, 19)
    t = _leaves(runner.device)
    rows = torch.tensor([1, 0, 1], device=runner.device)
    first = torch.arange(51, device=runner.device) // 17 == 1  # the rows of slot 0
    names = ["y", *(n for n, x in t.items() if x.requires_grad)]
    bad = {"a1", "m1"}  # slot 1, weight 0
    spoiled = {n: torch.full_like(x, float("nan")).requires_grad_() if n in bad else x for n, x in t.items()}
    with runner.running():
        clean, found = (dict(zip(names, _everything(u, rows, p=0.0), strict=True)) for u in (t, spoiled))
    assert found["y"][~first, :48].isnan().all()
    assert torch.equal(found["y"][first], clean["y"][first]) and torch.equal(found["y"][:, 48:], clean["y"][:, 48:])
    assert torch.equal(found["x"][first], clean["x"][first])
    for n in ("a0", "m0", "a2", "m2"):
        assert torch.equal(found[n], clean[n]), n


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_a_bad_row(runner, bad):
    _need(runner, torch.float32, 36, 5)
    t = _leaves(runner.device)
    good = torch.arange(51, device=runner.device) != 5
    spoiled = t["x"].detach().clone()
    spoiled[5, 30] = bad

    def run(x):
        x = x.detach().clone().requires_grad_()
        y = fa.ops.lora_linear(x, t["w1"], None, t["a0"].detach(), t["m0"].detach())
        return y.detach(), torch.autograd.grad(y, x, t["dy"][:, :7])[0]

    with runner.running():
        for clean, found in zip(run(t["x"]), run(spoiled), strict=True):
            assert torch.equal(clean[good], found[good])
        assert run(spoiled)[0][5].isnan().any()


@every_kernel
def test_views_and_transposed_matrices(runner):
    _need(runner, torch.float32, 36, 19)
    t = _leaves(runner.device)
    spread = _with(t, lambda x: torch.stack([x, x], dim=-1)[..., 0] if x.dim() == 1 else x.t().contiguous().t())
    assert not spread["a0"].is_contiguous() and not spread["b0"].is_contiguous()
    with runner.running():
        for plain, strided in zip(_everything(t), _everything(spread), strict=True):
            torch.testing.assert_close(plain, strided, rtol=0, atol=0)


# -- autograd, autocast ------------------------------------------------------------------------------------------


@every_runner
@pytest.mark.parametrize("trained", [("x",), ("b0",), ("a1",), ("m2",), ("a0", "m0"), ("x", "m1")], ids="-".join)
@pytest.mark.parametrize("routed", [False, True])
def test_only_what_trains_gets_a_gradient_and_the_same_one(runner, trained, routed):
    _need(runner, torch.float32, 36, 19)
    t = _leaves(runner.device)
    rows = torch.tensor([1, 0, 1], device=runner.device) if routed else None
    some = {n: x.detach().requires_grad_(n in trained) for n, x in t.items()}
    with runner.running():
        full = dict(zip(["y", *(n for n, x in t.items() if x.requires_grad)], _everything(t, rows), strict=True))
        found = dict(zip(["y", *(n for n in t if n in trained)], _everything(some, rows), strict=True))
    for n in ("y", *trained):
        assert torch.equal(full[n], found[n]), n


@every_runner
def test_autocast_gives_its_dtype_and_keeps_the_gradients_wide(runner):
    _need(runner, torch.bfloat16, 36, 19)
    t = _leaves(runner.device)
    t["dy"] = t["dy"].bfloat16()
    with runner.running(), torch.autocast(runner.device, torch.bfloat16):
        y, *gradients = _everything(t)
    assert y.dtype == torch.bfloat16
    for (n, x), g in zip(((n, x) for n, x in t.items() if x.requires_grad), gradients, strict=True):
        assert g.dtype == x.dtype == torch.float32 and torch.isfinite(g).all(), n
        if n in ("a1", "m1") and runner.backend != "reference":  # not rounded to bf16 on the way
            assert not torch.equal(g, g.bfloat16().float()), n


@every_runner
def test_double_backward_raises_clearly(runner):
    _need(runner, torch.float32, 36, 5)
    t = _leaves(runner.device)
    with runner.running():
        y = fa.ops.lora_linear(t["x"], t["w1"], None, t["a0"], t["m0"])
        (grad,) = torch.autograd.grad(y.square().sum(), t["a0"], create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            grad.sum().backward()


@every_runner
def test_inference_and_training_agree(runner):
    _need(runner, torch.float32, 36, 19)
    t = _leaves(runner.device)
    with runner.running():
        with torch.no_grad():
            plain = fa.ops.lora_linear(t["x"], t["w0"], t["b0"], t["a1"], t["m1"], dropout_p=0.2, seed=3)
        assert torch.equal(plain, fa.ops.lora_linear(t["x"], t["w0"], t["b0"], t["a1"], t["m1"], dropout_p=0.2, seed=3))


def test_lists_of_fields_are_the_same_loras():
    t = _leaves("cpu")
    weights, biases = [t["w0"], t["w1"]], [None, None]
    loras = [LowRank(t["a0"], t["m0"], 1.5, 1, dropout_p=0.2, seed=3), LowRank(t["a1"], t["m1"], 0.5)]
    lists = fa.ops.LowRanks([t["a0"]], [t["m0"]], [1.5], [1], [0], [0.2], [3]).extend(loras[1:])
    assert len(lists) == 2 and vars(lists[0]) == vars(loras[0]) and vars(lists[1]) == vars(loras[1])
    found, wanted = (fa.ops.linear(t["x"], weights, biases, loras=given) for given in (lists, loras))
    assert torch.equal(found, wanted)
    lists.extend([LowRank(t["a1"][:, 1:], t["m1"])])
    with pytest.raises(ValueError, match=re.escape("a[2]: got shape")):
        fa.ops.linear(t["x"], weights, biases, loras=lists)


# -- bad input ---------------------------------------------------------------------------------------------------


def _refused(error, name, x=None, rows=None, biases=None, **changed):
    """``changed`` are fields of the LoRA; the message names ``name``."""
    x = torch.zeros(3, 4, 8) if x is None else x
    fields = {"a": torch.zeros(2, 8), "b": torch.zeros(6, 2)} | changed
    before = x.clone()
    with pytest.raises(error, match=re.escape(name)):
        fa.ops.linear(x, torch.zeros(6, 8), biases, loras=[LowRank(**fields)], rows=rows)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (ValueError, "a[0]: got shape (2, 7); accepted is (2, 8)", {"a": torch.zeros(2, 7)}),
        (ValueError, "a[0]: got shape (0, 8); accepted is [r, 8]", {"a": torch.zeros(0, 8), "b": torch.zeros(6, 0)}),
        (ValueError, "a[0]: got shape (8,)", {"a": torch.zeros(8)}),
        (ValueError, "b[0]: got shape (6, 3); accepted is (6, 2)", {"b": torch.zeros(6, 3)}),
        (TypeError, "a[0]: got dtype torch.int64", {"a": torch.zeros(2, 8, dtype=torch.int64)}),
        (TypeError, "b[0]: got dtype torch.int64", {"b": torch.zeros(6, 2, dtype=torch.int64)}),
        (ValueError, "loras[0].weight: got 1; accepted are 0 to 0", {"weight": 1}),
        (ValueError, "loras[0].slot: got 1; accepted are 0 to 0", {"slot": 1}),
        (ValueError, "loras[0].dropout_p: got 1.5", {"dropout_p": 1.5}),
        (TypeError, "seed: got str", {"dropout_p": 0.5, "seed": "no"}),
        (ValueError, "rows: got torch.int64 (2,); accepted is an int64 tensor of shape (3,)",
         {"rows": torch.tensor([0, 0])}),
        (ValueError, "rows: got torch.int32", {"rows": torch.zeros(3, dtype=torch.int32)}),
        (ValueError, "rows: got [0, 1, 0]; accepted are slots 0 to 0", {"rows": torch.tensor([0, 1, 0])}),
        (ValueError, "bias: got 2 for 1 weights; accepted is one a weight", {"biases": [None, None]}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, name, changed):
    _refused(error, name, **changed)
