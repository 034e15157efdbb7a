"""AdapterDrop: what runs, what is drawn, and what autograd keeps."""

from __future__ import annotations

import pytest
import torch

import fastadapt as fa
from fastadapt.modules.sublayers import FusedNorm
from tests.test_methods_life import CLOSE, adapted, quiet, trained
from tests.tiny import batch, make, output

LAYERS = 3


def config(drop, **options):
    return fa.HoulsbyConfig(bottleneck=8, drop=drop, **options)


def grad_flow(model) -> list[bool]:
    """Whether the output of each layer requires a gradient in the next forward."""
    needs: list[bool] = []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: needs.append((out if isinstance(out, torch.Tensor) else out[0]).requires_grad)
        )
        for layer in model.bert.encoder.layer
    ]
    model(**batch(model, labels=True)).loss.backward()
    for hook in hooks:
        hook.remove()
    return needs


def quieted(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return model


@pytest.mark.parametrize("scope", ["encoder", "all"])
def test_robust_draws_the_lowest_layer_for_each_batch(scope):
    model = quieted(adapted(config(fa.AdapterDrop(), train_layer_norm=scope))).train()
    reference = quieted(adapted(config(None, train_layer_norm=scope))).train()
    seen = set()
    for seed in range(16):
        torch.manual_seed(seed)
        model.zero_grad()
        needs = grad_flow(model)
        first = model.fastadapt["a"].parts()["encoder.layer.0.output"].step.turn.first
        seen.add(first)
        assert needs == ([True] * 3 if first == 0 else [False] * first + [True] * (3 - first))
        got = {n for n, p in model.named_parameters() if p.grad is not None}
        below = [f"layer.{i}." for i in range(first)] + (["embeddings"] if first else [])
        assert got == {n for n in trained(model) if not any(b in n for b in below)}
        if scope == "encoder":  # skip_layers leaves the embeddings' copy where it is
            torch.manual_seed(seed)
            logits = model(**batch(model)).logits
            fa.activate(reference, "a", skip_layers=range(first))
            torch.testing.assert_close(logits, reference(**batch(model)).logits, **CLOSE)
    assert seen == {0, 1, 2}


def test_seeds_repeat_the_draws_and_inference_has_none():
    model = adapted(config(fa.AdapterDrop()))
    step = model.fastadapt["a"].parts()["encoder.layer.0.output"].step
    whole = output(model)
    torch.testing.assert_close(whole, output(adapted(config(None))), rtol=0, atol=0)
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        model.train()
        draws.append([(model(**batch(model)), step.turn.first)[1] for _ in range(8)])
    assert draws[0] == draws[1] and len(set(draws[0])) > 1
    assert torch.equal(output(model.eval()), whole)


def test_specialised_has_nothing_below_n():
    model = adapted(config(fa.AdapterDrop("specialised", n=2), train_layer_norm="all"))
    assert {p.split(".")[2] for p in model.fastadapt["a"].parts()} == {"2"}
    assert grad_flow(model.train()) == [False, False, True]
    model.eval()
    reference = fa.adapt(make(), config(None), name="a")
    reference.fastadapt["a"].load_state_dict(model.fastadapt["a"].state_dict(), strict=False)
    fa.activate(reference, "a", skip_layers=[0, 1])
    torch.testing.assert_close(output(model), output(reference), **CLOSE)


def test_independent_drops_rows():
    model = quieted(adapted(config(fa.AdapterDrop("independent", p=0.5)))).train()
    step = model.fastadapt["a"].parts()["encoder.layer.0.output"].step
    inputs = batch(model, rows=3, labels=True)
    mixed = dead = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        live = step.turn.live
        assert live.shape == (3, 3)
        mixed += int(any(0 < int(r.sum()) < 3 for r in live))
        dead += int(not live[0].any())
        rows = []
        grads = None
        for row in range(3):  # each row alone, in a model that skips what this row dropped
            one = quieted(adapted(config(None))).train()
            fa.activate(one, "a", skip_layers=[i for i in range(3) if not live[i, row]])
            single = one(**{k: v[row : row + 1] for k, v in inputs.items()})
            rows.append(single.logits)
            (single.loss / 3).backward()
            found = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
            grads = found if grads is None else {n: grads.get(n, 0) + found.get(n, 0) for n in {*grads, *found}}
        torch.testing.assert_close(out.logits, torch.cat(rows), **CLOSE)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(got) == set(grads)
        for name, grad in got.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6 + 1e-4 * float(grad.abs().max()))
    assert mixed and dead, "the case tests nothing"
    model.eval()
    assert torch.equal(output(model), output(adapted(config(None))))
    assert step.turn.live is None


def test_the_embeddings_norm_sleeps_with_the_layers_above():
    model = adapted(config(fa.AdapterDrop(), train_layer_norm="all")).train()
    norm = next(m for m in model.modules() if isinstance(m, FusedNorm))
    site = norm.active.site
    assert site.layer == -1
    site.step.turn.first = 1
    assert site.asleep()
    site.step.turn.first = 0
    assert not site.asleep()


@pytest.mark.parametrize("drop", [fa.AdapterDrop(), fa.AdapterDrop("specialised", n=1),
                                  fa.AdapterDrop("independent", p=0.2)], ids=lambda d: d.mode)  # fmt: skip
@pytest.mark.parametrize("base", [fa.PfeifferConfig, fa.ParallelConfig], ids=lambda c: c.__name__)
def test_files(drop, base, tmp_path):
    model = adapted(base(bottleneck=8, drop=drop))
    with pytest.warns(UserWarning, match="in training"):
        fa.save(model, tmp_path / "a")
    again = quiet(fa.load, make(), tmp_path / "a")
    assert again.fastadapt["a"].config == model.fastadapt["a"].config
    assert torch.equal(output(again), output(model))
    for name in ("fastadapt.json", "fastadapt.safetensors"):
        (tmp_path / "a" / name).unlink()  # as a peer reads it
    assert torch.equal(output(fa.load(make(), tmp_path / "a")), output(model))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fa.AdapterDrop("sometimes"), ValueError, "mode.*robust"),
        (lambda: fa.AdapterDrop("specialised"), TypeError, "n: got None"),
        (lambda: fa.AdapterDrop("specialised", n=-1), ValueError, "n"),
        (lambda: fa.AdapterDrop("robust", n=2), ValueError, "n"),
        (lambda: fa.AdapterDrop("independent"), ValueError, "p"),
        (lambda: fa.AdapterDrop("robust", p=0.5), ValueError, "p"),
        (lambda: fa.AdapterDrop("independent", p=float("nan")), ValueError, "p: got nan; accepted.*a probability"),
        (lambda: fa.AdapterDrop("specialised", n=float("nan")), TypeError, "n: got nan; accepted"),
        (lambda: fa.HoulsbyConfig(drop=0.5), TypeError, "drop"),
        (lambda: fa.adapt(make(), config(fa.AdapterDrop("specialised", n=3))), ValueError, "drop.*0 to 2"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
