"""Bottlenecks that differ from row to row: every backend against float64, and against each row alone."""

from __future__ import annotations

import pytest
import torch

import fastadapt as fa
from fastadapt.ops import Slot
from tests import ops_cases as cases
from tests.ops_cases import case_id, normal

RUNNERS = cases.runners()
KERNELS = [r for r in RUNNERS if r.backend != "reference"]
every_kernel = pytest.mark.parametrize("runner", KERNELS, ids=str)
every_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
pytestmark = pytest.mark.usefixtures("poison")

CASES = cases.pairwise(
    {
        "dtype": (torch.float32, torch.bfloat16),
        "table": ((0, 1, 2, 3), (3, 3, 0, 1, 1, 0, 2), (1,), (2, 0), ()),
        "length": (1, 5, 70),
        "hidden": (32, 100, 384),
        "widths": ((8, None, 16, 7), (64, 1, None, 48), (None, None, 24, None)),
        "activation": ("relu", "gelu", "silu"),
        "scale": ("float", "[1]", "[H]"),
        "residual": (True, False),
        "skip": (True, False),
        "swaps": (True, False),
        "p": (0.0, 0.1),
        "biases": (True, False),
        "parameters": ("same", "float32"),
    }
)


def _parameters(case, generator):
    """Every slot's parameters, by name and slot."""
    hidden, found = case["hidden"], {}
    for i, b in enumerate(case["widths"]):
        found[f"norm_weight{i}"] = normal(hidden, std=0.2, mean=1.0, generator=generator)
        found[f"norm_bias{i}"] = normal(hidden, std=0.2, generator=generator)
        if b is None:
            continue
        found[f"w_down{i}"] = normal(b, hidden, std=hidden**-0.5, generator=generator)
        found[f"w_up{i}"] = normal(hidden, b, std=b**-0.5, generator=generator)
        if case["biases"]:
            found[f"b_down{i}"] = normal(b, std=0.1, generator=generator)
            found[f"b_up{i}"] = normal(hidden, std=0.1, generator=generator)
        if case["scale"] != "float":
            width = hidden if case["scale"] == "[H]" else 1
            found[f"scale{i}"] = normal(width, std=0.2, mean=1.0, generator=generator)
    return found


def _slots(case, parameters):
    slots = []
    for i, b in enumerate(case["widths"]):
        own = {n.rstrip("0123456789"): p for n, p in parameters.items() if n.endswith(str(i))}
        skip = case["skip"] or not case["residual"]
        if b is None:
            slots.append(Slot(own["norm_weight"], own["norm_bias"], skip=skip))
            continue
        swap = case["swaps"] and case["residual"] and i % 2 == 0
        slots.append(Slot(**{"scale": 2.0, **own}, activation=case["activation"], skip=skip, swap=swap,
                          dropout_p=case["p"] * (i + 1) / 4))  # fmt: skip
    return slots


@every_kernel
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_float64(runner, case):
    table, hidden = case["table"], case["hidden"]
    reason = runner.refusal("bottleneck_rows_forward", case["dtype"], hidden=hidden, bottleneck=64)
    if reason is not None:
        pytest.skip(reason)
    shape = (len(table), case["length"], hidden)

    def build(generator):
        inputs = {"x": torch.randn(shape, dtype=torch.float64, generator=generator)}
        if case["residual"]:
            inputs["residual"] = torch.randn(shape, dtype=torch.float64, generator=generator)
        return inputs | _parameters(case, generator)

    def call(x, residual=None, pad=0, **parameters):
        slots, rows = _slots(case, parameters), torch.tensor(table, dtype=torch.int64, device=x.device)
        return fa.ops.bottleneck_rows(x, slots, rows, residual=residual, seed=11)

    parameter_dtype = torch.float32 if case["parameters"] == "float32" else case["dtype"]
    cases.check(runner, call, build, case["dtype"], parameter_dtype, case=case)


