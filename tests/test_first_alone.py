"""Where a head reads position 0 alone, the last layer computes nothing else, and nobody can tell."""

from __future__ import annotations

import copy
import threading
from types import MethodType

import pytest
import torch
import transformers
from torch import nn

import fastadapt as fa
from fastadapt.modules.sublayers import FusedSelfAttention
from tests.test_unpad import EVERY, LENGTHS, Mean, adapted, padded
from tests.tiny import (
    METHODS,
    SEQUENCE,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertModel,
    at_once,
    batch,
    make,
    shake,
)

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PADDING = {"none": None, "little": (40, 40, 39, 38), "much": LENGTHS}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr("fastadapt.modules.unpad.LEAST_TOKENS", 1)


@pytest.fixture
def alone(monkeypatch):
    """The queries' shapes of every attention of position 0 alone."""
    seen, honest = [], FusedSelfAttention.of_first.__func__

    def of_first(cls, q, *args):
        seen.append(tuple(q.shape))
        return honest(cls, q, *args)

    monkeypatch.setattr(FusedSelfAttention, "of_first", classmethod(of_first))
    return seen


def inputs_of(model, padding):
    inputs = padded(model, PADDING[padding] or (24,) * 5)
    if padding == "none":
        del inputs["attention_mask"]
    return inputs


def rows(alone):
    return sum(shape[0] for shape in alone)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", EVERY)
def test_logits_are_those_of_all_positions(model_class, method, padding, alone):
    model = adapted(model_class, method)
    inputs = inputs_of(model, padding)
    with torch.no_grad():
        ours = model(**inputs).logits
        assert rows(alone) == len(inputs["input_ids"]) and {shape[1] for shape in alone} == {1}
        count = len(alone)
        want = model(**inputs, output_hidden_states=True).logits
    assert len(alone) == count
    torch.testing.assert_close(ours, want, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["ones", "by query", "hidden row", "unseen first"])
def test_masks_of_every_form(form, implementation, alone):
    model = fa.accelerate(make(max_position_embeddings=64, attn_implementation=implementation))
    inputs = padded(model, (16,) * 4)
    mask = inputs["attention_mask"]
    if form == "by query":
        mask = torch.ones(16, 16).tril(8).expand(4, 16, 16).long()
        if transformers.__version__.startswith("5."):
            mask = torch.where(mask == 1, 0.0, -1e9)[:, None]
    if form == "hidden row":
        mask[1] = 0
    if form == "unseen first":
        mask[:, 0] = 0
    inputs["attention_mask"] = mask
    with torch.no_grad():
        ours = model(**inputs).logits
        assert rows(alone) == 4
        want = model(**inputs, output_hidden_states=True).logits
    torch.testing.assert_close(ours, want, **CLOSE)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("method", [*(name for name in EVERY if name != "masked"), "lora dropped"])
def test_gradients_are_those_of_all_positions(method, padding, alone):
    if method == "lora dropped":  # a dropout that drops nothing takes the path of one that does
        model = make(max_position_embeddings=64, **QUIET)
        fa.adapt(model, fa.LoRAConfig(r=4, targets=("query", "key", "value", "output"), dropout=1e-12), name="a")
        shake(model.fastadapt["a"])
    else:
        model = adapted(SEQUENCE[0], method, **QUIET)
    inputs = inputs_of(model.train(), padding)
    inputs["labels"] = torch.arange(len(inputs["input_ids"])) % 3
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    ours = torch.autograd.grad(model(**inputs).loss, parameters)
    # Where the base trains, the original code runs.
    assert rows(alone) == (0 if method == "bare" else len(inputs["input_ids"]))
    want = torch.autograd.grad(model(**inputs, output_hidden_states=True).loss, parameters)
    for name, a, b in zip(names, ours, want, strict=True):
        slack = 1e-6 + 1e-4 * float(b.abs().max())
        torch.testing.assert_close(a, b, atol=slack, rtol=1e-3, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["houlsby", "lora", "prefix"])
