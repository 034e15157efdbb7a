"""The CUDA C++ kernels without a GPU: the same bodies run on a CPU, block by block, forward and backward in threads.

What this can't show is in csrc/cuda/emulated.cpp. With a GPU the same tests run the compiled kernels.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import fastadapt as fa
from fastadapt import dispatch, proven
from fastadapt.ops import Residue, merge_, swap_, unmerge_
from fastadapt.ops.merge import COPY_ABOVE
from tests import ops_cases as cases
from tests.ops_cases import case_id, laid_out, normal, stored, without
from tests.test_merge_ops import all_same, clones, hard_weights, parts, same, update

RUNNERS = cases.cuda_runners()
pytestmark = [pytest.mark.skipif(not RUNNERS, reason="the C++ kernels are not compiled"),
              pytest.mark.usefixtures("poison")]  # fmt: skip
DEVICE = RUNNERS[0].device if RUNNERS else "cpu"
TYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["ascending", "descending"])
def order(request):
    """The order in which a phase's threads and the blocks run: two results would mean a missing barrier."""
    if DEVICE != "cpu" and request.param == "descending":
        pytest.skip("a GPU has its own order")
    torch.ops.fastadapt_cuda.emulate_backwards(request.param == "descending")
    yield request.param
    torch.ops.fastadapt_cuda.emulate_backwards(False)


# -- few rows ----------------------------------------------------------------------------------------------------


def _errors(case: dict, call, inputs: dict[str, Tensor | None], activations: set[str]) -> list[str]:
    """What is over twice the error of eager code of the same dtype, both against float64; forward alone."""
    dtype = case["dtype"]
    of = {n: dtype if n in activations or case["parameters"] == "same" else torch.float32 for n in inputs}
    typed = {n: None if x is None else x.to(of[n]) for n, x in inputs.items()}
    exact = {n: None if x is None else x.double() for n, x in typed.items()}
    with torch.no_grad(), fa.backend("reference"):
        oracle, plain = call(**exact), call(**typed)
        pads = call(**typed, pad=cases.FEW_ROWS)
    with torch.no_grad(), fa.backend("cuda"):
        mine = call(**{n: None if x is None else x.to(DEVICE) for n, x in typed.items()})
    over = []
    for n, (want, theirs, padded, got) in enumerate(zip(oracle, plain, pads, mine, strict=True)):
        bounds, found = [cases.Errors(), cases.Errors()], cases.Errors()
        found.add(got, want)
        for errors, results in zip(bounds, (theirs, padded), strict=True):
            errors.add(results, want)
        if (line := cases.excess(found, bounds, f"y{n}")) is not None:
            over.append(line)
    return over


def _hold(case: dict, call, build, activations: set[str]) -> None:
    """As in ops_cases.check, one independent draw more where a single rounding is over its bound."""
    for attempt in range(cases.ATTEMPTS):
        over = _errors(case, call, build(torch.Generator().manual_seed(attempt)), activations)
        if not over:
            return
    raise AssertionError("\n".join(over))


@pytest.mark.parametrize("case", cases.BOTTLENECK_CASES, ids=case_id)
def test_bottleneck_forward(case, order):
    rows, hidden, b = case["rows"], case["hidden"], case["bottleneck"]

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
            inputs["scale"] = normal(hidden if case["scale"] == "[H]" else 1, std=0.2, mean=1.0, generator=generator)
        return inputs

    def call(x, residual, scale=4.0 if case["scale"] == "float" else 1.0, pad=0, **parameters):
        x, residual = laid_out(x, rows, case["layout"], pad), laid_out(residual, rows, case["layout"], pad)
        eps = 1e-12 if case["p"] < 1.0 or case["skip"] or residual is not None else 1e-2
        y = fa.ops.bottleneck(
            x, residual=residual, scale=scale, eps=eps, activation=case["activation"], skip=case["skip"],
            dropout_p=case["p"], seed=11, **parameters,
        )  # fmt: skip
        return (without(pad, y),)

    _hold(case, call, build, {"x", "residual"})


