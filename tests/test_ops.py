"""Every op, forward and backward, in every backend that runs here, against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastadapt as fa
from fastadapt import dispatch
from fastadapt.ops import ACTIVATIONS, schemas
from fastadapt.ops.activations import activate, derivative
from tests import ops_cases as cases
from tests.ops_cases import case_id, laid_out, normal, stored, without

RUNNERS = cases.runners()
KERNELS = [r for r in RUNNERS if r.backend != "reference"]
every_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
every_kernel = pytest.mark.parametrize("runner", KERNELS, ids=str)
pytestmark = pytest.mark.usefixtures("poison")


def _need(runner, op, dtype, **facts):
    reason = runner.refusal(op, dtype, **facts)
    if reason is not None:
        pytest.skip(reason)


def _parameter_dtype(case):
    return torch.float32 if case["parameters"] == "float32" else case["dtype"]


def _distinct(case):
    return 1.0 / max(case["rows"], 1) if case["layout"] == "expanded" else 1.0


# -- accuracy over the trap cases --------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("case", cases.BOTTLENECK_CASES, ids=case_id)
def test_bottleneck(runner, case):
    rows, hidden, b = case["rows"], case["hidden"], case["bottleneck"]
    _need(runner, "bottleneck_forward", case["dtype"], hidden=hidden, bottleneck=b)

    def build(generator):
        inputs = {
            "x": stored(rows, hidden, case["layout"], generator),
            "residual": stored(rows, hidden, case["layout"], generator) if case["residual"] else None,
            "w_down": normal(b, hidden, std=hidden**-0.5, generator=generator),
            "b_down": normal(b, std=0.1, generator=generator) if case["biases"] else None,
            "w_up": normal(hidden, b, std=b**-0.5, generator=generator),
            "b_up": normal(hidden, std=0.1, generator=generator) if case["biases"] else None,
            "norm_weight": normal(hidden, std=0.2, mean=1.0, generator=generator) if case["norm"] else None,
            "norm_bias": normal(hidden, std=0.2, generator=generator) if case["norm"] else None,
        }
        if case["scale"] in ("[1]", "[H]"):
            width = hidden if case["scale"] == "[H]" else 1
            inputs["scale"] = normal(width, std=0.2, mean=1.0, generator=generator)
        return inputs

    def call(x, residual, scale=4.0 if case["scale"] == "float" else 1.0, pad=0, **parameters):
        x, residual = laid_out(x, rows, case["layout"], pad), laid_out(residual, rows, case["layout"], pad)
        options = {"activation": case["activation"], "skip": case["skip"], "dropout_p": case["p"], "seed": 11}
        # At p = 1 a LayerNorm without skip or residual would see constant rows, whose gradient is ill-conditioned.
        eps = 1e-12 if case["p"] < 1.0 or case["skip"] or residual is not None else 1e-2
        y = fa.ops.bottleneck(x, residual=residual, scale=scale, eps=eps, **parameters, **options)
        return without(pad, y)

    cases.check(
        runner, call, build, case["dtype"], _parameter_dtype(case), rows=rows, distinct=_distinct(case), case=case
    )


@every_kernel
@pytest.mark.parametrize("case", cases.ADD_NORM_CASES, ids=case_id)
def test_add_norm(runner, case):
    rows, hidden = case["rows"], case["hidden"]
    _need(runner, "add_norm_forward", case["dtype"], hidden=hidden)
    gamma_mean, gamma_std = (1.0, 0.2) if case["gamma"] == "usual" else (0.0, 1e-4)

    def build(generator):
        return {
            "x": stored(rows, hidden, case["layout"], generator),
            "residual": stored(rows, hidden, case["layout"], generator) if case["residual"] else None,
            "norm_weight": normal(hidden, std=gamma_std, mean=gamma_mean, generator=generator),
            "norm_bias": normal(hidden, std=0.2, generator=generator),
        }

    def call(x, residual, pad=0, **parameters):
        x, residual = laid_out(x, rows, case["layout"], pad), laid_out(residual, rows, case["layout"], pad)
        eps = 1e-12 if case["p"] < 1.0 or residual is not None else 1e-2
        options = {"dropout_p": case["p"], "seed": 5, "eps": eps, "return_sum": case["return_sum"]}
        return without(pad, fa.ops.add_norm(x, residual, **parameters, **options))

    cases.check(
        runner, call, build, case["dtype"], _parameter_dtype(case), rows=rows, distinct=_distinct(case), case=case
    )


@every_kernel
@pytest.mark.parametrize("case", cases.LINEAR_CASES, ids=case_id)
def test_linear(runner, case):
    rows, features = case["rows"], case["features"]
    _need(runner, "linear_forward", case["dtype"], features=features)
    outputs = case["outputs"]
    biased = [case["biases"] == "all" or (case["biases"] == "some" and i % 2 == 0) for i in range(len(outputs))]
    weight_generator = torch.Generator().manual_seed(77)
    weights = [normal(n, features, std=features**-0.5, generator=weight_generator) for n in outputs]

    def build(generator):
        biases = {f"b{i}": normal(n, generator=generator) for i, n in enumerate(outputs) if biased[i]}
        return {"x": stored(rows, features, case["layout"], generator)} | biases

    def call(x, pad=0, **biases):
        # Frozen weights: rounded as the parameters are, and float64 for the oracle.
        dtype = next((b.dtype for b in biases.values()), x.dtype)
        frozen = [w.to(_parameter_dtype(case)).to(dtype).to(x.device) for w in weights]
        x = laid_out(x, rows, case["layout"], pad)
        listed = [biases.get(f"b{i}") for i in range(len(outputs))]
        y = fa.ops.linear(x, frozen, listed, activation=case["activation"], dropout_p=case["p"], seed=3)
        return without(pad, y)

    cases.check(
        runner, call, build, case["dtype"], _parameter_dtype(case), rows=rows, distinct=_distinct(case), case=case
    )


@every_kernel
@pytest.mark.parametrize("case", cases.ATTENTION_CASES, ids=case_id)
def test_attention(runner, case):
    batch, length, heads, width = case["batch"], case["length"], case["heads"], case["heads"] * case["head_dim"]
    prefix_shape = (*([batch] if case["prefix_by_row"] else []), 2, case["prefix"], width)
    _need(runner, "attention_forward", case["dtype"], head_dim=case["head_dim"], length=case["prefix"] + length)
    mask = None
    if case["mask"] == "padding":  # the last third of the keys, in every row but the first
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        mask[1:, ..., length - length // 3 :] = False
    elif case["mask"] == "additive":
        mask = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -1e4)
    elif case["mask"] == "full":  # one query may look at nothing: zeros, not NaN
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
        mask[..., -1, :] = False

    def build(generator):
        prefix = normal(*prefix_shape, generator=generator) if case["prefix"] else None
        return {"qkv": normal(batch, length, 3 * width, generator=generator), "prefix": prefix}

    def call(qkv, prefix):
        options = {"mask": None if mask is None else mask.to(qkv.device), "dropout_p": case["p"], "seed": 9}
        return fa.ops.attention(qkv, heads, prefix=prefix, **options)

    cases.check(runner, call, build, case["dtype"], _parameter_dtype(case), activations=("qkv",), case=case)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "prefix", "std"), [(128, 0, 1.0), (32, 0, 1.0), (34, 30, 1.0), (64, 0, 12.0)])
def test_attention_over_whole_vectors_of_keys(runner, dtype, length, prefix, std):
    """Without a mask nothing is left of the last vector: scaling and the largest score have a pass of their own.

    Far apart scores, std 12: one that is missed as the largest overflows.
    """
    _need(runner, "attention_forward", dtype, head_dim=16, length=prefix + length)

    def build(generator):
        keys = normal(2, prefix, 32, generator=generator) if prefix else None
        return {"qkv": normal(2, length, 96, std=std, generator=generator), "prefix": keys}

    def call(qkv, prefix):
        return fa.ops.attention(qkv, 2, prefix=prefix)

    cases.check(runner, call, build, dtype, dtype, activations=("qkv",))


@every_runner
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
def test_attention_with_a_prefix_is_attention_over_more_keys(runner, by_row, boolean):
    """Against PyTorch's own: the prefix joins keys and values, and a mask that lets it through joins the mask."""
    _need(runner, "attention_forward", torch.float32, head_dim=8, length=10)
    batch, length, before, heads, d = 3, 7, 3, 2, 8
    generator = torch.Generator().manual_seed(1)
    qkv = normal(batch, length, 3 * heads * d, generator=generator).float().to(runner.device)
    prefix = normal(*([batch] if by_row else []), 2, before, heads * d, generator=generator).float().to(runner.device)
    allowed = (torch.rand(batch, 1, length, length, generator=generator) > 0.5).to(runner.device)
    mask = allowed if boolean else torch.zeros(allowed.shape, device=runner.device).masked_fill(~allowed, -1e4)
    with runner.running():
        y = fa.ops.attention(qkv, heads, prefix=prefix, mask=mask)
    q, k, v = qkv.double().view(batch, length, 3, heads, d).permute(2, 0, 3, 1, 4)
    pk, pv = prefix.double().expand(batch, 2, before, -1).view(batch, 2, before, heads, d).permute(1, 0, 3, 2, 4)
    seen = torch.cat([allowed.new_ones(batch, 1, length, before), allowed], -1)
    want = torch.nn.functional.scaled_dot_product_attention(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), seen)
    torch.testing.assert_close(y.double(), want.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)