def test_the_error_is_that_of_all_positions(method, dtype, alone):
    """Against float64, over several inputs, at most twice what the path over all positions is off by."""
    model = adapted(SEQUENCE[0], method)
    inputs = [padded(model, (24,) * 16, seed) for seed in range(4)]
    exact_model = copy.deepcopy(model).double()
    model.to(dtype)
    errors = []
    for more in ({}, {"output_hidden_states": True}):
        off = []
        for each in inputs:
            with torch.no_grad():
                exact = exact_model(**each, output_hidden_states=True).logits
                off.append(model(**each, **more).logits.double() - exact)
        errors.append(torch.cat(off).abs())
    assert rows(alone) == 64
    assert errors[0].square().mean() <= 4 * errors[1].square().mean()
    assert errors[0].max() <= 2 * errors[1].max()


@pytest.mark.parametrize("where", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_dropout_reaches_position_0_as_it_did(where, alone):
    """Mean and spread of logits over many forwards are those of all positions'; one layer, so that no other drops."""
    model = adapted(SEQUENCE[0], "lora", num_hidden_layers=1, **{**QUIET, where: 0.3}).train()
    model.bert.embeddings.dropout.p = model.dropout.p = 0.0
    ids = padded(model, (12,))["input_ids"].expand(4096, -1)
    torch.manual_seed(5)
    with torch.no_grad():
        ours, want = model(ids).logits, model(ids, output_hidden_states=True).logits
    assert len(alone) == 1
    spread = (ours.var(0) / 4096 + want.var(0) / 4096).sqrt()
    assert (want.std(0) > 1e-3).all() and ((ours.mean(0) - want.mean(0)).abs() < 5 * spread).all()
    torch.testing.assert_close(ours.std(0), want.std(0), rtol=0.1, atol=0.0)


def test_routed_rows(alone):
    model = make(max_position_embeddings=64)
    for name, config in (("h", METHODS["houlsby"]), ("p", METHODS["pfeiffer"]), ("l", EVERY["lora"])):
        fa.adapt(model, config, name=name)
        shake(model.fastadapt[name], seed=ord(name))
    inputs = inputs_of(model.eval(), "none")
    for names in (["h", None, "l", "l", "h"], ["p", "h", None, "l", "p"]):
        alone.clear()
        with fa.route(model, names), torch.no_grad():
            ours = model(**inputs).logits
            assert rows(alone) == 5
            want = model(**inputs, output_hidden_states=True).logits
        torch.testing.assert_close(ours, want, **CLOSE)


def test_several_tasks_on_one_text(alone):
    model = make(max_position_embeddings=64)
    for name in "ab":
        fa.adapt(model, fa.HoulsbyConfig(bottleneck=8, leave_out=(0, 1)), name=name)
        shake(model.fastadapt[name], seed=ord(name))
    inputs = inputs_of(model.eval(), "none")
    names = [("a", "b"), ("b",), ("a",), ("b", "a"), (None,)]
    with fa.route(model, names), torch.no_grad():
        ours = model(**inputs).logits
        assert rows(alone) == 7
        want = model(**inputs, output_hidden_states=True).logits
    torch.testing.assert_close(ours, want, **CLOSE)


def test_several_choices(alone):
    model = fa.accelerate(make(BertForMultipleChoice))
    inputs = batch(model)
    choices = inputs["input_ids"].shape[0] * inputs["input_ids"].shape[1]
    with torch.no_grad():
        ours = model(**inputs).logits
        assert rows(alone) == choices
        want = model(**inputs, output_hidden_states=True).logits
    torch.testing.assert_close(ours, want, **CLOSE)


def test_a_merged_lora(alone):
    model = adapted(SEQUENCE[0], "lora")
    fa.merge(model, "a")
    inputs = inputs_of(model, "none")
    with torch.no_grad():
        ours = model(**inputs).logits
        assert rows(alone) == 5
        torch.testing.assert_close(ours, model(**inputs, output_hidden_states=True).logits, **CLOSE)


def test_given_embeddings_and_positional_arguments(alone):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = padded(model, (24,) * 5)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).logits
        given = model(inputs["input_ids"], inputs["attention_mask"]).logits
        embedded = model.bert.embeddings.word_embeddings(inputs["input_ids"])
        embeds = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
        pair = model(**inputs, return_dict=False)
    assert len(alone) == 3
    for own in (given, embeds, pair[0]):
        torch.testing.assert_close(own, want, **CLOSE)