@pytest.mark.parametrize("case", cases.ADD_NORM_CASES, ids=case_id)
def test_add_norm_forward(case, order):
    rows, hidden = case["rows"], case["hidden"]
    mean, std = (1.0, 0.2) if case["gamma"] == "usual" else (0.0, 1e-4)

    def build(generator):
        return {
            "x": stored(rows, hidden, case["layout"], generator),
            "residual": stored(rows, hidden, case["layout"], generator) if case["residual"] else None,
            "norm_weight": normal(hidden, std=std, mean=mean, generator=generator),
            "norm_bias": normal(hidden, std=0.2, generator=generator),
        }

    def call(x, residual, norm_weight, norm_bias, pad=0):
        x, residual = laid_out(x, rows, case["layout"], pad), laid_out(residual, rows, case["layout"], pad)
        eps = 1e-12 if case["p"] < 1.0 or residual is not None else 1e-2
        found = fa.ops.add_norm(
            x, residual, norm_weight, norm_bias, eps=eps, dropout_p=case["p"], seed=5, return_sum=case["return_sum"]
        )
        return without(pad, found if isinstance(found, tuple) else (found,))

    _hold(case, call, build, {"x", "residual"})


def _kernel_inputs(rows, hidden, b, dtype):
    generator = torch.Generator().manual_seed(rows)
    made = [normal(rows, hidden, generator=generator), normal(b, hidden, std=hidden**-0.5, generator=generator),
            normal(b, std=0.1, generator=generator), normal(hidden, b, std=b**-0.5, generator=generator),
            normal(hidden, std=0.1, generator=generator)]  # fmt: skip
    return [t.to(dtype).to(DEVICE) for t in made]


@every_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_what_is_kept_for_backward_is_the_references(dtype, rows, order):
    """z and s, for one, two and four rows a block (the emulated device has two processors)."""
    x, down, down_bias, up, up_bias = _kernel_inputs(rows, 100, 12, dtype)
    norm = (x[0].abs() + 0.5, x[0])
    given = (x, down, down_bias, up, up_bias, "gelu", 1.0, None, True, x, *norm, 1e-12, 0.0, None, True)
    y, z, s = dispatch.kernel("cuda", "bottleneck_forward")(*given)
    _, z_exact, s_exact = dispatch.kernel("reference", "bottleneck_forward")(
        *(g.double() if isinstance(g, Tensor) else g for g in given)
    )
    allowed = 2 * torch.finfo(dtype).eps
    assert (z.double() - z_exact).abs().max() <= allowed * z_exact.abs().max()
    assert (s.double() - s_exact).abs().max() <= allowed * s_exact.abs().max()
    empty = dispatch.kernel("cuda", "bottleneck_forward")(*given[:-1], False)
    assert same(empty[0], y) and empty[1].numel() == empty[2].numel() == 0


@every_dtype
def test_a_row_does_not_depend_on_how_many_there_are(dtype, order):
    """Another number of rows a block, the same order of every sum."""
    x, down, down_bias, up, up_bias = _kernel_inputs(9, 100, 12, dtype)

    def run(x):
        return fa.ops.bottleneck(x, down, down_bias, up, up_bias, residual=x, norm_weight=x[0] * 0 + 1, norm_bias=x[0])

    with torch.no_grad(), fa.backend("cuda"):
        whole, again, alone = run(x), run(x), run(x[:1])
    assert same(whole, again)
    with torch.no_grad(), fa.backend("cuda"):
        bias = x[0]
        one = fa.ops.bottleneck(x[:1], down, down_bias, up, up_bias, residual=x[:1], norm_weight=bias * 0 + 1,
                                norm_bias=bias)  # fmt: skip
    assert same(one, alone) and same(whole[:1], alone)


def test_nan_in_a_row_stays_in_that_row(order):
    x, down, down_bias, up, up_bias = _kernel_inputs(6, 100, 7, torch.bfloat16)
    x[2, 3] = torch.nan
    with torch.no_grad(), fa.backend("cuda"):
        y = fa.ops.bottleneck(x, down, down_bias, up, up_bias, norm_weight=x[0] * 0 + 1, norm_bias=x[0])
    assert y[2].isnan().all() and not y[[0, 1, 3, 4, 5]].isnan().any()