@every_runner
@pytest.mark.parametrize("by_row", [False, True])
def test_a_prefix_of_no_positions_changes_nothing(runner, by_row):
    _need(runner, "attention_forward", torch.float32, head_dim=8, length=7)
    generator = torch.Generator().manual_seed(1)
    qkv = normal(2, 7, 48, generator=generator).float().to(runner.device)
    prefix = torch.zeros(*([2] if by_row else []), 2, 0, 16, device=runner.device, requires_grad=True)
    with runner.running():
        y = fa.ops.attention(qkv, 2, prefix=prefix)
        assert torch.equal(y.detach(), fa.ops.attention(qkv, 2))
        (grad,) = torch.autograd.grad(y.sum(), prefix)
    assert grad.shape == prefix.shape


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_gradient_is_the_same_bits_every_time(runner, dtype):
    """Summed over the batch in one order, in float32, whatever threads do; a row's own gradient is one of its terms."""
    _need(runner, "attention_backward", dtype, head_dim=16, length=47)
    generator = torch.Generator().manual_seed(1)
    qkv = normal(9, 17, 3 * 32, generator=generator).to(runner.device, dtype)
    prefix = normal(2, 30, 32, generator=generator).to(runner.device, torch.float32)
    dout = normal(9, 17, 32, generator=generator).to(runner.device, dtype)
    rows = prefix.expand(9, -1, -1, -1).contiguous()
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            with runner.running():
                for x in (prefix.requires_grad_(), rows.requires_grad_()):
                    y = fa.ops.attention(qkv, 2, prefix=x, dropout_p=0.1, seed=4)
                    found.append(torch.autograd.grad(y, x, dout)[0])
    finally:
        torch.set_num_threads(threads)
    for shared, by_row in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(shared, found[0]) and torch.equal(by_row, found[1])
    total = torch.zeros_like(found[0])
    for row in found[1]:
        total += row
    assert torch.equal(found[0], total)


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        ([1.0], TypeError, r"prefix: got list; a tensor is accepted"),
        (torch.zeros(2, 3, 16, dtype=torch.int64), TypeError, r"prefix: got dtype torch.int64"),
        (torch.zeros(2, 3, 15), ValueError, r"prefix: got shape \(2, 3, 15\); accepted are \[2, P, 16\] and \[4, 2, P"),
        (torch.zeros(3, 2, 5, 16), ValueError, r"prefix: got shape \(3, 2, 5, 16\)"),
        (torch.zeros(16), ValueError, r"prefix: got shape \(16,\)"),
        (torch.zeros(2, 3, 16, device="meta"), ValueError, r"prefix: is on meta, but qkv is on cpu"),
    ],
)
def test_a_prefix_that_does_not_fit_is_named(prefix, error, message):
    with pytest.raises(error, match=message):
        fa.ops.attention(torch.zeros(4, 5, 48), 2, prefix=prefix)