def runs_alone(model, alone, **inputs):
    alone.clear()
    with torch.no_grad():
        model(**inputs)
    return bool(alone)


def test_all_positions_run_where_something_would_notice(alone):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = inputs_of(model, "none")
    last = model.bert.encoder.layer[-1]
    assert runs_alone(model, alone, **inputs)
    assert not runs_alone(model, alone, **inputs, output_hidden_states=True)
    assert not runs_alone(model, alone, **inputs, output_attentions=True)
    watched = (
        model.bert, model.bert.encoder, model.bert.pooler, last, last.output, last.output.dense, last.intermediate,
        last.attention, last.attention.output, last.attention.self,
    )  # fmt: skip
    for module in watched:
        handle = module.register_forward_hook(lambda *_: None)
        assert not runs_alone(model, alone, **inputs), type(module).__name__
        handle.remove()
        handle = module.register_forward_pre_hook(lambda *_: None)
        assert not runs_alone(model, alone, **inputs), type(module).__name__
        handle.remove()
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)  # which sees all of its positions
    assert runs_alone(model, alone, **inputs)
    handle.remove()
    with torch.no_grad():
        assert "first position alone" not in str(fa.explain(model))
        handle = last.register_forward_hook(lambda *_: None)
        assert "first position alone: a hook or a forward of its own in the last layer" in str(fa.explain(model))
        handle.remove()
    last.intermediate.forward = last.intermediate.forward
    assert not runs_alone(model, alone, **inputs)
    del last.intermediate.forward

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    last.output.dense.__class__ = Doubled
    assert not runs_alone(model, alone, **inputs)
    last.output.dense.__class__ = nn.Linear
    assert runs_alone(model, alone, **inputs)
    model.bert.pooler = Mean()
    assert not runs_alone(model, alone, **inputs)
    gated = make(max_position_embeddings=64)
    fa.adapt(gated, fa.BottleneckConfig(bottleneck=8, gate=True))
    assert not runs_alone(gated.eval(), alone, **inputs)
    for bare in (
        make(BertModel, max_position_embeddings=64),
        make(BertForTokenClassification, max_position_embeddings=64),
    ):
        assert not runs_alone(fa.accelerate(bare), alone, **inputs)


def pools(self, input_ids):
    return self.bert(input_ids).last_hidden_state.mean(1)


def test_a_forward_of_the_users_own_is_given_all_positions(alone, monkeypatch):
    model = fa.accelerate(make(max_position_embeddings=64))
    ids = inputs_of(model, "none")["input_ids"]
    with torch.no_grad():
        want = model.bert(ids).last_hidden_state.mean(1)
        model.forward = pools.__get__(model)
        torch.testing.assert_close(model(ids), want, **CLOSE)
        del model.forward
        monkeypatch.setattr(type(model), "forward", pools)
        torch.testing.assert_close(model(ids), want, **CLOSE)
    assert not alone


def test_accelerates_forward_around_a_models_is_none_of_the_users(alone):
    """As ``Accelerator.prepare`` puts it there under mixed precision."""
    utils = pytest.importorskip("accelerate.utils")
    model = fa.accelerate(make(max_position_embeddings=64))
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__), model)
    model.forward = MethodType(utils.convert_outputs_to_fp32(model.forward.__func__), model)
    assert runs_alone(model, alone, **inputs_of(model, "none"))