# -- merging -----------------------------------------------------------------------------------------------------


def _cycle(backend, weights, first, second):
    """All that merging can do, and what it left at each step."""
    a, b, scales = first
    found, kept, swapped, from_rounded = [], [], [], []
    w = clones(weights)
    with fa.backend(backend):
        merge_(w, a, b, scales, kept)
        found += [*clones(w), *parts(kept)]
        rounded = clones(w)
        swap_(w, a, b, scales, kept, *second, swapped)
        found += [*clones(w), *parts(swapped)]
        unmerge_(w, *second, swapped)
        found += clones(w)
        swap_(rounded, a, b, scales, None, *second, from_rounded)
        found += [*clones(rounded), *parts(from_rounded)]
        unmerge_(rounded, *second)
        found += clones(rounded)
    return found


# Columns past one tile (768 to 1,024 of them), rows past a tile's four, columns that no vector divides.
SHAPES = ((5, 7), (9, 130), (6, 1030), (4, 768), (1, 2056))


@every_dtype
@pytest.mark.parametrize("rank", [1, 8, 70])
@pytest.mark.parametrize("std", [0.02, 1.0])  # at 1.0 most weights are listed, and so kept as copies
def test_merging_gives_the_references_bits(dtype, rank, std, order):
    weights = hard_weights(SHAPES, dtype)
    factors = {1: torch.float32, 8: torch.bfloat16, 70: torch.float16}[rank]
    first, second = update(weights, rank, std=std, dtype=factors), update(weights, 5, std=std, seed=9)
    want = _cycle("reference", weights, first, second)

    def there(tensors):
        return [t.to(DEVICE) for t in tensors]

    found = _cycle("cuda", there(weights), (there(first[0]), there(first[1]), first[2]),
                   (there(second[0]), there(second[1]), second[2]))  # fmt: skip
    assert all_same([t.cpu() for t in found], want)


