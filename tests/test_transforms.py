"""Forward-mode AD and the transforms of torch.func: right wherever PyTorch's own steps would be, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import fastadapt as fa
from fastadapt import dispatch
from tests import tiny

H, B, N, R = 16, 4, 24, 3


def _ops() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]]:
    """Every op as a function of an activation and a parameter, and both."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape)

    x, residual, qkv = draw(2, 3, H), draw(2, 3, H), draw(2, 3, 3 * H)
    w, b, a, up_rank = draw(N, H), draw(N), draw(R, H), draw(N, R)
    down, b_down, up, b_up, norm, norm_bias = draw(B, H), draw(B), draw(H, B), draw(H), draw(H), draw(H)
    rows, mask = torch.tensor([1, 0]), torch.ones(2, 1, 1, 3, dtype=torch.bool)

    def slots(w_down: Tensor) -> list[fa.ops.Slot]:
        return [fa.ops.Slot(norm, norm_bias, w_down, b_down, up, b_up, scale=norm), fa.ops.Slot(norm, b_up)]

    def loras(a: Tensor) -> list[fa.ops.LowRank]:
        return [fa.ops.LowRank(a, up_rank, 0.5), fa.ops.LowRank(a, up_rank, 0.25, slot=1)]

    return {
        "bottleneck": (lambda x, w: fa.ops.bottleneck(
            x, w, b_down, up, b_up, residual=residual, norm_weight=norm, norm_bias=norm_bias, dropout_p=0.3, seed=3,
        ), x, down),
        "bottleneck_rows": (lambda x, w: fa.ops.bottleneck_rows(x, slots(w), rows, residual=residual), x, down),
        "linear": (lambda x, b: fa.ops.linear(x, w, b, activation="gelu", dropout_p=0.3, seed=3), x, b),
        "lora_linear": (lambda x, a: fa.ops.lora_linear(x, w, b, a, up_rank, scale=0.5, dropout_p=0.3, seed=3), x, a),
        "rows": (lambda x, a: fa.ops.linear(x, [w], [b, None], loras=loras(a), rows=rows), x, a),
        "add_norm": (lambda x, w: fa.ops.add_norm(x, residual, w, norm_bias), x, norm),
        "attention": (lambda x, p: fa.ops.attention(x, 4, prefix=p, mask=mask, dropout_p=0.3, seed=3), qkv,
                      draw(2, 5, H)),
        "mix": (lambda sigma, t: fa.ops.mix(sigma, t, 4), draw(2, 3, 16), draw(2, 3, 20)),
        "drop": (lambda x, w: fa.ops.drop(x * w, 0.3, seed=3), x, norm),
    }  # fmt: skip


every_op = pytest.mark.parametrize("op", _ops())


def _slope(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], seen: Tensor) -> Tensor:
    """⟨seen, J along⟩ by the op's own backward."""
    leaves = [t.clone().requires_grad_() for t in at]
    grads = torch.autograd.grad(f(*leaves), leaves, seen)
    return sum((g * t).sum() for g, t in zip(grads, along, strict=True))


@every_op
def test_jvp_of_an_op_is_the_transpose_of_its_backward(op):
    f, *at = _ops()[op]
    along = [torch.randn_like(t) for t in at]
    y, tangent = jvp(f, tuple(at), tuple(along))
    seen = torch.randn_like(y)
    torch.testing.assert_close(y, f(*at))
    torch.testing.assert_close((seen * tangent).sum(), _slope(f, at, along, seen), rtol=1e-4, atol=1e-4)


@every_op
@pytest.mark.parametrize("recorded", [True, False])
def test_dual_tensors_keep_their_tangents_through_an_op(op, recorded):
    f, *at = _ops()[op]
    along = [torch.randn_like(t) for t in at]
    expected = jvp(f, tuple(at), tuple(along))[1]
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, dt) for t, dt in zip(at, along, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(f(*duals)).tangent, expected)


@every_op
def test_functional_gradients_of_an_op_are_its_backward(op):
    f, *at = _ops()[op]
    leaves = [t.clone().requires_grad_() for t in at]
    expected = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    found = grad(lambda *t: f(*t).square().sum(), argnums=(0, 1))(*at)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