def test_the_keys_that_a_kernel_is_asked_to_serve_are_those_of_the_prefix_too():
    kernels = dispatch.load("cpu")
    if isinstance(kernels, str):
        pytest.skip(kernels)
    qkv = torch.zeros(1, 760, 24)
    with fa.backend("cpu"):
        fa.ops.attention(qkv, 1, prefix=torch.zeros(2, 8, 8))
        with pytest.raises(RuntimeError, match="sequence of 769"):
            fa.ops.attention(qkv, 1, prefix=torch.zeros(2, 9, 8))


# -- the reference's own derivatives -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_slope_of_leaky_relu_is_rounded_to_no_other_dtype(dtype):
    x = torch.tensor([-3.0, -0.0, 0.0, 2.0, float("inf"), float("-inf")], dtype=dtype, requires_grad=True)
    y = torch.nn.functional.leaky_relu(x, 0.01)
    (wanted,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(activate("leaky_relu", x), y)
    found = derivative("leaky_relu", x.detach())
    assert found.dtype == dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("skip", "norm", "scale"), [(True, True, "float"), (False, False, "[1]"), (True, True, "[H]")])
def test_reference_bottleneck_gradients_are_numerically_right(activation, skip, norm, scale):
    generator = torch.Generator().manual_seed(1)
    leaves = [normal(*shape, generator=generator).requires_grad_() for shape in
              ((3, 6), (3, 6), (4, 6), (4,), (6, 4), (6,), (6,), (6,), (6,) if scale == "[H]" else (1,))]  # fmt: skip

    def f(x, residual, w_down, b_down, w_up, b_up, norm_weight, norm_bias, factor):
        return fa.ops.bottleneck(
            x, w_down, b_down, w_up, b_up, activation=activation, skip=skip, residual=residual, dropout_p=0.3, seed=2,
            scale=2.5 if scale == "float" else factor, norm_weight=norm_weight if norm else None,
            norm_bias=norm_bias if norm else None, eps=1e-5,
        )  # fmt: skip

    with fa.backend("reference"):
        used = leaves if norm and scale != "float" else [*leaves[:6], *(x.detach() for x in leaves[6:])]
        assert torch.autograd.gradcheck(f, used)


def test_reference_add_norm_gradients_are_numerically_right():
    generator = torch.Generator().manual_seed(1)
    leaves = [normal(*shape, generator=generator).requires_grad_() for shape in ((3, 6), (3, 6), (6,), (6,))]

    def f(x, residual, weight, bias):
        return fa.ops.add_norm(x, residual, weight, bias, eps=1e-5, dropout_p=0.3, seed=2, return_sum=True)

    with fa.backend("reference"):
        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_linear_gradients_are_numerically_right(activation):
    generator = torch.Generator().manual_seed(1)
    x, bias = normal(3, 5, generator=generator).requires_grad_(), normal(4, generator=generator).requires_grad_()
    weights = [normal(4, 5, generator=generator), normal(2, 5, generator=generator)]

    def f(x, bias):
        return fa.ops.linear(x, weights, [bias, None], activation=activation, dropout_p=0.3, seed=2)

    with fa.backend("reference"):
        assert torch.autograd.gradcheck(f, [x, bias])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("prefix_shape", [None, (2, 3, 6), (2, 2, 3, 6)], ids=["no prefix", "shared", "by row"])
def test_reference_attention_gradients_are_numerically_right(p, prefix_shape):
    generator = torch.Generator().manual_seed(1)
    qkv = normal(2, 4, 18, generator=generator).requires_grad_()
    prefix = None if prefix_shape is None else normal(*prefix_shape, generator=generator).requires_grad_()
    mask = torch.tensor([True, True, True, False])

    def f(qkv, prefix=None):
        return fa.ops.attention(qkv, 2, prefix=prefix, mask=mask, dropout_p=p, seed=2)

    with fa.backend("reference"):
        assert torch.autograd.gradcheck(f, [qkv] if prefix is None else [qkv, prefix])


# -- the kernel contract -----------------------------------------------------------------------------------------


def _kernel_inputs(device, dtype=torch.float32, rows=17, hidden=48, b=7):
    generator = torch.Generator().manual_seed(4)
    make = {
        "x": (rows, hidden), "dy": (rows, hidden), "s": (rows, hidden), "z": (rows, b), "w_down": (b, hidden),
        "b_down": (b,), "w_up": (hidden, b), "b_up": (hidden,), "gamma": (hidden,), "beta": (hidden,),
    }  # fmt: skip
    tensors = {n: normal(*shape, generator=generator).to(device, dtype) for n, shape in make.items()}
    return tensors | {"seed": torch.tensor(5, device=device)}