@every_dtype
def test_a_tile_that_lists_more_than_it_has_room_for(dtype, order):
    """Four rows of tiny weights among many usual ones: their tile's list is full, the matrix is not copied."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1200, 96, generator=generator) * 0.1
    w[8:12] = 1e-9
    weights = [w.to(dtype), torch.ones(4, 8, dtype=dtype)]
    a, b, scales = update(weights, 4, std=0.02)
    results = {}
    for backend, device in (("reference", "cpu"), ("cuda", DEVICE)):
        mine, kept = [x.clone().to(device) for x in weights], []
        given = ([x.to(device) for x in a], [x.to(device) for x in b], scales)
        with fa.backend(backend):
            merge_(mine, *given, kept)
            merged = clones(mine)
            unmerge_(mine, *given, kept)
        results[backend] = [t.cpu() for t in [*merged, *parts(kept), *mine]]
    listed = results["cuda"][2 + 1].numel()
    assert 4 * 96 // 2 < listed < 1200 * 96 / COPY_ABOVE
    assert all_same(results["cuda"], results["reference"])


@every_dtype
@pytest.mark.parametrize("step", ["merge", "merge rounded", "swap", "unmerge"])
@pytest.mark.parametrize("what", ["a", "b", "weight", "overflow"])
def test_what_is_refused_changes_nothing(dtype, step, what, order):
    weights = [w.to(DEVICE) for w in hard_weights(SHAPES, dtype)]
    before = clones(weights)
    a, b, scales = update(weights, 3)
    new_a, new_b, new_scales = update(weights, 4, seed=5)
    kept: list[Residue] = []
    with fa.backend("cuda"):
        if step in ("swap", "unmerge"):
            merge_(weights, a, b, scales, kept)
            before = clones(weights)
        bad_a, bad_b = (a, b) if step == "unmerge" else (new_a, new_b)
        if what == "a":
            bad_a[2][1, 700] = torch.inf
        elif what == "b":
            bad_b[2][5, 0] = torch.nan
        elif what == "weight":
            if step == "unmerge":
                pytest.skip("a weight that is not finite was never merged")
            weights[2].view(-1)[1000] = before[2].view(-1)[1000] = torch.nan
        else:
            if step == "unmerge":
                pytest.skip("no way out overflows")
            new_scales[2], bad_b[2][0, 0] = 1e38, 1e4
        with pytest.raises(ValueError, match="nothing was changed"):
            if step == "swap":
                swap_(weights, a, b, scales, kept, new_a, new_b, new_scales, [])
            elif step == "unmerge":
                unmerge_(weights, a, b, scales, kept)
            else:
                merge_(weights, new_a, new_b, new_scales, [] if step == "merge" else None)
    assert all_same(weights, before)


# -- dispatch ----------------------------------------------------------------------------------------------------


def test_forcing_raises_for_what_has_no_kernel():
    x = torch.ones(2, 8, device=DEVICE, requires_grad=True)
    w = torch.ones(4, 8, device=DEVICE)
    with fa.backend("cuda"), pytest.raises(RuntimeError, match="no CUDA C\\+\\+ kernel for linear_forward"):
        fa.ops.linear(x, w)
    y = torch.ones(2, 8, dtype=torch.float64, device=DEVICE)
    with fa.backend("cuda"), pytest.raises(RuntimeError, match="no CUDA C\\+\\+ kernels in float64"):
        fa.ops.add_norm(y, None, y[0], y[0])


def test_no_kernel_is_picked_on_a_gpu_that_its_tests_never_ran_on(monkeypatch):
    module = dispatch.load("cuda")
    device = type("Device", (), {"major": 9, "minor": 0})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: device)
    monkeypatch.setattr(module, "_PROVEN", {"sm_80": ["add_norm_forward"]})
    assert "has not proven it on sm_90" in module.reluctance("add_norm_forward", "cuda", {"rows": 4})
    device.major = 8
    assert module.reluctance("add_norm_forward", "cuda", {"rows": 4}) is None
    assert "few enough" in module.reluctance("add_norm_forward", "cuda", {"rows": 513})
    assert "has not proven" in module.reluctance("remerge_", "cuda", {})


def test_the_picker_passes_over_a_reluctant_backend_and_forcing_does_not(monkeypatch):
    module = dispatch.load("cuda")
    monkeypatch.setitem(dispatch.PREFERENCE, DEVICE, ("cuda", "reference"))
    monkeypatch.setattr(module, "reluctance", lambda op, device_type, facts: "not proven")
    facts = {"hidden": 8, "rows": 2}
    assert dispatch.choice("add_norm_forward", DEVICE, torch.float32, **facts) == ("reference", {"cuda": "not proven"})
    with fa.backend("cuda"):
        assert dispatch.serving("add_norm_forward", DEVICE, torch.float32, **facts) == "cuda"
    monkeypatch.setattr(module, "reluctance", lambda op, device_type, facts: None)
    assert dispatch.serving("add_norm_forward", DEVICE, torch.float32, **facts) == "cuda"


def test_what_is_called_proven_ran_as_it_stands():
    """Dispatch goes by the table, so an entry has to be of the kernels as they are now."""
    for architecture, entry in proven.table()["cuda"].items():
        assert entry["sources"] == proven.sources("cuda"), f"{architecture}: run the GPU suite again"


def test_a_record_is_read_back(tmp_path):
    path = tmp_path / "proven.json"
    path.write_text('{"cuda": {}, "triton": {}}')
    entry = {"device": "X", "date": "2026-01-01", "commit": "c", "sources": "s", "ops": ["remerge_"]}
    proven.record("cuda", "sm_90", entry, path)
    assert json.loads(path.read_text()) == {"cuda": {"sm_90": entry}, "triton": {}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="meta tensors stand for the GPU's")
def test_a_compiled_graph_holds_the_kernels_as_nodes():
    def call(x, w):
        return torch.ops.fastadapt_cuda.add_norm_forward(x, None, w, w, 1e-12, 0.0, None, False)[0]

    x = torch.randn(3, 16)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x[0]), call(x, x[0]))
