"""merge_, unmerge_ and swap_: to the bit in every backend, and all or nothing."""

from __future__ import annotations

import copy
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastadapt as fa
from fastadapt import dispatch
from fastadapt.ops import Residue, merge_, swap_, unmerge_
from fastadapt.ops.merge import DTYPES, _fma
from tests import ops_cases as cases

ROOT = Path(__file__).parents[1]
RUNNERS = [*cases.runners(), *cases.cuda_runners()]
every_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = ((1, 1), (5, 7), (33, 65), (7, 130))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(t):
    return t.detach().contiguous().view(torch.uint8)


def same(x, y):
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def all_same(xs, ys):
    return len(xs) == len(ys) and all(map(same, xs, ys))


def hard_weights(shapes, dtype, device="cpu", seed=0):
    """Ordinary weights with zeros of both signs, denormals, tiny and huge values among them."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 8, info.tiny, info.max / 8,
                            -info.max / 8, 1e3, 1e-6, -1e-6])  # fmt: skip
    weights = []
    for out, width in shapes:
        w = torch.randn(out, width, generator=generator) * 0.04
        chosen = torch.rand(w.shape, generator=generator) < 0.01
        w = torch.where(chosen, special[torch.randint(len(special), w.shape, generator=generator)], w)
        weights.append(w.to(dtype).to(device))
    return weights


def update(weights, rank, std=0.02, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    device = weights[0].device
    a = [(torch.randn(rank, w.shape[1], generator=generator) * std).to(dtype).to(device) for w in weights]
    b = [(torch.randn(w.shape[0], rank, generator=generator) * std).to(dtype).to(device) for w in weights]
    return a, b, [0.7 + 0.1 * i for i in range(len(weights))]


def clones(tensors):
    return [t.detach().clone() for t in tensors]


def parts(residues):
    return [t for residue in residues for t in (residue.codes, residue.index, residue.bits)]


# -- the bits ----------------------------------------------------------------------------------------------------


def test_the_references_fma_rounds_once():
    """Against exact rational arithmetic, where rounding twice would show."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(3)
    t, x = (torch.randn(4000, generator=generator) for _ in range(2))
    d = torch.randn(4000, generator=generator)
    # Sums that lie just beside the middle of two floats: 1 + 2^-24 ± something tiny.
    t[:4], x[:4] = torch.tensor([2.0**-12, -(2.0**-12), 2.0**-40, 2.0**-80]), torch.tensor([2.0**-12] * 4)
    d[:4] = torch.tensor([1.0, 1.0, 2.0**-28, -(2.0**-28)])
    t[4], x[4], d[4] = 1.0 + 2.0**-23, 2.0**-24 * (1.0 - 2.0**-23), 1.0 + 2.0**-23
    found = _fma(t.double(), x.double(), d.double()).float()
    for i in range(len(t)):
        exact = Fraction(t[i].item()) * Fraction(x[i].item()) + Fraction(d[i].item())
        down = torch.nextafter(found[i], torch.tensor(-torch.inf)).item()
        up = torch.nextafter(found[i], torch.tensor(torch.inf)).item()
        error = abs(exact - Fraction(found[i].item()))
        assert error <= abs(exact - Fraction(down)) and error <= abs(exact - Fraction(up))
    twice = (t.double() * x.double() + d.double()).float()
    assert found[4] != twice[4]