@every_runner
def test_a_row_is_what_its_adapter_alone_gives(runner):
    generator = torch.Generator().manual_seed(0)
    case = {"hidden": 48, "widths": (8, None, 16, 7), "biases": True, "scale": "[1]", "activation": "gelu",
            "skip": True, "residual": True, "swaps": False, "p": 0.0}  # fmt: skip
    slots = _slots(case, {n: p.float().to(runner.device) for n, p in _parameters(case, generator).items()})
    x, residual = torch.randn(2, 6, 9, 48, generator=generator).to(runner.device)
    table = [2, 0, 0, 3, 1, 2]
    with runner.running():
        if runner.refusal("bottleneck_rows_forward", torch.float32, hidden=48, bottleneck=16):
            pytest.skip("not of this backend")
        y = fa.ops.bottleneck_rows(x, slots, torch.tensor(table, device=x.device), residual=residual)
        for row, slot in enumerate(slots[i] for i in table):
            norm = {"norm_weight": slot.norm_weight, "norm_bias": slot.norm_bias}
            if slot.w_down is None:
                alone = fa.ops.add_norm(x[row], residual[row], **norm)
            else:
                weights = (slot.w_down, slot.b_down, slot.w_up, slot.b_up)
                alone = fa.ops.bottleneck(x[row], *weights, residual=residual[row], scale=slot.scale, **norm)
            torch.testing.assert_close(y[row], alone, atol=2e-5, rtol=1e-5)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    for skip, swaps in ((True, True), (False, False)):
        case = {"hidden": 6, "widths": (3, None, 2), "biases": True, "scale": "[H]", "activation": "silu",
                "skip": skip, "residual": True, "swaps": swaps, "p": 0.2}  # fmt: skip
        parameters = _parameters(case, generator)
        x, residual = torch.randn(2, 4, 2, 6, dtype=torch.float64, generator=generator)
        names = list(parameters)
        table = torch.tensor([2, 0, 1, 0])

        def call(x, residual, *values, case=case, names=names, table=table):
            slots = _slots(case, dict(zip(names, values, strict=True)))
            return fa.ops.bottleneck_rows(x, slots, table, residual=residual, eps=1e-2, seed=3)

        leaves = [t.requires_grad_() for t in (x, residual, *parameters.values())]
        with fa.backend("reference"):
            assert torch.autograd.gradcheck(call, leaves)


@every_kernel
def test_backward_is_bitwise_repeatable_and_leaves_absent_slots_zero(runner):
    if runner.refusal("bottleneck_rows_forward", torch.float32, hidden=64, bottleneck=16):
        pytest.skip("not of this backend")
    generator = torch.Generator().manual_seed(2)
    case = {"hidden": 64, "widths": (8, None, 16, 7), "biases": True, "scale": "[1]", "activation": "gelu",
            "skip": True, "residual": True, "swaps": False, "p": 0.1}  # fmt: skip
    parameters = {n: p.float().to(runner.device).requires_grad_() for n, p in _parameters(case, generator).items()}
    x = torch.randn(8, 40, 64, generator=generator).to(runner.device)
    table = torch.tensor([0, 1, 0, 2, 2, 0, 1, 0], device=x.device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with runner.running():
            found = []
            for _ in range(2):
                y = fa.ops.bottleneck_rows(x, _slots(case, parameters), table, residual=x, seed=5)
                found.append(torch.autograd.grad(y.square().sum(), list(parameters.values())))
    finally:
        torch.set_num_threads(threads)
    for name, first, second in zip(parameters, *found, strict=True):
        assert torch.equal(first, second), name
        assert bool(first.any()) == (not name.endswith("3")), name


def test_a_table_written_anew_is_followed():
    generator = torch.Generator().manual_seed(3)
    case = {"hidden": 32, "widths": (8, None), "biases": True, "scale": "float", "activation": "relu",
            "skip": True, "residual": True, "swaps": False, "p": 0.0}  # fmt: skip
    slots = _slots(case, {n: p.float() for n, p in _parameters(case, generator).items()})
    x, table = torch.randn(2, 3, 32, generator=generator), torch.tensor([0, 1])
    first = fa.ops.bottleneck_rows(x, slots, table, residual=x)
    table.copy_(torch.tensor([1, 0]))
    second = fa.ops.bottleneck_rows(x.flip(0), slots, table, residual=x.flip(0))
    assert torch.equal(first, second.flip(0))


def test_bad_arguments_are_named():
    norm, x, table = (torch.ones(8), torch.zeros(8)), torch.randn(2, 3, 8), torch.tensor([0, 0])
    good = Slot(*norm, torch.randn(4, 8), None, torch.randn(8, 4), None)
    for message, arguments in {
        "slots: got none": (x, [], table),
        "rows: got torch.int64": (x, [good], torch.tensor([0])),
        "accepted are slots 0 to 0": (x, [good], torch.tensor([0, 1])),
        "rows: got None": (x, [good], None),
        "x: got shape": (torch.randn(8), [good], table),
        r"slots\[0\].w_up: got None": (x, [Slot(*norm, torch.randn(4, 8))], table),
        r"slots\[0\].w_up: got one without": (x, [Slot(*norm, w_up=torch.randn(8, 4))], table),
        r"slots\[1\].w_down: got shape": (x, [good, Slot(*norm, torch.randn(4, 7), None, torch.randn(8, 4))], table),
        r"slots\[0\].norm_weight": (x, [Slot(torch.ones(7), torch.ones(8))], table),
        "residual: got None": (x, [Slot(*norm, skip=False)], table),
        r"slots\[0\].scale": (x, [Slot(*norm, good.w_down, None, good.w_up, None, scale=torch.ones(3))], table),
        r"slots\[0\].dropout_p": (x, [Slot(*norm, good.w_down, None, good.w_up, None, dropout_p=1.5)], table),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fa.ops.bottleneck_rows(*arguments)