def _calls(t, flags):
    """(op, facts, arguments, which flags must leave the matching outputs empty) of every backward op."""
    first, second, third, fourth = flags
    w = [t["w_up"][:, : t["w_down"].shape[0]].t().contiguous()]  # [b, H]: any frozen weight
    hidden, b = t["x"].shape[1], t["w_down"].shape[0]
    return [
        ("bottleneck_backward", {"hidden": hidden, "bottleneck": b},
         (t["dy"], t["x"], t["z"], t["s"], t["w_down"], t["w_up"], "gelu", 2.0, t["beta"], True, t["gamma"], 1e-5,
          0.1, t["seed"], first, second, third, fourth)),
        ("add_norm_backward", {"hidden": hidden},
         (t["dy"], t["x"], t["s"], t["gamma"], 1e-5, 0.1, t["seed"], first, second, third)),
        ("linear_backward", {"features": hidden},
         (t["z"], t["z"].clone(), w, "gelu", 0.1, t["seed"], first, second)),
    ]  # fmt: skip


@every_runner
@pytest.mark.parametrize(
    "flags", list(itertools.product([False, True], repeat=4)), ids=lambda f: "".join("ny"[v] for v in f)
)
def test_outputs_have_the_promised_shape_and_are_empty_where_not_needed(runner, flags):
    t = _kernel_inputs(runner.device)
    with runner.running():
        for op, facts, arguments in _calls(t, flags):
            if runner.refusal(op, torch.float32, **facts) is not None:
                continue
            found = dispatch.pick(op, runner.device, torch.float32, **facts)(*arguments)
            meta = [a.to("meta") if isinstance(a, torch.Tensor) else [w.to("meta") for w in a] if isinstance(a, list)
                    else a for a in arguments]  # fmt: skip
            promised = getattr(torch.ops.fastadapt, op)(*meta)
            for got, want in zip(found, promised, strict=True):
                assert (got.shape, got.dtype) == (want.shape, want.dtype), op
                assert torch.isfinite(got).all(), op
            full = dispatch.load("reference")
            for got, want in zip(found, getattr(full, op)(*arguments), strict=True):
                assert got.numel() == want.numel(), op


@every_runner
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_forward_saves_only_what_is_asked_for(runner, save, norm):
    t = _kernel_inputs(runner.device)
    gamma, beta = (t["gamma"], t["beta"]) if norm else (None, None)
    calls = [
        ("bottleneck_forward", {"hidden": 48, "bottleneck": 7},
         (t["x"], t["w_down"], t["b_down"], t["w_up"], t["b_up"], "gelu", 1.0, None, True, t["s"], gamma, beta, 1e-5,
          0.1, t["seed"], save)),
        ("add_norm_forward", {"hidden": 48}, (t["x"], t["s"], t["gamma"], t["beta"], 1e-5, 0.1, t["seed"], save)),
        ("linear_forward", {"features": 48}, (t["x"], [t["w_down"]], [t["b_down"]], "gelu", 0.1, t["seed"], save)),
    ]  # fmt: skip
    with runner.running():
        for op, facts, arguments in calls:
            if runner.refusal(op, torch.float32, **facts) is not None:
                continue
            found = dispatch.pick(op, runner.device, torch.float32, **facts)(*arguments)
            wanted = getattr(dispatch.load("reference"), op)(*arguments)
            for got, want in zip(found, wanted, strict=True):
                assert got.shape == want.shape and got.dtype == want.dtype, op
                torch.testing.assert_close(got, want)
                pointers = {a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
                assert got.numel() == 0 or got.data_ptr() not in pointers, f"{op} gives back its input's memory"


@every_kernel
def test_x_is_not_read_where_w_down_is_frozen(runner):
    _need(runner, "bottleneck_backward", torch.float32, hidden=48, bottleneck=7)
    t = _kernel_inputs(runner.device)
    arguments = _calls(t, (True, True, True, True))[0][2]
    without = (arguments[0], t["x"].new_empty((0, 48)), *arguments[2:])
    with runner.running():
        kernel = dispatch.pick("bottleneck_backward", runner.device, torch.float32, hidden=48, bottleneck=7)
        full, found = kernel(*arguments), kernel(*without)
    assert found[2].shape == full[2].shape
    for i in (0, 1, 3, 4, 5, 6, 7):
        assert torch.equal(found[i], full[i])


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_bit_for_bit(runner, dtype):
    t = _kernel_inputs(runner.device, dtype, rows=130, hidden=100, b=24)
    with runner.running():
        for op, facts, arguments in _calls(t, (True, True, True, True)):
            if runner.refusal(op, dtype, **facts) is None:
                kernel = dispatch.pick(op, runner.device, dtype, **facts)
                for first, second in zip(kernel(*arguments), kernel(*arguments), strict=True):
                    assert torch.equal(first, second), op


# -- hygiene -----------------------------------------------------------------------------------------------------


def test_poison_reaches_fresh_memory():
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()


def _surrounded(x):
    """x as the middle of a larger buffer of NaN, so that a read past either end shows."""
    margin = 4096
    buffer = x.new_full((x.numel() + 2 * margin,), float("nan"))
    view = buffer[margin : margin + x.numel()].view(x.shape)
    return view.copy_(x)


@every_kernel
@pytest.mark.parametrize(("hidden", "b", "rows"), [(48, 7, 17), (100, 48, 3), (384, 100, 33)])
def test_nothing_outside_the_operands_is_read(runner, hidden, b, rows):
    """0 · NaN is NaN: padding has to be selected away, not multiplied away."""
    t = _kernel_inputs(runner.device, rows=rows, hidden=hidden, b=b)
    walled = {n: _surrounded(x) if x.dim() else x for n, x in t.items()}
    with runner.running():
        for (op, facts, usual), (_, _, inside) in zip(_calls(t, (True,) * 4), _calls(walled, (True,) * 4), strict=True):
            if runner.refusal(op, torch.float32, **facts) is None:
                kernel = dispatch.pick(op, runner.device, torch.float32, **facts)
                for a, b_ in zip(kernel(*usual), kernel(*inside), strict=True):
                    assert torch.equal(a, b_), op

        def forwards(t):
            norm = {"norm_weight": t["gamma"], "norm_bias": t["beta"]}
            weights = (t["w_down"], t["b_down"], t["w_up"], t["b_up"])
            yield fa.ops.bottleneck(t["x"], *weights, residual=t["s"], **norm)
            if runner.refusal("add_norm_forward", torch.float32, hidden=hidden) is None:
                yield fa.ops.add_norm(t["x"], t["s"], **norm)
            if runner.refusal("linear_forward", torch.float32, features=hidden) is None:
                yield fa.ops.linear(t["x"], t["w_down"], t["b_down"], activation="gelu")

        for a, b_ in zip(forwards(t), forwards(walled), strict=True):
            assert torch.equal(a, b_)


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_a_bad_row(runner, bad):
    t = _kernel_inputs(runner.device, rows=17, hidden=48, b=7)
    _need(runner, "bottleneck_forward", torch.float32, hidden=48, bottleneck=7)
    norm = {"norm_weight": t["gamma"], "norm_bias": t["beta"]}
    weights = (t["w_down"], t["b_down"], t["w_up"], t["b_up"])
    good = torch.arange(17) != 5

    def run(x):
        x = x.clone().requires_grad_()
        y = fa.ops.bottleneck(x, *weights, residual=t["s"], **norm)
        return y.detach(), torch.autograd.grad(y, x, t["dy"])[0]

    spoiled = t["x"].clone()
    spoiled[5, 40] = bad
    with runner.running():
        for clean, found in zip(run(t["x"]), run(spoiled), strict=True):
            assert torch.equal(clean[good], found[good])
            assert found[5].isnan().any()


@every_kernel
def test_a_dropped_infinity_leaves_no_nan(runner):
    _need(runner, "add_norm_forward", torch.float32, hidden=100)
    seed = torch.tensor(5, device=runner.device)
    kept = fa.ops.dropout.keep_mask(17, 100, 0.3, seed)
    t = _kernel_inputs(runner.device, hidden=100)
    x = t["x"].masked_fill(~kept, float("inf"))
    with runner.running():
        y, s = fa.ops.add_norm(x, t["s"], t["gamma"], t["beta"], dropout_p=0.3, seed=5, return_sum=True)
    with fa.backend("reference"):
        want = fa.ops.add_norm(x, t["s"], t["gamma"], t["beta"], dropout_p=0.3, seed=5)
    assert torch.isfinite(y).all() and torch.isfinite(s).all()
    torch.testing.assert_close(y, want)


@every_kernel
def test_a_large_mean_does_not_swallow_the_variance(runner):
    """The textbook E[s²] - E[s]² loses every digit here; two passes or a shift lose none."""
    _need(runner, "add_norm_forward", torch.float32, hidden=768)
    parameters = {"norm_weight": torch.ones(768), "norm_bias": torch.zeros(768)}

    def build(generator):
        return {"x": normal(5, 768, mean=3000.0, generator=generator)}

    def call(x):
        moved = {n: p.to(x.device, x.dtype) for n, p in parameters.items()}
        y = fa.ops.add_norm(x, None, **moved)
        zero = x.new_zeros
        return y, fa.ops.bottleneck(x, zero(8, 768), None, zero(768, 8), None, **moved)

    cases.check(runner, call, build, torch.float32, torch.float32)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["first", "all", "last"])