@every_dtype
def test_the_reference_adds_what_it_should(dtype):
    weights = [w.clamp(-1, 1) for w in hard_weights(SHAPES, dtype)]
    a, b, scales = update(weights, 8, std=0.3)
    merged = clones(weights)
    with fa.backend("reference"):
        merge_(merged, a, b, scales)
    for w, m, x, y, s in zip(weights, merged, a, b, scales, strict=True):
        exact = w.double() + s * (y.double() @ x.double())
        bound = exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6 * (y.abs().double() @ x.abs().double())
        assert ((m.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


@every_runner
@every_dtype
@pytest.mark.parametrize("rank", [1, 3, 8, 12, 48, 64, 256])
def test_round_trip_to_the_bit_and_equal_to_the_reference(runner, dtype, rank):
    if runner.backend == "triton" and runner.device == "cpu" and rank > 12:
        pytest.skip("the interpreter takes a second a rank")
    shapes = SHAPES if rank < 256 else SHAPES[:3]
    before = hard_weights(shapes, dtype, runner.device)
    # 0.002: BA far below W; 3: BA far above it
    for std, factor_dtype in ((0.002, torch.float32), (0.1, torch.bfloat16), (3.0, torch.float16)):
        first = update(before, rank, std, seed=1, dtype=factor_dtype)
        second = update(before, min(rank + 1, 256), std, seed=2)
        found = []
        for one in (runner, RUNNERS[0]):
            with one.running():
                weights, residues, swapped = clones(before), [], []
                merge_(weights, *first, residues)
                merged = clones(weights)
                swap_(weights, *first, residues, *second, swapped)
                after_swap = clones(weights)
                unmerge_(weights, *second, swapped)
                assert all_same(weights, before)
                merge_(weights, *second)
                assert all_same(weights, after_swap)
                unmerge_(weights, *second)
                found.append([*merged, *after_swap, *weights, *parts(residues), *parts(swapped)])
        assert all_same(*found)


@every_runner
@every_dtype
def test_swap_is_unmerge_then_merge_whatever_is_exact(runner, dtype):
    before = hard_weights(SHAPES[:3], dtype, runner.device)
    first, second = update(before, 1, 0.1, seed=1), update(before, 2, 0.1, seed=2)
    with runner.running():
        for old_exact, new_exact in itertools.product((True, False), repeat=2):
            old = [] if old_exact else None
            kept, expected_kept = ([], []) if new_exact else (None, None)
            weights = clones(before)
            merge_(weights, *first, old)
            expected = clones(weights)
            swap_(weights, *first, old, *second, kept)
            unmerge_(expected, *first, old)
            merge_(expected, *second, expected_kept)
            assert all_same(weights, expected)
            if new_exact:
                assert all_same(parts(kept), parts(expected_kept))


@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "cpu"], ids=str)
@every_dtype
def test_large_matrices_and_thread_counts(runner, dtype):
    """Chunks of several rows and several panels, split over threads, taken out by another backend than put in."""
    before = hard_weights(((130, 768), (33, 3072), (5, 7)), dtype)
    first = update(before, 8, 0.1)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with runner.running():
            weights, residues = clones(before), []
            merge_(weights, *first, residues)
        found.append([*clones(weights), *parts(residues)])
        with fa.backend("reference" if count == 1 else "cpu"):
            unmerge_(weights, *first, residues)
        assert all_same(weights, before)
    assert all_same(*found)


def test_a_thread_that_flushes_denormals_changes_nothing():
    if isinstance(dispatch.load("cpu"), str) or not torch.set_flush_denormal(True):
        pytest.skip("no kernel, or denormals can't be flushed here")
    try:
        before = [torch.full((8, 64), 1e-41), torch.full((8, 64), 1e-39)]
        first = update(before, 2, 1e-20)
        weights, residues = clones(before), []
        with fa.backend("cpu"):
            merge_(weights, *first, residues)
            merged = clones(weights)
            torch.set_flush_denormal(False)
            unmerge_(weights, *first, residues)
        assert all_same(weights, before)
        with fa.backend("reference"):
            merge_(weights, *first)
        assert all_same(weights, merged)
    finally:
        torch.set_flush_denormal(False)


@every_dtype
def test_a_thousand_cycles(dtype):
    before = hard_weights(((5, 7), (16, 48)), dtype)
    weights, updates = clones(before), [update(before, r, std, seed=r) for r, std in ((1, 0.5), (8, 0.02), (3, 3.0))]
    for cycle in range(1000):
        one, other = updates[cycle % 3], updates[(cycle + 1) % 3]
        residues, swapped = [], []
        merge_(weights, *one, residues)
        swap_(weights, *one, residues, *other, swapped)
        unmerge_(weights, *other, swapped)
    assert all_same(weights, before)


@every_dtype
def test_residues_of_real_sizes_take_little_over_a_byte(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(768, 768, generator=generator).mul_(0.04).to(dtype)]
    for std in (0.005, 0.05, 0.12):  # BA a hundredth of W to as large as W
        residues = []
        first = update(weights, 8, std)
        merge_(weights, *first, residues)
        assert residues[0].codes.dtype == torch.int8
        assert residues[0].nbytes <= 1.05 * weights[0].numel()
        unmerge_(weights, *first, residues)