def test_a_loss_over_all_positions_has_them(alone):
    model = adapted(SEQUENCE[0], "masked", **QUIET)
    inputs = inputs_of(model, "none")
    assert runs_alone(model, alone, **inputs)
    alone.clear()
    model.train()(**inputs, labels=torch.zeros(5, dtype=torch.long)).loss.backward()
    assert not alone


def test_chunks_of_the_feed_forward_network_are_left_alone(alone):
    model = fa.accelerate(make(max_position_embeddings=64, chunk_size_feed_forward=6))
    inputs = inputs_of(model, "none")
    with torch.no_grad():
        ours, want = model(**inputs).logits, model(**inputs, output_hidden_states=True).logits
    torch.testing.assert_close(ours, want, **CLOSE)


def test_the_base_called_by_itself_gives_all_positions(alone):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = inputs_of(model, "none")
    assert runs_alone(model, alone, **inputs)
    assert not runs_alone(model.bert, alone, **inputs)
    with torch.no_grad():
        assert model.bert(**inputs).last_hidden_state.shape == (5, 24, 32)


def test_the_base_called_on_something_else_within_the_models_forward_gives_all_positions(alone):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs, other, seen = inputs_of(model, "none"), torch.full((2, 7), 9), []
    model.register_forward_pre_hook(lambda *_: seen.append(model.bert(other).last_hidden_state.shape))
    with torch.no_grad():
        model(**inputs)
    assert seen == [(2, 7, 32)]


def test_nothing_is_left_of_a_forward_that_failed(alone):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = inputs_of(model, "none")
    wrong = {"input_ids": torch.full_like(inputs["input_ids"], 10_000)}
    hidden = torch.randn(5, 24, 32)
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(**wrong)  # behind the hooks, before the encoder
        assert model.bert.encoder(hidden)[0].shape == hidden.shape

        def refuse(*_):
            raise RuntimeError("no")

        handle = model.bert.register_forward_pre_hook(refuse)  # between the hooks
        with pytest.raises(RuntimeError, match="no"):
            model(**inputs)
        handle.remove()
        assert model.bert(**inputs).last_hidden_state.shape == hidden.shape
        handle = model.bert.encoder.layer[1].intermediate.register_forward_pre_hook(refuse)  # in the encoder
        with pytest.raises(RuntimeError, match="no"):
            model(**inputs)
        handle.remove()
        layer = model.bert.encoder.layer[-1]
        out = layer(hidden)
        assert (out[0] if isinstance(out, tuple) else out).shape == hidden.shape
    assert not alone


def test_threads_that_run_one_model_do_not_disturb_each_other(alone):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = inputs_of(model, "none")
    with torch.no_grad():
        want = model(**inputs).logits, model.bert(**inputs).last_hidden_state
    # One forward stops between two layers until the other, which gives all positions, has run.
    stopped, over = threading.Event(), threading.Event()

    def stop(*_):
        if not stopped.is_set():
            stopped.set()
            assert over.wait(60)

    def second():
        assert stopped.wait(60)
        found = model.bert(**inputs).last_hidden_state
        over.set()
        return found

    handle = model.bert.encoder.layer[0].register_forward_hook(stop)
    got = at_once(torch.no_grad()(lambda: model(**inputs).logits), torch.no_grad()(second))
    handle.remove()
    for own, expected in zip(got, want, strict=True):
        torch.testing.assert_close(own, expected, **CLOSE)


def test_restored_models_have_no_trace_of_it():
    model = make(max_position_embeddings=64)
    hooks = [dict(m._forward_hooks) for m in (model, model.bert)]
    fa.accelerate(model)
    fa.restore(model)
    for module, before in zip((model, model.bert), hooks, strict=True):
        assert dict(module._forward_hooks) == before and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