def test_columns_far_from_the_others_do_not_spoil_a_norm(runner, dtype, place):
    """Moments are of sums that cancel where a row's first columns, or all of them, stand far from its mean."""
    _need(runner, "bottleneck_forward", dtype, hidden=768, bottleneck=8)
    columns = {"first": slice(0, 32), "all": slice(None), "last": slice(736, None)}[place]

    def build(generator):
        x = normal(5, 768, generator=generator)
        x[:, columns] += 400.0
        down, up = normal(8, 768, std=1e-3, generator=generator), normal(768, 8, generator=generator)
        weight, bias = normal(768, std=0.2, mean=1.0, generator=generator), normal(768, generator=generator)
        residual = normal(5, 768, generator=generator)
        return {"x": x, "residual": residual, "down": down, "up": up, "weight": weight, "bias": bias}

    def call(x, residual, down, up, weight, bias):
        return fa.ops.bottleneck(x, down, None, up, None, residual=residual, norm_weight=weight, norm_bias=bias)

    cases.check(runner, call, build, dtype, dtype)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_almost_one_value_keep_their_variance(runner, dtype):
    """A few columns are one step of bfloat16 off; the mean's square is ten million times the variance."""
    _need(runner, "bottleneck_forward", dtype, hidden=768, bottleneck=8)
    generator = torch.Generator().manual_seed(13)
    x = torch.full((64, 768), 1.9921875)
    x.scatter_(1, torch.randint(0, 768, (64, 3), generator=generator), 2.0)
    weight, bias = torch.ones(768), torch.zeros(768)
    want = torch.nn.functional.layer_norm(x.double(), (768,), eps=1e-12)
    x, weight, bias = (t.to(runner.device, dtype) for t in (x, weight, bias))
    with torch.no_grad(), runner.running():
        norm = fa.ops.add_norm(x, None, weight, bias)
        down, up, residual = (x.new_zeros(*shape) for shape in ((8, 768), (768, 8), (64, 768)))
        adapter = fa.ops.bottleneck(x, down, None, up, None, residual=residual, norm_weight=weight, norm_bias=bias)
    for y in (norm, adapter):
        off = (y.cpu().double() - want).norm() / want.norm()
        assert off < (1e-3 if dtype is torch.float32 else 4e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="12 GiB of activations: a GPU's memory")
