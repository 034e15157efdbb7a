"""AdapterFusion's mix in the bottlenecks: every backend against float64, and against the formula of the paper."""

from __future__ import annotations

import pytest
import torch

import fastadapt as fa
from tests import ops_cases as cases
from tests.ops_cases import case_id, normal

RUNNERS = cases.runners()
KERNELS = [r for r in RUNNERS if r.refusal("mix_forward", torch.float32) is None and r.backend != "reference"]
pytestmark = pytest.mark.usefixtures("poison")

CASES = cases.pairwise(
    {
        "dtype": cases.DTYPES,
        "rows": (0, 1, 3, 17, 130),
        "count": (1, 2, 3, 8, 17, 70),
        "bottleneck": (1, 7, 16, 48, 58),
        "p": (0.0, 0.1, 1.0),
        "shift": (True, False),
        "layout": ("2d", "3d"),
    }
)


@pytest.mark.parametrize("runner", KERNELS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_float64(runner, case):
    rows, count, b = case["rows"], case["count"], case["bottleneck"]
    width = count * b
    if reason := runner.refusal("mix_forward", case["dtype"], adapters=count, bottleneck=b):
        pytest.skip(reason)
    lead = (rows,) if case["layout"] == "2d" else (1, rows)

    def build(generator):
        inputs = {
            "sigma": normal(*lead, width, generator=generator),
            "t": normal(*lead, width + count, std=b**-0.5, generator=generator),
        }
        return inputs | ({"shift": normal(*lead, generator=generator)} if case["shift"] else {})

    def call(sigma, t, shift=None):
        return fa.ops.mix(sigma, t, count, shift=shift, dropout_p=case["p"], seed=7)

    cases.check(runner, call, build, case["dtype"], case["dtype"], activations=("sigma", "t", "shift"), case=case)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    leaves = [normal(*shape, generator=generator).requires_grad_() for shape in ((4, 6), (4, 9), (4,))]
    with fa.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda sigma, t, shift: fa.ops.mix(sigma, t, 3, shift=shift, dropout_p=0.3, seed=2), leaves
        )


@pytest.mark.parametrize("runner", RUNNERS[:1] + KERNELS, ids=str)
def test_it_is_the_mix_of_whole_adapters(runner):
    """Σ p_n a_n with a_n = U_n σ_n + β_n and p = softmax(k · a_n), as the paper has it."""
    generator = torch.Generator().manual_seed(3)
    count, b, hidden, rows = 3, 5, 12, 6
    sigma, up, beta, key = (
        normal(*shape, generator=generator).float().to(runner.device)
        for shape in ((rows, count, b), (count, hidden, b), (count, hidden), (rows, hidden))
    )
    a = torch.einsum("tnb,nhb->tnh", sigma, up) + beta
    p = torch.softmax(torch.einsum("th,tnh->tn", key, a), -1)
    want = torch.einsum("tn,tnh->th", p, a)
    both = torch.cat([up.permute(1, 0, 2).flatten(1), beta.T], 1)
    with runner.running():
        m = fa.ops.mix(sigma.flatten(1), key @ both, count)
    torch.testing.assert_close(m[:, -count:], p, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m @ both.T, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runner", KERNELS, ids=str)
def test_backward_is_bitwise_repeatable(runner):
    generator = torch.Generator().manual_seed(4)
    leaves = [normal(*s, generator=generator).float().to(runner.device).requires_grad_() for s in ((33, 24), (33, 27))]
    with runner.running():
        first, second = (
            torch.autograd.grad(fa.ops.mix(*leaves, 3, dropout_p=0.2, seed=1).square().sum(), leaves) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_named():
    sigma, t = torch.randn(4, 6), torch.randn(4, 9)
    for message, arguments, options in (
        ("sigma: got shape", (sigma, t, 4), {}),
        ("sigma: got shape", (sigma, t, 0), {}),
        ("t: got shape", (sigma, torch.randn(4, 8), 3), {}),
        ("shift: got shape", (sigma, t, 3), {"shift": torch.randn(3)}),
        ("sigma: got dtype", (sigma.long(), t, 3), {}),
        ("dropout_p: got", (sigma, t, 3), {"dropout_p": 2.0}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fa.ops.mix(*arguments, **options)