@every_op
def test_a_mapped_op_is_that_of_each(op):
    f, x, w = _ops()[op]
    several = torch.stack([x, 2 * x, -x])
    torch.testing.assert_close(vmap(f, in_dims=(0, None))(several, w), torch.stack([f(each, w) for each in several]))
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(f(each, leaf).square().sum() for each in several), leaf)
    found = grad(lambda w: vmap(f, in_dims=(0, None))(several, w).square().sum())(w)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_forced_backend_says_that_it_has_no_tangents():
    if isinstance(dispatch.load("cpu"), str):
        pytest.skip("no C++ kernels here")
    x, w = torch.randn(2, H), torch.randn(N, H)
    with fa.backend("cpu"), pytest.raises(RuntimeError, match=r"forward-mode AD .* .fa.backend\('reference'\)"):
        jvp(lambda x: fa.ops.linear(x, w), (x,), (x,))
    with fa.backend("reference"):
        torch.testing.assert_close(jvp(lambda x: fa.ops.linear(x, w), (x,), (x,))[1], x @ w.T)


def test_a_tangent_that_comes_in_backward_alone_is_refused():
    x, w = torch.randn(2, H, requires_grad=True), torch.randn(N, H)
    y = fa.ops.linear(x, w, activation="gelu")
    with forward_ad.dual_level():
        seen = forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
        with pytest.raises(NotImplementedError, match="run both inside"):
            torch.autograd.grad(y, x, seen)
        torch.autograd.grad(y, x, torch.randn_like(y), retain_graph=True)  # nothing is lost here


def test_compiled_code_keeps_tangents_too():
    x, w = torch.randn(2, H), torch.randn(N, H)

    def f(x: Tensor) -> Tensor:
        return fa.ops.linear(x, w, activation="gelu")

    def of_dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

    expected = jvp(f, (x,), (x,))[1]
    with torch.no_grad():
        for g in (of_dual, lambda x: jvp(f, (x,), (x,))[1]):
            torch.testing.assert_close(torch.compile(g, backend="eager")(x), expected)


# -- models --------------------------------------------------------------------------------------------------------

METHODS = {
    **tiny.METHODS,
    "lora": fa.LoRAConfig(r=4, targets=("query", "value", "output")),
    "prefix": fa.PrefixConfig(length=3, bottleneck=8),
    "masked": fa.MaskedAdapterConfig(bottleneck=8),
}