@every_kernel
def test_offsets_past_two_to_the_31(runner):
    """The last rows of 2**31 elements and more are what they are alone."""
    if runner.device != "cuda":
        pytest.skip("runs on the GPU")
    hidden, rows, dtype = 1024, 2**21 + 64, torch.bfloat16
    t = _kernel_inputs("cuda", dtype, rows=64, hidden=hidden, b=16)
    x = torch.zeros(rows, hidden, dtype=dtype, device="cuda")
    x[-64:] = t["x"]
    weights = (t["w_down"], t["b_down"], t["w_up"], t["b_up"])
    norm = {"norm_weight": t["gamma"], "norm_bias": t["beta"]}
    with runner.running():
        for op in (lambda x: fa.ops.bottleneck(x, *weights, **norm), lambda x: fa.ops.add_norm(x, None, **norm)):
            torch.testing.assert_close(op(x)[-64:], op(x[-64:]))


# -- autograd, autocast, checkpointing ---------------------------------------------------------------------------


def _leaves(device, dtype=torch.float32, rows=17, hidden=100, b=12):
    t = _kernel_inputs(device, dtype, rows, hidden, b)
    return {n: x.requires_grad_() for n, x in t.items() if n != "seed"}


def _three_ops(t, p=0.0, seed=None):
    x = fa.ops.bottleneck(
        t["x"], t["w_down"], t["b_down"], t["w_up"], t["b_up"], residual=t["s"], norm_weight=t["gamma"],
        norm_bias=t["beta"], dropout_p=p, seed=seed, eps=1e-5,
    )  # fmt: skip
    x = fa.ops.add_norm(x, t["dy"], t["gamma"], t["beta"], dropout_p=p, seed=seed, eps=1e-5)
    return fa.ops.linear(x, t["w_up"].detach().t(), t["b_down"], activation="gelu", dropout_p=p, seed=seed)


@every_runner
def test_autocast_gives_its_dtype_and_keeps_the_parameters_gradients_wide(runner):
    _need(runner, "bottleneck_backward", torch.bfloat16, hidden=100, bottleneck=12)
    t = _leaves(runner.device)
    with runner.running(), torch.autocast(runner.device, torch.bfloat16):
        y = _three_ops(t)
    assert y.dtype == torch.bfloat16
    with runner.running():
        y.sum().backward()
    for name in ("x", "s", "w_down", "b_down", "w_up", "b_up", "gamma", "beta"):
        assert t[name].grad.dtype == torch.float32, name
        assert torch.isfinite(t[name].grad).all(), name
    for name in ("w_down", "w_up", "gamma"):  # not rounded to bf16 on the way
        grad = t[name].grad
        assert not torch.equal(grad, grad.bfloat16().float()) or runner.backend == "reference", name


@every_runner
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(runner, reentrant):
    _need(runner, "bottleneck_backward", torch.float32, hidden=100, bottleneck=12)
    found = []
    for checkpointed in (False, True):
        t = _leaves(runner.device)
        torch.manual_seed(3)
        with runner.running():

            def f(x, t=t):
                return _three_ops(t | {"x": x}, p=0.5)

            y = checkpoint(f, t["x"], use_reentrant=reentrant) if checkpointed else f(t["x"])
            y.sum().backward()
        found.append((y.detach(), t["x"].grad, t["w_down"].grad))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_product_is_zeros(grad, poison):
    x, none, bias = torch.ones(3, 8, requires_grad=grad), torch.empty(0, 8), torch.full((8,), 2.0)
    both = bias.expand(3, 8)
    assert torch.equal(fa.ops.bottleneck(x, none, none[:, 0], none.T, bias, skip=False), both)
    assert torch.equal(fa.ops.linear(none.T[:3], none.T, bias), both)
    assert torch.equal(fa.ops.lora_linear(none.T[:3], none.T, bias, none.T[:1], bias[:, None]), both)
    y = fa.ops.linear(x, none)
    assert y.shape == (3, 0)
    if grad:
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros(3, 8))