@every_runner
@every_dtype
def test_a_crowded_matrix_is_kept_as_a_copy(runner, dtype):
    before = [torch.full((40, 70), -0.0, dtype=dtype), *hard_weights(((5, 7),), dtype)]
    before = [w.to(runner.device) for w in before]
    first, second = update(before, 2, 0.1, seed=1), update(before, 2, 0.1, seed=2)
    with runner.running():
        weights, residues, swapped = clones(before), [], []
        merge_(weights, *first, residues)
        assert residues[0].codes.dtype == dtype and same(residues[0].codes, before[0])
        assert residues[0].codes.data_ptr() != weights[0].data_ptr()
        swap_(weights, *first, residues, *second, swapped)
        unmerge_(weights, *second, swapped)
    assert all_same(weights, before)


def test_stacked_ranks_are_several_loras_at_once():
    before = [torch.randn(33, 65, generator=torch.Generator().manual_seed(0)) * 0.04]
    (a1, b1, s1), (a2, b2, s2) = update(before, 3, seed=1), update(before, 5, seed=2)
    weights = clones(before)
    merge_(weights, [torch.cat([a1[0], a2[0]])], [torch.cat([b1[0] * s1[0], b2[0] * s2[0]], 1)], [1.0])
    expected = before[0].double() + s1[0] * b1[0].double() @ a1[0].double() + s2[0] * b2[0].double() @ a2[0].double()
    assert torch.allclose(weights[0].double(), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_narrowing_keeps_what_is_not_finite(name):
    """A GPU's own NaN has all bits set, which rounding by an addition would carry over into a zero's."""
    pytest.importorskip("triton")
    from tests.triton_probes import narrow_kernel

    patterns = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -0x800000, 0x3F800000, 0x7F7FFFFF]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.tensor(patterns, dtype=torch.int32, device=device)
    out = torch.empty_like(x)
    narrow_kernel[(1,)](x, out, NAME=name, COUNT=len(patterns))
    dtype = getattr(torch, name)
    found = out if dtype == torch.float32 else out.to(torch.int16)
    want = x.view(torch.float32).to(dtype)
    torch.testing.assert_close(found.view(dtype), want, rtol=0, atol=0, equal_nan=True)


_COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastadapt.backends.triton.merge import check_kernel, in_kernel, out_kernel

pointers = {"old": "*i64", "table": "*i64", "matrix_of": "*i32", "counts": "*i64", "broken": "*i64", "places": "*i64",
            "keys": "*i64", "listed": "*i32"}
for kernel, name in ((out_kernel, "bfloat16"), (check_kernel, "float16"), (in_kernel, "float32")):
    constants = {"NAME": name, "ROWS": 16, "COLS": 128, "ALIGNED": True, "OUT": True, "IN": True}
    names = [p.name for p in kernel.params]
    signature = {n: pointers.get(n, "constexpr") for n in names}
    constants = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    ptx = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(kernel.__name__, ptx.count("fma.rn.f32"), ptx.count(".ftz"), ptx.count("mul.rn.f32") + ptx.count("mul.f32"))