def _embedded(model: torch.nn.Module, rows: int = 3) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model's logits as a function of embeddings, and some."""
    mask = torch.ones(rows, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    return lambda e: model(inputs_embeds=e, attention_mask=mask)[0], torch.randn(rows, 6, model.config.hidden_size)


def _adapted(method: str) -> torch.nn.Module:
    model = tiny.make(attn_implementation="eager")
    if method == "fusion":
        for name in ("one", "two"):
            fa.adapt(model, fa.PfeifferConfig(bottleneck=8), name=name)
        fa.adapt(model, fa.FusionConfig(adapters=("one", "two")), name="fusion")
    else:
        fa.adapt(model, METHODS[method])
    tiny.shake(model.fastadapt)
    return model.eval()


@pytest.mark.parametrize("recorded", [True, False])
def test_an_accelerated_model_is_the_stock_one_under_transforms(recorded):
    stock = tiny.make(attn_implementation="eager").requires_grad_(False)
    fused = fa.accelerate(tiny.make(attn_implementation="eager")).requires_grad_(False)
    (f, e), (g, _) = _embedded(stock), _embedded(fused)
    along = torch.randn_like(e)
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(jvp(g, (e,), (along,))[1], jvp(f, (e,), (along,))[1], rtol=1e-4, atol=1e-4)
        with forward_ad.dual_level():
            tangents = [forward_ad.unpack_dual(m(forward_ad.make_dual(e, along))).tangent for m in (f, g)]
        torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-4)
        own, theirs = (grad(lambda e, m=m: m(e).square().sum())(e) for m in (g, f))
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)
        one = torch.stack([e, 2 * e])
        torch.testing.assert_close(vmap(g)(one), vmap(f)(one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [*METHODS, "fusion"])
def test_gradients_of_each_row_of_an_adapted_model(method):
    """Forward mode, reverse mode and per-example gradients agree with an ordinary backward."""
    model = _adapted(method)
    own = {key: p for key, p in model.named_parameters() if p.requires_grad and "mask_head" not in key}
    rest = {key: p.detach() for key, p in model.named_parameters() if key not in own}
    detached = {key: p.detach() for key, p in own.items()}
    _, e = _embedded(model)
    seen = torch.randn(e.shape[0], model.config.num_labels)

    def loss(parameters: dict[str, Tensor], e: Tensor, seen: Tensor) -> Tensor:
        logits = functional_call(model, {**rest, **parameters}, kwargs={"inputs_embeds": e.view(-1, 6, e.shape[-1])})
        return (logits[0] * seen).sum()

    def of_copies(parameters: dict[str, Tensor], e: Tensor) -> Tensor:
        copies = {key: p.expand(e.shape[0], *p.shape) for key, p in parameters.items()}
        return vmap(loss)(copies, e, seen).sum()

    model(inputs_embeds=e)  # what is folded for inference is at hand
    leaf = e.clone().requires_grad_()
    *grads, of_e = torch.autograd.grad(loss(own, leaf, seen), [*own.values(), leaf])
    expected = dict(zip(own, grads, strict=True))
    assert any(g.abs().max() > 1e-2 for g in expected.values())
    of_rows = vmap(grad(loss), in_dims=(None, 0, 0))(detached, e, seen)
    summed, of_mapped = grad(of_copies, argnums=(0, 1))(detached, e)
    torch.testing.assert_close(of_mapped, of_e, rtol=1e-3, atol=1e-3)
    for key, g in expected.items():
        torch.testing.assert_close(of_rows[key].sum(0), g, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(summed[key], g, rtol=1e-3, atol=1e-3)
    along = {key: torch.randn_like(p) for key, p in detached.items()}
    with torch.no_grad():
        _, slope = jvp(lambda p: loss(p, e, seen), (detached,), (along,))
    expected_slope = sum((expected[key] * along[key]).sum() for key in own)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-3, atol=1e-2)


def test_what_an_adaptation_adds_to_the_loss_has_its_gradient_under_transforms():
    model = _adapted("masked").train()
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    _, e = _embedded(model)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(5)
        given = {"inputs_embeds": e, "labels": torch.arange(e.shape[0])}
        return functional_call(model, parameters, kwargs=given).loss

    expected = dict(zip(own, torch.autograd.grad(loss(own), list(own.values())), strict=True))
    found = grad(loss)({key: p.detach() for key, p in own.items()})
    assert any(g.abs().max() > 0 for key, g in expected.items() if "mask_head" in key)
    for key, g in expected.items():
        torch.testing.assert_close(found[key], g, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    not transformers.__version__.startswith("4."), reason="transformers 5 itself asks for a mask's values"
)
def test_masks_may_be_mapped():
    """Whether to remove padding is a question about a mask's values, which a mapped one does not answer."""
    model = fa.accelerate(tiny.make(attn_implementation="eager", max_position_embeddings=128))
    e, mask = torch.randn(2, 5, 128, model.config.hidden_size), torch.ones(2, 5, 128, dtype=torch.int64)
    mask[0, 1:, 9:] = 0

    def f(e: Tensor, mask: Tensor) -> Tensor:
        return model(inputs_embeds=e, attention_mask=mask)[0]

    with torch.no_grad():
        expected = torch.stack([f(*each) for each in zip(e, mask, strict=True)])
        torch.testing.assert_close(vmap(f)(e, mask), expected, rtol=1e-4, atol=1e-4)


def test_attention_is_the_op_wherever_tangents_are_asked_for():
    from fastadapt.modules.sublayers import attention_runs_here

    assert not attention_runs_here(torch.device("cuda"))
    with forward_ad.dual_level():
        assert attention_runs_here(torch.device("cuda"))


def test_nothing_folded_under_a_transform_is_kept():
    model = _adapted("prefix")
    f, e = _embedded(model)
    with torch.no_grad():
        before = f(e)
        parameters = {key: p.detach() for key, p in model.named_parameters()}
        jvp(lambda p: functional_call(model, p, kwargs={"inputs_embeds": e})[0], (parameters,), (parameters,))
        assert torch.equal(f(e), before)