@pytest.mark.parametrize("runner", [r for r in KERNELS if r.backend == "cpu"], ids=str)
def test_a_gradient_through_any_number_of_outputs(runner):
    """A vocabulary's: more of k in backward than any list of fixed length holds."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(270_000, 4, generator=generator)
    x = torch.randn(2, 4, generator=generator, requires_grad=True)
    with runner.running():
        fa.ops.linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.double().sum(0).float().expand(2, 4), rtol=1e-5, atol=1e-2)


@every_runner
@pytest.mark.parametrize("loss", ["sum", "square"])  # the gradient of a sum is a constant
@pytest.mark.parametrize("op", ["bottleneck", "add_norm", "linear", "attention", "drop"])
def test_double_backward_raises_clearly(runner, op, loss):
    facts = {"bottleneck": {"hidden": 100, "bottleneck": 12}, "add_norm": {"hidden": 100}, "linear": {"features": 100},
             "attention": {"head_dim": 24, "length": 17}, "drop": {}}[op]  # fmt: skip
    _need(runner, op if op == "drop" else f"{op}_backward", torch.float32, **facts)
    t = _leaves(runner.device)
    with runner.running():
        y = {
            "bottleneck": lambda: fa.ops.bottleneck(t["x"], t["w_down"], t["b_down"], t["w_up"], t["b_up"]),
            "add_norm": lambda: fa.ops.add_norm(t["x"], t["s"], t["gamma"], t["beta"]),
            "linear": lambda: fa.ops.linear(t["x"], t["w_up"].detach().t(), t["b_down"], activation="gelu"),
            "attention": lambda: fa.ops.attention(t["x"][None, :, :72], 1),
            "drop": lambda: fa.ops.drop(t["x"], 0.5),
        }[op]()
        (grad,) = torch.autograd.grad((y.square() if loss == "square" else y).sum(), t["x"], create_graph=True)
        penalised = t["x"].sum() + grad.square().sum()  # which has a gradient without the penalty's, too
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(penalised, t["x"], retain_graph=True)  # runs what leads there alone
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            penalised.backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "4"}, TypeError, "scale: got '4'; accepted is a float, or a tensor"),
        ({"scale": None}, TypeError, "scale: got None"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: got '0.1'; accepted is a probability"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan"),
        ({"eps": -1e-3}, ValueError, "eps: got -0.001; accepted is a number from 0"),
        ({"eps": "small"}, TypeError, "eps: got 'small'"),
        ({"skip": "no"}, TypeError, "skip: got 'no'; accepted are True and False"),
        ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed: got 9223372036854775808; accepted is an int of 64 bits"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed: got float"),
    ],
)
def test_options_of_another_kind_are_named(options, error, message):
    t = {name: tensor.detach() for name, tensor in _leaves("cpu").items()}
    with pytest.raises(error, match=message):
        fa.ops.bottleneck(t["x"], t["w_down"], t["b_down"], t["w_up"], t["b_up"], **options)


def test_a_scale_of_a_lora_that_is_no_number_is_named():
    x, a, b = torch.randn(3, 8), torch.randn(2, 8), torch.randn(8, 2)
    with pytest.raises(TypeError, match="scale: got 'x'; accepted is a number"):
        fa.ops.lora_linear(x, torch.randn(8, 8), None, a, b, scale="x")


def test_compiled_training_through_a_frozen_adapter():
    leaves = _leaves("cpu")
    t = {name: tensor.detach() for name, tensor in leaves.items()}

    def loss(x):
        y = fa.ops.bottleneck(x, t["w_down"], t["b_down"], t["w_up"], t["b_up"], dropout_p=0.5, seed=3)
        return y.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, found = (torch.autograd.grad(f(leaves["x"]), leaves["x"])[0] for f in (loss, compiled))
    torch.testing.assert_close(found, expected)


@every_runner
def test_frozen_parameters_get_no_gradient(runner):
    _need(runner, "bottleneck_backward", torch.float32, hidden=100, bottleneck=12)
    t = _leaves(runner.device)
    frozen = {n: x.detach() for n, x in t.items()} | {"b_up": t["b_up"]}
    with runner.running():
        _three_ops(frozen).sum().backward()
    assert t["b_up"].grad is not None
    assert all(x.grad is None for n, x in t.items() if n != "b_up")


def test_the_fake_kernels_cover_every_op():
    ops = {"bottleneck", "add_norm", "linear", "attention"}
    assert schemas.library is not None
    for op in ops:
        for direction in ("forward", "backward"):
            assert hasattr(torch.ops.fastadapt, f"{op}_{direction}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(128,), (48, 80)], ids=str)
def test_a_large_linear_output_is_that_of_its_parts(dtype, widths):
    """Results of 8 MB and more are stored past the caches, in whole lines: also where a weight starts within a line."""
    rows = (8 << 20) // (sum(widths) * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 32, generator=generator).to(dtype)
    weights = [torch.randn(n, 32, generator=generator).to(dtype) for n in widths]
    biases = [torch.randn(n, generator=generator).to(dtype) for n in widths]
    whole = fa.ops.linear(x, weights, biases)
    parts = [fa.ops.linear(part, weights, biases) for part in x.split(rows // 4)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "p"), [("gelu", 0.0), ("gelu_new", 0.0), ("none", 0.3)])
def test_large_results_of_a_linear_that_trains_are_those_of_its_parts(dtype, activation, p):
    """Pre-activations, dropped outputs and dx are stored past the caches as well."""
    rows = (8 << 20) // (128 * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 128, generator=generator).to(dtype).requires_grad_()
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((128, 128), (128,)))
    g = torch.randn(rows, 128, generator=generator).to(dtype)
    with torch.no_grad():
        want = fa.ops.linear(x, weight, bias, activation=activation)
    y = fa.ops.linear(x, weight, bias, activation=activation, dropout_p=p, seed=7)
    kept = y != 0 if p else torch.ones_like(y, dtype=torch.bool)
    torch.testing.assert_close(y[kept], (want / (1 - p))[kept])
    y.backward(g)
    few, dx = rows // 4, []
    for first in range(0, rows, few):
        part = x.detach()[first : first + few].requires_grad_()
        masked = torch.where(kept, g / (1 - p), 0)[first : first + few]
        fa.ops.linear(part, weight, bias, activation=activation).backward(masked)
        dx.append(part.grad)
    torch.testing.assert_close(x.grad, torch.cat(dx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_bottleneck_output_is_that_of_its_parts(dtype):
    """Results of 8 MB and more are stored past the caches here as well."""
    rows, generator = (8 << 20) // (64 * dtype.itemsize), torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, 64, generator=generator).to(dtype) for _ in range(2))
    down, up = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((16, 64), (64, 16)))
    norm = {"norm_weight": torch.ones(64).to(dtype), "norm_bias": torch.zeros(64).to(dtype)}

    def run(x, residual):
        return fa.ops.bottleneck(x, down, None, up, None, residual=residual, **norm)

    parts = [run(*part) for part in zip(x.split(rows // 4), residual.split(rows // 4), strict=True)]
    assert torch.equal(run(x, residual), torch.cat(parts))


@pytest.mark.parametrize("runner", [r for r in KERNELS if r.backend == "cpu"], ids=str)
def test_a_float_keeps_all_its_bits(runner):
    """By the identity it comes out as it was, also where it is multiplied in parts; infinity stays no finite number."""
    generator = torch.Generator().manual_seed(0)

    def numbers(low, high):
        powers = 2.0 ** torch.randint(low, high, (70, 100), generator=generator)
        return torch.randn(70, 100, generator=generator) * powers

    x, tiny = numbers(-80, 80), numbers(-149, -80)
    x[3, 5], x[40, 99] = 3.3e38, -3.3e38
    eye = torch.eye(100)
    with runner.running():
        assert torch.equal(fa.ops.linear(x, eye), x)
        assert torch.equal(fa.ops.linear(eye, x), x.T)
        for y in (fa.ops.linear(tiny, eye), fa.ops.linear(eye, tiny).T):  # some processors take denormals as zero
            torch.testing.assert_close(y, tiny, rtol=0, atol=2.0**-124)
        x[7, 11], x[8, 12] = math.inf, math.nan
        finite = fa.ops.linear(x, eye).isfinite()
        assert not finite[7:9].all(1).any() and finite[9:].all()


@pytest.mark.parametrize("runner", [r for r in KERNELS if r.backend == "cpu"], ids=str)
@pytest.mark.parametrize("hidden", [40, 64, 96])
def test_bfloat16_is_rounded_to_nearest_even(runner, hidden):
    """Sums of two bfloat16 numbers, many of which lie in the middle between two others, as PyTorch rounds them."""
    generator = torch.Generator().manual_seed(hidden)
    x, residual = (torch.randn(50, hidden, generator=generator).bfloat16() for _ in range(2))
    want = x + residual
    ties = x.float().add(residual.float()).view(torch.int32) % 0x10000 == 0x8000
    assert ties.sum() > 100
    ones, zeros = torch.ones(hidden), torch.zeros(hidden)
    with runner.running():
        assert torch.equal(fa.ops.add_norm(x, residual, ones, zeros, return_sum=True)[1], want)
        nothing = torch.zeros(8, hidden).bfloat16(), None, torch.zeros(hidden, 8).bfloat16(), None
        assert torch.equal(fa.ops.bottleneck(x, *nothing, residual=residual), want)
        for row in range(5):
            y = fa.ops.linear(x, torch.eye(hidden).bfloat16(), residual[row].float())
            assert torch.equal(y, x + residual[row])


@pytest.mark.parametrize("runner", [r for r in KERNELS if r.backend == "cpu"], ids=str)
@pytest.mark.parametrize("hidden", [40, 64])
def test_rounding_to_bfloat16_keeps_every_nan(runner, hidden):
    """Also those whose lower bits are ones, which a carry would turn into a zero."""
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32)
    bias = torch.zeros(hidden)
    bias[: 2 * len(patterns) : 2] = patterns.view(torch.float32)
    x = torch.ones(3, hidden).bfloat16()
    with runner.running():
        for y in (
            fa.ops.linear(x, torch.eye(hidden).bfloat16(), bias),
            fa.ops.linear(x, torch.eye(hidden).bfloat16(), bias, activation="gelu"),
            fa.ops.add_norm(torch.arange(hidden).expand(3, -1).bfloat16(), None, torch.ones(hidden), bias),
        ):
            assert torch.equal(y.isnan(), bias.isnan().expand(3, -1))


def test_statistics_are_those_of_the_sum_as_it_is_stored():
    """In bfloat16 the sum is rounded before the LayerNorm; far from zero that decides its deviation."""
    generator = torch.Generator().manual_seed(0)
    x = (500 + torch.randn(64, 768, generator=generator)).bfloat16()
    down, up = torch.randn(16, 768, generator=generator) * 1e-3, torch.randn(768, 16, generator=generator)
    ones, zeros = torch.ones(768).bfloat16(), torch.zeros(768).bfloat16()
    residual = torch.randn(64, 768, generator=generator).bfloat16()
    y = fa.ops.bottleneck(
        x, down.bfloat16(), None, up.bfloat16(), None, skip=True, residual=residual, norm_weight=ones, norm_bias=zeros
    )  # fmt: skip
    deviation = y.float().std(-1, unbiased=False)
    assert (deviation - 1).abs().max() < 0.01


@pytest.mark.skipif(isinstance(dispatch.load("cpu"), str), reason="no C++ kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_the_same_for_any_number_of_threads(dtype):
    """Each thread has a share of the blocks and helps others with theirs: none is left out, whatever their numbers."""
    generator = torch.Generator().manual_seed(12)
    x, residual = (torch.randn(700, 64, generator=generator).to(dtype) for _ in range(2))
    down, up = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((16, 64), (64, 16)))
    norm = {"norm_weight": torch.ones(64).to(dtype), "norm_bias": torch.zeros(64).to(dtype)}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5, 300):
            torch.set_num_threads(count)
            with fa.backend("cpu"):
                y = fa.ops.bottleneck(x, down, None, up, None, residual=residual, **norm)
                found.append((y, fa.ops.linear(x, torch.cat([down] * 9))))
    finally:
        torch.set_num_threads(threads)
    for y, z in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(z, found[0][1])


@pytest.mark.skipif(isinstance(dispatch.load("cpu"), str), reason="no C++ kernels here")
def test_packed_weights_are_their_own_while_others_come_and_go():
    """Weights of half a megabyte lie in blocks that several share; some are dropped, changed and replaced."""
    generator = torch.Generator().manual_seed(11)
    cpu = dispatch.load("cpu")

    def weights(count):
        return [torch.randn(384, 384, generator=generator) for _ in range(count)]

    x, kept = torch.randn(3, 384, generator=generator), weights(90)  # more than one block holds
    with fa.backend("cpu"):
        for turn in range(4):
            for w in kept:
                torch.testing.assert_close(fa.ops.linear(x, w), x @ w.T, atol=1e-3, rtol=1e-4)
            kept = kept[turn % 2 :: 2] + weights(30)
            kept[0].mul_(2.0)
            assert cpu.forget(kept[1:3]) == 2
        size = sum(w.nbytes for w in kept[:3])
        assert cpu.release() >= size
        torch.testing.assert_close(fa.ops.linear(x, kept[3]), x @ kept[3].T, atol=1e-3, rtol=1e-4)
