"""What the C++ kernels are given is checked by themselves, and inference on a CPU leaves it to them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastadapt as fa
from fastadapt import dispatch
from fastadapt.ops import checks

cpu = pytest.importorskip("fastadapt.backends.cpu", exc_type=ImportError)
ROWS, H, B, N, R = 6, 32, 8, 48, 3  # N columns of a linear, R a LoRA's rank


def _kernels() -> dict[str, list]:
    """Valid arguments of every op of the library."""
    torch.manual_seed(0)
    x, dy, wide, s = torch.randn(ROWS, H), torch.randn(ROWS, H), torch.randn(ROWS, N), torch.randn(ROWS, R)
    w, bias, a, b = torch.randn(N, H), torch.randn(N), torch.randn(R, H), torch.randn(N, R)
    down, b_down, up, b_up = torch.randn(B, H), torch.randn(B), torch.randn(H, B), torch.randn(H)
    norm, z, rows = torch.ones(H), torch.randn(ROWS, B), torch.zeros(ROWS, dtype=torch.int64)
    sigma, t = torch.randn(ROWS, 2 * B), torch.randn(ROWS, 2 * B + 2)
    qkv, prefix, mask = torch.randn(2, 3, 3 * H), torch.randn(2, 2, H), torch.zeros(2, 4, 3, 3)
    seed = torch.tensor(7)
    low = ([a], [b], [0.5], [0], [0])
    codes, index, bits = torch.zeros(N, H, dtype=torch.int8), torch.tensor([3]).int(), torch.tensor([0]).int()
    adapter = (down, up, "gelu", 1.0, norm, True)  # with its vector of scales
    return {
        "linear_forward": [x, [w], [bias], "gelu", 0.1, seed, False],
        "linear_backward": [wide, wide, [w], "gelu", 0.1, seed, True, True],
        "lora_forward": [x, [w], [bias], *low, rows, [0.1], seed.view(1), "gelu", 0.0, None, True],
        "lora_backward": [
            wide, x, wide, s, [w], 1, *low, rows, [0.1], seed.view(1), "gelu", 0.0, None, True, True, True,
        ],
        "bottleneck_forward": [
            x, down, b_down, up, b_up, "gelu", 1.0, norm, True, dy, norm, norm, 1e-12, 0.1, seed, True,
        ],
        "bottleneck_backward": [dy, x, z, dy, *adapter, norm, 1e-12, 0.1, seed, True, True, True, True],
        "bottleneck_rows_forward": [
            x, dy, rows, [down], [b_down], [up], [b_up], [norm], [norm], [norm], ["gelu"], [1.0], [True], [False],
            1e-12, [0.1], seed, True,
        ],
        "bottleneck_rows_backward": [
            dy, x, dy, z, dy, rows, [down], [up], [norm], [norm], ["gelu"], [1.0], [True], [False], 1e-12, [0.1], seed,
            True, True, [True], [True],
        ],
        "add_norm_forward": [x, dy, norm, norm, 1e-12, 0.1, seed, True],
        "add_norm_backward": [dy, dy, x, norm, 1e-12, 0.1, seed, True, True, True],
        "drop": [x, 0.1, seed],
        "mix_forward": [sigma, t, torch.randn(ROWS), 2, 0.1, seed],
        "mix_backward": [t, sigma, t, torch.randn(ROWS), 2, 0.1, seed],
        "attention_forward": [qkv, prefix, mask, 4, 0.3, 0.1, seed, True],
        "attention_backward": [
            torch.randn(2, 3, H), qkv, prefix, mask, torch.randn(2, 4, 3), 4, 0.3, 0.1, seed,
        ],
        "remerge_": [[w], [a], [b], [0.5], [codes], [index], [bits], [a.clone()], [b.clone()], [0.25], True],
    }  # fmt: skip


def _tensors(arguments: list) -> list[tuple[int, Tensor]]:
    """(place, the tensor there, or the first of the list there)."""
    firsts = [(i, v[0] if isinstance(v, list) and v else v) for i, v in enumerate(arguments)]
    return [(i, t) for i, t in firsts if isinstance(t, Tensor)]


def _with(arguments: list, place: int, value: Tensor) -> list:
    old = arguments[place]
    return [*arguments[:place], [value, *old[1:]] if isinstance(old, list) else value, *arguments[place + 1 :]]


@pytest.mark.parametrize("op", _kernels())
def test_no_kernel_reads_past_a_tensor_that_is_too_small(op):
    arguments, kernel = _kernels()[op], getattr(cpu, op)
    kernel(*arguments)
    for place, given in _tensors(arguments):
        if (op, place) in (("drop", 0), ("linear_backward", 2)):
            continue  # any matrix will do; x may have had any number of columns
        small = given.flatten()[:0] if given.numel() == 1 else given[..., :-1].contiguous()
        with pytest.raises((ValueError, TypeError), match="accepted"):
            kernel(*_with(arguments, place, small))


@pytest.mark.parametrize("op", _kernels())
def test_no_kernel_reads_another_dtype(op):
    arguments, kernel = _kernels()[op], getattr(cpu, op)
    for place, given in _tensors(arguments):
        other = given.double() if place == 0 or given.dtype == torch.int32 else given.to(torch.int32)
        with pytest.raises((ValueError, TypeError), match="accepted"):
            kernel(*_with(arguments, place, other))


def test_slots_and_weights_that_are_not_there_are_refused():
    for place, values in ((6, [1]), (7, [1]), (8, torch.tensor([0, 1])), (8, torch.tensor([-1, 0]))):
        arguments = _kernels()["lora_forward"]
        arguments[place] = values
        with pytest.raises(ValueError, match="accepted are"):
            cpu.lora_forward(*arguments)
    arguments = _kernels()["bottleneck_rows_forward"]
    arguments[1] = None
    arguments[13] = [True]
    with pytest.raises(ValueError, match="residual: got None"):
        cpu.bottleneck_rows_forward(*arguments)


# -- the short way -------------------------------------------------------------------------------------------------


def _calls(dtype: torch.dtype = torch.float32) -> dict[str, callable]:
    """Every public op that takes the short way, with what it can be given."""
    torch.manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    x, residual, w, b = draw(2, 3, H), draw(2, 3, H), draw(N, H), draw(N)
    down, b_down, up, b_up, norm = draw(B, H), draw(B), draw(H, B), draw(H), draw(H)
    lora = fa.ops.LowRank(draw(R, H), draw(N, R), 0.5)
    other = fa.ops.LowRank(draw(R, H), draw(N, R), 0.25, slot=1)
    rows = torch.tensor([1, 0])
    slots = [fa.ops.Slot(norm, b_up, down, b_down, up, b_up, scale=draw(H)), fa.ops.Slot(norm, b_up)]
    mask = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    adapter = {"residual": residual, "norm_weight": norm, "norm_bias": b_up}
    return {
        "linear": lambda **o: fa.ops.linear(o.get("x", x), o.get("w", w), b, activation=o.get("activation", "gelu")),
        "packed": lambda **o: fa.ops.linear(o.get("x", x), [w, o.get("w", w)], [None, b]),
        "lora": lambda **o: fa.ops.linear(o.get("x", x), o.get("w", w), b, loras=[lora]),
        "rows": lambda **o: fa.ops.linear(
            o.get("x", x), [o.get("w", w)], [b, None], loras=[lora, other], rows=o.get("rows", rows)
        ),
        "bottleneck": lambda **o: fa.ops.bottleneck(
            o.get("x", x), o.get("w", down), b_down, up, b_up, **{**adapter, **o.get("more", {})}
        ),
        "scaled": lambda **o: fa.ops.bottleneck(
            o.get("x", x), down, None, up, None, scale=o.get("scale", norm), skip=False
        ),
        "bottleneck_rows": lambda **o: fa.ops.bottleneck_rows(
            o.get("x", x), [replace(slots[0], **o.get("slot", {})), slots[1]], o.get("rows", rows),
            residual=o.get("more", adapter)["residual"], eps=o.get("eps", 1e-12),
        ),
        "add_norm": lambda **o: fa.ops.add_norm(
            o.get("x", x), o.get("more", adapter)["residual"], o.get("w", norm), b_up, eps=o.get("eps", 1e-12)
        ),
        "attention": lambda **o: fa.ops.attention(
            o.get("x", draw(2, 3, 3 * H)), o.get("heads", 4), prefix=o.get("prefix", draw(2, 5, H)),
            mask=o.get("mask", mask), scale=o.get("scale"),
        ),
    }  # fmt: skip


def _without(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "native", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", _calls())
def test_the_short_way_gives_the_same(op, dtype, monkeypatch):
    short_calls, long_calls = _calls(dtype), _calls(dtype)
    with torch.no_grad():
        torch.manual_seed(2)
        with monkeypatch.context() as patch:
            patch.setattr(checks, "floating", lambda *_: pytest.fail("the checked way was taken"))
            short = short_calls[op]()
        _without(monkeypatch)
        torch.manual_seed(2)
        assert torch.equal(short, long_calls[op]())


BAD = {
    "linear": [{"w": torch.zeros(N, H - 1)}, {"w": torch.zeros(N, H, dtype=torch.int64)}, {"x": [1.0]},
               {"x": torch.tensor(1.0)}, {"w": torch.zeros(N, H, device="meta")}, {"activation": ["gelu"]}],
    "lora": [{"w": torch.zeros(N + 1, H)}, {"x": torch.zeros(2, 3, H + 1)}, {"w": torch.zeros(N, H, device="meta")}],
    "rows": [{"rows": torch.tensor([0, 2])}, {"rows": [1, 0]}, {"rows": torch.tensor([0, 1, 0])},
             {"rows": torch.tensor([0.0, 1.0])}, {"rows": torch.tensor([0, 1], device="meta")}],
    "bottleneck": [{"w": torch.zeros(B, H + 1)}, {"more": {"residual": torch.zeros(3, 2, H)}},
                   {"more": {"norm_bias": None}}, {"more": {"residual": [1.0]}}, {"x": torch.tensor(1.0)},
                   {"more": {"skip": 1}}, {"more": {"skip": None}}, {"more": {"scale": True}}, {"more": {"eps": True}},
                   {"w": torch.zeros(B, H, device="meta")}],
    "scaled": [{"scale": torch.zeros(H + 1)}, {"scale": torch.zeros(H, device="meta")},
               {"scale": torch.zeros(H, dtype=torch.int64)}],
    "bottleneck_rows": [{"rows": torch.tensor([0])}, {"more": {"residual": torch.zeros(6, H)}}, {"eps": True},
                        {"x": torch.tensor(1.0)}, {"slot": {"scale": True}}, {"slot": {"dropout_p": False}},
                        {"slot": {"scale": torch.zeros(H, device="meta")}}],
    "add_norm": [{"w": torch.zeros(H + 1)}, {"eps": -1.0}, {"eps": float("nan")}, {"eps": True},
                 {"more": {"residual": torch.zeros(3, 2, H)}}, {"x": torch.tensor(1.0)},
                 {"w": torch.zeros(H, device="meta")}],
    "attention": [{"x": torch.zeros(2, 3, 90)}, {"x": torch.zeros(6, 96)}, {"x": torch.tensor(1.0)},
                  {"heads": 0}, {"heads": -4}, {"heads": 4.0}, {"heads": True}, {"scale": "a"}, {"scale": True},
                  {"mask": torch.zeros(2, 1, 1, 3, device="meta")}, {"mask": [0.0]}, {"mask": torch.zeros(2, 1, 1, 4)},
                  {"prefix": torch.zeros(2, 5, H, device="meta")}],
}  # fmt: skip


@pytest.mark.parametrize(("op", "bad"), [(op, bad) for op, cases in BAD.items() for bad in cases], ids=str)
def test_what_is_wrong_is_named_alike_on_both_ways(op, bad, monkeypatch):
    said = []
    for short in (True, False):
        with monkeypatch.context() as patch, torch.no_grad():
            if not short:
                _without(patch)
            with pytest.raises((ValueError, TypeError)) as caught:
                _calls()[op](**bad)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]
    assert "accepted" in said[0][1] or "move one" in said[0][1]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_dropout_of_no_dimensions_is_named(p):
    with pytest.raises(ValueError, match="x: got a 0-d tensor"):
        fa.ops.drop(torch.tensor(1.0), p)


@pytest.mark.parametrize("op", [op for op in _kernels() if op != "remerge_"])  # whose shapes nobody tells without data
def test_no_kernel_takes_a_tensor_without_data_beside_others(op):
    """Such a call comes to what says which shapes an op gives: it would give back memory that nobody wrote."""
    arguments, kernel = _kernels()[op], getattr(cpu, op)
    for place, given in _tensors(arguments)[1:]:
        with pytest.raises(ValueError, match="meta beside one on cpu"):
            kernel(*_with(arguments, place, given.to("meta")))


def test_the_short_way_is_for_plain_inference_on_a_cpu():
    x = torch.randn(2, H)
    cases = [
        (torch.no_grad(), x, True),
        (torch.inference_mode(), x, True),
        (nullcontext(), x, False),
        (torch.no_grad(), x.t(), False),
        (torch.no_grad(), x.to("meta"), False),
        (torch.no_grad(), None, False),
    ]
    for context, given, taken in cases:
        with context:
            assert (dispatch.native(given) is cpu) is taken
            assert dispatch.native(given, 0.1) is None
    with torch.no_grad():
        for name, taken in (("reference", False), ("cpu", True)):
            with fa.backend(name):
                assert (dispatch.native(x) is cpu) is taken
        with torch.autocast("cpu", torch.bfloat16):
            assert dispatch.native(x) is None


def test_what_the_kernels_do_not_serve_is_served_otherwise():
    """Wider dtypes, longer sequences, strided inputs: the checked way and the reference behind it."""
    torch.manual_seed(0)
    with torch.no_grad():
        x, w = torch.randn(4, H, dtype=torch.float64), torch.randn(N, H, dtype=torch.float64)
        torch.testing.assert_close(fa.ops.linear(x, w), x @ w.T)
        qkv = torch.randn(1, 800, 3 * 16)
        with fa.backend("reference"):
            expected = fa.ops.attention(qkv, 2)
        torch.testing.assert_close(fa.ops.attention(qkv, 2), expected)
        y = torch.randn(H, 4).t()
        torch.testing.assert_close(fa.ops.add_norm(y, y, torch.ones(H), torch.zeros(H)),
                                   torch.nn.functional.layer_norm(2 * y, (H,), eps=1e-12))  # fmt: skip