"""


def test_compiled_for_a_gpu_the_sum_is_fma_and_keeps_denormals():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _COMPILE], env=environment, cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["out_kernel", "check_kernel", "in_kernel"]
    for _, fused, flushing, products in lines:
        assert int(fused) > 0 and int(flushing) == 0 and int(products) == 0


# -- all or nothing ----------------------------------------------------------------------------------------------


def _break_a(w, a, b, scales):
    a[1][0, 3] = torch.nan


def _break_b(w, a, b, scales):
    b[1][2, 0] = torch.inf


def _break_scale(w, a, b, scales):
    scales[1] = float("nan")


def _break_w(w, a, b, scales):
    w[1][2, 2] = torch.nan


def _overflow(w, a, b, scales):
    w[1][2, 2] = torch.finfo(w[1].dtype).max
    a[1][:, 2], b[1][2] = 200.0, 200.0
    scales[1] = 1e33 if w[1].dtype != torch.float16 else 1.0


BREAKS = {"a": _break_a, "b": _break_b, "scales": _break_scale, "weights": _break_w, "overflow": _overflow}


@every_runner
@every_dtype
@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_what_is_not_finite_is_refused_and_nothing_changes(runner, dtype, what, exact):
    # The first matrix is done by the time the second is refused.
    weights = hard_weights(((70, 130), (5, 7), (33, 65)), dtype, runner.device)
    first = update(weights, 2, 0.1, seed=1)
    a, b, scales = update(weights, 3, 0.1, seed=2)
    if runner.backend == "cpu":
        torch.set_num_threads(2)
    with runner.running():
        broken = clones(weights)
        BREAKS[what](broken, a, b, scales)
        before, residues = clones(broken), [] if exact else None
        at = "weights[1]: the result would overflow" if what == "overflow" else f"{what}[1]"
        with pytest.raises(ValueError, match=at.replace("[", "\\[").replace("]", "\\]")):
            merge_(broken, a, b, scales, residues)
        assert all_same(broken, before) and not residues
        if what in ("a", "b", "scales"):
            with pytest.raises(ValueError, match=f"{what}.1."):
                unmerge_(broken, a, b, scales)
            assert all_same(broken, before)
        if what == "weights":
            return
        # A swap to the broken one leaves the old one merged, and its residues good.
        bare = [w.clone() for w in before]
        old = [] if exact else None
        merge_(broken, *first, old)
        merged, kept = clones(broken), clones(parts(old or []))
        swapped = [] if exact else None
        with pytest.raises(ValueError):
            swap_(broken, *first, old, a, b, scales, swapped)
        assert all_same(broken, merged) and not swapped and all_same(parts(old or []), kept)
        if exact:
            unmerge_(broken, *first, old)
            assert all_same(broken, bare)


def _views():
    base = torch.zeros(4, 12)
    return [base[:, :6].contiguous(), base[:, 6:]]


REFUSED = {
    "lengths": (lambda w, a, b, s: (w, a[:1], b, s), ValueError, "a: got 1 for 2 weights"),
    "rank": (lambda w, a, b, s: (w, a, [torch.zeros(4, 3), b[1]], s), ValueError, r"a\[0\]: got shape"),
    "no rank": (lambda w, a, b, s: (w, a, [torch.zeros(4, 0), b[1]], s), ValueError, r"b\[0\]: got shape"),
    "width": (lambda w, a, b, s: (w, [a[0], torch.zeros(2, 9)], b, s), ValueError, r"a\[1\]: got shape"),
    "rows": (lambda w, a, b, s: (w, a, [b[0], torch.zeros(9, 2)], s), ValueError, r"b\[1\]: got shape"),
    "integers": (lambda w, a, b, s: (w, [a[0].int(), a[1]], b, s), TypeError, r"a\[0\]: got dtype"),
    "double": (lambda w, a, b, s: ([w[0].double(), w[1]], a, b, s), TypeError, r"weights\[0\]: got dtype"),
    "mixed": (lambda w, a, b, s: ([w[0], w[1].half()], a, b, s), TypeError, r"weights\[1\]: is torch.float16"),
    "meta": (lambda w, a, b, s: ([w[0], w[1].to("meta")], a, b, s), ValueError, r"weights\[1\]: got a meta"),
    "meta a": (lambda w, a, b, s: (w, [a[0].to("meta"), a[1]], b, s), ValueError, r"a\[0\]: got a meta"),
    "strided": (lambda w, a, b, s: (_views(), a, b, s), ValueError, r"weights\[1\]: got strides"),
    "transposed": (lambda w, a, b, s: ([torch.zeros(6, 4).t(), w[1]], a, b, s), ValueError, r"weights\[0\]: got str"),
    "twice": (lambda w, a, b, s: ([w[0], w[0]], a, b, s), ValueError, r"weights\[1\]: shares memory"),
    "overlap": (lambda w, a, b, s: ((lambda x: [x[:4], x[2:6]])(torch.zeros(6, 6)), a, b, s), ValueError, "shares"),
    "inside": (lambda w, a, b, s: (w, [w[1][:2], a[1]], b, s), ValueError, r"a\[0\]: shares memory with weights\[1\]"),
    "vector": (lambda w, a, b, s: ([w[0][0], w[1]], a, b, s), ValueError, r"weights\[0\]: got shape"),
    "sparse": (lambda w, a, b, s: ([w[0].to_sparse(), w[1]], a, b, s), ValueError, r"weights\[0\]: got a"),
    "no number": (lambda w, a, b, s: (w, a, b, [1.0, "2"]), TypeError, r"scales\[1\]: got str"),
    "no tensor": (lambda w, a, b, s: ([w[0], 3], a, b, s), TypeError, r"weights\[1\]: got int"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("verb", ["merge", "unmerge", "swap"])
def test_bad_input_is_refused_and_nothing_changes(what, verb):
    change, error, message = REFUSED[what]
    good = [torch.randn(4, 6), torch.randn(4, 6)]
    a, b, scales = update(good, 2)
    weights, *broken = change(good, a, b, scales)
    before = [w.clone() for w in weights if isinstance(w, torch.Tensor) and not w.is_meta]
    residues = []
    with pytest.raises(error, match=message):
        if verb == "merge":
            merge_(weights, *broken, residues)
        elif verb == "unmerge":
            unmerge_(weights, *broken)
        else:
            swap_(weights, a, b, scales, None, *broken, residues)
    assert not residues
    for w, was in zip((w for w in weights if isinstance(w, torch.Tensor) and not w.is_meta), before, strict=True):
        assert torch.equal(w.to_dense(), was.to_dense())


@pytest.mark.skipif(isinstance(dispatch.load("cpu"), str), reason="no C++ kernels here")
@pytest.mark.parametrize("index", [[5, 7, -3], [-3, 5, 7], [5, 5, 7], [5, 7, 64 * 32]])
def test_a_residue_with_places_that_are_not_there_is_refused(index):
    """A file may hold one: nothing is written past the weight, nor into it."""
    weights = [torch.randn(64, 32)]
    first, residues = update(weights, 2), []
    merge_(weights, *first, residues)
    before = clones(weights)
    bad = Residue(residues[0].codes, torch.tensor(index).int(), torch.zeros(3).int())
    with fa.backend("cpu"), pytest.raises(ValueError, match=r"residues\[0\].*nothing was changed"):
        unmerge_(weights, *first, [bad])
    assert all_same(weights, before)


def test_residues_that_do_not_belong_are_refused():
    weights = hard_weights(((4, 6), (5, 7)), torch.float32)
    first, residues = update(weights, 2), []
    merge_(weights, *first, residues)
    merged = clones(weights)
    with pytest.raises(ValueError, match="residues: got a list of 2"):
        merge_(weights, *first, residues)
    with pytest.raises(TypeError, match="residues: got tuple"):
        merge_(weights, *first, ())
    with pytest.raises(ValueError, match="residues: got 1 for 2"):
        unmerge_(weights, *first, residues[:1])
    with pytest.raises(ValueError, match=r"residues\[0\]: was made for shape"):
        unmerge_(weights, *first, residues[::-1])
    with pytest.raises(TypeError, match=r"residues\[1\]: got Tensor"):
        unmerge_(weights, *first, [residues[0], residues[1].codes])
    with pytest.raises(ValueError, match=r"old_residues: got 1 for 2"):
        swap_(weights, *first, residues[:1], *first, [])
    halves = [w.half() for w in weights]
    with pytest.raises(TypeError, match=r"residues\[0\]: was made for another dtype"):
        unmerge_(halves, *first, residues)
    assert all_same(weights, merged)


PLACES = {
    "negative": (lambda index: [-1, *index[1:]], r"index\[0\] is -1; "),
    "past the end": (lambda index: [*index[:-1], 910], r"index\[\d+\] is 910 after \d+; "),
    "not ascending": (lambda index: index[::-1], r"index\[1\] is \d+ after \d+; "),
    "twice": (lambda index: index[:1] * len(index), r"index\[1\] is \d+ after \d+; "),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend != "cpu"], ids=str)
def test_a_residue_that_lists_no_weights_of_its_matrix_is_refused(runner, what):
    weights = hard_weights(((5, 7), (7, 130)), torch.float32, runner.device)
    weights[1].view(-1)[::100] = 1e-30  # tiny beside the update: such weights are listed
    first, residues = update(weights, 2), []
    with runner.running():
        merge_(weights, *first, residues)
        merged, good = clones(weights), residues[1]
        assert good.index.numel() > 1
        change, message = PLACES[what]
        broken = [residues[0], Residue(good.codes, good.index.new_tensor(change(good.index.tolist())), good.bits)]
        with pytest.raises(ValueError, match=rf"^residues\[1\]: {message}.*0 to 909.*nothing was changed"):
            unmerge_(weights, *first, broken)
        with pytest.raises(ValueError, match=rf"^old_residues\[1\]: {message}"):
            swap_(weights, *first, broken, *first, [])
        assert all_same(weights, merged)
        unmerge_(weights, *first, residues)


# -- as PyTorch expects it ---------------------------------------------------------------------------------------


@every_runner
def test_parameters_stay_and_their_versions_move(runner):
    before = hard_weights(SHAPES, torch.float32, runner.device)
    weights = [torch.nn.Parameter(w.clone()) for w in before]
    at = [w.data_ptr() for w in weights]
    first, residues = update(before, 3), []
    first[0][0].requires_grad_()
    with runner.running():
        versions = [w._version for w in weights]
        merge_(weights, *first, residues)
        assert all(w._version > v for w, v in zip(weights, versions, strict=True))
        versions = [w._version for w in weights]
        with torch.inference_mode():
            unmerge_(weights, *first, residues)
        assert all(w._version > v for w, v in zip(weights, versions, strict=True))
    assert all_same(weights, before) and at == [w.data_ptr() for w in weights]
    assert all(w.requires_grad and w.is_leaf and w.grad_fn is None for w in weights)


def test_a_packed_copy_is_made_anew():
    w = torch.nn.Parameter(torch.randn(32, 32))
    x = torch.randn(5, 32)
    first, residues = update([w], 4, 0.3), []
    with torch.no_grad():
        y = fa.ops.linear(x, [w], [None])
        merge_([w], *first, residues)
        assert torch.allclose(fa.ops.linear(x, [w], [None]), x @ w.t(), atol=1e-4)
        unmerge_([w], *first, residues)
        assert torch.equal(fa.ops.linear(x, [w], [None]), y)


def test_inference_tensors():
    with torch.inference_mode():
        weights = hard_weights(SHAPES, torch.bfloat16)
        before = clones(weights)
        first, residues = update(weights, 3), []
        merge_(weights, *first, residues)
        unmerge_(weights, *first, residues)
        assert all_same(weights, before)


def test_under_compile():
    weights = hard_weights(SHAPES, torch.float32)
    before, first = clones(weights), update(weights, 3)
    expected = clones(weights)
    merge_(expected, *first)

    @torch.compile(backend="eager")
    def merged_sum(ws):
        merge_(ws, *first)
        return ws[2].sum()

    total = merged_sum(weights)
    assert all_same(weights, expected) and total == expected[2].sum()
    assert not all_same(weights, before)


def test_the_schema_declares_the_mutation():
    schema = torch.ops.fastadapt.remerge_.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == ["weights"]


def test_residues_are_copied_saved_and_moved():
    before = hard_weights(((40, 70),), torch.bfloat16)
    weights, first, residues = clones(before), update(before, 3, 0.1), []
    merge_(weights, *first, residues)
    file = io.BytesIO()
    torch.save(copy.deepcopy(residues), file)
    file.seek(0)
    loaded = [r.to("cpu") for r in torch.load(file, weights_only=True)]
    assert isinstance(loaded[0], Residue) and all_same(parts(loaded), parts(residues))
    unmerge_(weights, *first, loaded)
    assert all_same(weights, before)


def test_nothing_and_empty_matrices():
    merge_([], [], [], [], [])
    weights, residues = [torch.zeros(0, 4), torch.zeros(3, 0), torch.ones(2, 2)], []
    first = update(weights, 2)
    merge_(weights, *first, residues)
    assert [tuple(r.codes.shape) for r in residues] == [(0, 4), (3, 0), (2, 2)]
    unmerge_(weights, *first, residues)
    assert torch.equal(weights[2], torch.ones(2, 2))


def test_factors_of_any_strides():
    before = hard_weights(((33, 65),), torch.float32)
    a, b, scales = update(before, 4, 0.1)
    weights, expected, residues = clones(before), clones(before), []
    merge_(expected, a, b, scales)
    merge_(weights, [a[0].t().contiguous().t()], [b[0].t().contiguous().t()], scales, residues)
    assert all_same(weights, expected)
    unmerge_(weights, a, b, scales, residues)
    assert all_same(weights, before)
