"""Batches without padding: the real tokens' outputs and gradients are those of the padded batch."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import RobertaForSequenceClassification

import fastadapt as fa
from fastadapt.modules import unpad
from tests.tiny import (
    METHODS,
    SEQUENCE,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    at_once,
    make,
    shake,
)

LENGTHS = (40, 3, 17, 17, 1, 29, 16, 8)
EVERY = {
    "bare": None,
    **METHODS,
    "lora": fa.LoRAConfig(r=4, targets=("query", "value", "output")),
    "bitfit": fa.BitFitConfig(),
    "prefix": fa.PrefixConfig(length=5, bottleneck=8),
    "mam": fa.MAMConfig(fa.PrefixConfig(length=5, flat=True), fa.ParallelConfig(bottleneck=8)),
    "masked": fa.MaskedAdapterConfig(bottleneck=8),
}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(unpad, "LEAST_TOKENS", 1)


@pytest.fixture
def packed(monkeypatch):
    """How many tokens the layers saw in each forward without padding."""
    seen, honest = [], unpad.Packed.of

    def of(mask, piece, device):
        found = honest(mask, piece, device)
        seen.append(found.rows)
        return found

    monkeypatch.setattr(unpad.Packed, "of", of)
    return seen


def padded(model, lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask == 1, ids, model.config.pad_token_id), "attention_mask": mask}


def adapted(model_class, method, **options):
    model = make(model_class, max_position_embeddings=64, **options)
    if EVERY[method] is None:
        return fa.accelerate(model)
    fa.adapt(model, EVERY[method], name="a")
    shake(model.fastadapt["a"])
    return model.eval()


def with_padding(model, **inputs):
    """The same model where it has to compute padding."""
    with torch.no_grad():
        mask = inputs.pop("attention_mask")
        return model(**inputs, attention_mask=mask, output_hidden_states=True)


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", EVERY)
def test_logits_are_those_of_the_padded_batch(model_class, method, packed):
    model = adapted(model_class, method)
    inputs = padded(model)
    with torch.no_grad():
        ours = model(**inputs).logits
    assert packed == [sum(LENGTHS)]
    want = with_padding(model, **inputs).logits
    assert len(packed) == 1
    torch.testing.assert_close(ours, want, **CLOSE)


def test_hidden_states_of_padding_are_zeros_and_the_others_those_of_the_padded_batch(packed):
    model = fa.skip_padding(fa.accelerate(make(BertModel, max_position_embeddings=64)))
    inputs = padded(model)
    inputs["attention_mask"][0, 7:11] = 0  # a hole
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = model(**inputs)
    want = with_padding(model, **inputs)
    assert packed == [sum(LENGTHS) - 4]
    torch.testing.assert_close(ours.last_hidden_state[real], want.last_hidden_state[real], **CLOSE)
    torch.testing.assert_close(ours.pooler_output, want.pooler_output, **CLOSE)
    assert not ours.last_hidden_state[~real].any()
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)
    assert torch.equal(plain[0], ours.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_padded_path(dtype, packed):
    """Against float64, at most twice what the padded path is off by."""
    model = fa.skip_padding(adapted(BertForTokenClassification, "houlsby"))
    inputs = padded(model)
    real = inputs["attention_mask"].bool()
    exact = with_padding(copy.deepcopy(model).double(), **inputs).logits[real]
    model.to(dtype)
    with torch.no_grad():
        ours = model(**inputs).logits[real].double()
    theirs = with_padding(model, **inputs).logits[real].double()
    assert len(packed) == 1
    assert (ours - exact).square().mean() <= 4 * (theirs - exact).square().mean()


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "lora", "bitfit", "prefix"])
def test_gradients_are_those_of_the_padded_batch(method, packed):
    model = adapted(SEQUENCE[0], method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = padded(model) | {"labels": torch.arange(len(LENGTHS)) % 3}
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    ours = torch.autograd.grad(model(**inputs).loss, parameters)
    assert len(packed) == 1
    want = torch.autograd.grad(model(**inputs, output_hidden_states=True).loss, parameters)
    assert len(packed) == 1
    for name, a, b in zip(names, ours, want, strict=True):
        slack = 1e-5 + 1e-4 * float(b.abs().max())
        torch.testing.assert_close(a, b, atol=slack, rtol=1e-3, msg=lambda m, n=name: n + m)


def test_routed_rows_keep_their_adapters_and_heads(packed):
    model = make(max_position_embeddings=64)
    for name, config in (("h", METHODS["houlsby"]), ("p", METHODS["pfeiffer"]), ("l", EVERY["lora"])):
        fa.adapt(model, config, name=name)
        shake(model.fastadapt[name], seed=ord(name))
    inputs = padded(model.eval())
    for names in (["h", None, "l", "l", "h", None, "h", "l"], ["p", "h", None, "l", "h", "p", "p", "l"]):
        with fa.route(model, names), torch.no_grad():
            ours = model(**inputs).logits
            assert model.fastadapt.route.table.pieces is None
            count = len(packed)
            want = with_padding(model, **inputs).logits
            assert len(packed) == count
        torch.testing.assert_close(ours, want, **CLOSE)
    assert packed == [sum(-(-n // 16) * 16 for n in LENGTHS)] * 2


def test_a_merged_lora(packed):
    model = adapted(SEQUENCE[0], "lora")
    inputs = padded(model)
    fa.merge(model, "a")
    with torch.no_grad():
        ours = model(**inputs).logits
    assert len(packed) == 1
    torch.testing.assert_close(ours, with_padding(model, **inputs).logits, **CLOSE)


def test_checkpointed_layers(packed):
    model = adapted(SEQUENCE[0], "houlsby", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = padded(model) | {"labels": torch.arange(len(LENGTHS)) % 3}
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(**inputs).loss, parameters)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**inputs).loss
        model.zero_grad()
        loss.backward()
        for p, b in zip(parameters, want, strict=True):
            torch.testing.assert_close(p.grad, b, atol=1e-6, rtol=1e-4)
    assert len(packed) == 3


def stays(model, packed, **inputs):
    with torch.no_grad():
        model(**inputs)
    return not packed


def explained(model):
    with torch.no_grad():
        return str(fa.explain(model))


def test_padding_stays_where_something_would_notice(packed):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = padded(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert stays(model, packed, input_ids=ids)
    assert stays(model, packed, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert stays(model, packed, input_ids=ids, attention_mask=mask.flip(1)), "position 0 is padding, and is pooled"
    assert stays(model, packed, **inputs, output_hidden_states=True)
    assert stays(model, packed, **inputs, output_attentions=True)
    handle = model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    assert stays(model, packed, **inputs)
    assert "a hook or a forward of its own in a layer" in explained(model)
    handle.remove()
    assert not stays(model, packed, **inputs)
    packed.clear()
    watched = (
        model.bert, model.bert.encoder, model.bert.pooler, model.bert.encoder.layer[0].output.dense,
        model.bert.encoder.layer[0].attention.output,
    )  # fmt: skip
    for module in watched:
        handle = module.register_forward_hook(lambda *_: None)
        assert stays(model, packed, **inputs), type(module).__name__
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert stays(model, packed, **inputs)
    handle.remove()
    intermediate = model.bert.encoder.layer[1].intermediate
    intermediate.forward = intermediate.forward
    assert stays(model, packed, **inputs)
    del intermediate.forward
    assert not stays(model, packed, **inputs)
    packed.clear()
    answering = fa.accelerate(make(BertForQuestionAnswering, max_position_embeddings=64))
    assert stays(answering, packed, **inputs)
    assert "the model's head reads it" in explained(answering)
    gated = make(max_position_embeddings=64)
    fa.adapt(gated, fa.BottleneckConfig(bottleneck=8, gate=True))
    assert stays(gated.eval(), packed, **inputs)
    assert "a gate is a mean over all positions" in explained(gated)


@pytest.mark.parametrize("model_class", [BertModel, BertForTokenClassification])
def test_where_hidden_states_of_padding_are_outputs_they_stay_the_stock_models(model_class, packed):
    stock = make(model_class, max_position_embeddings=64)
    inputs = padded(stock)
    with torch.no_grad():
        want = stock(**inputs)[0]
        model = fa.accelerate(copy.deepcopy(stock))
        torch.testing.assert_close(model(**inputs)[0], want, **CLOSE)
        assert not packed and "fa.skip_padding makes them zeros" in explained(model)
        assert not stays(fa.skip_padding(model), packed, **inputs)
        packed.clear()
        assert stays(fa.skip_padding(model, False), packed, **inputs)


def test_the_base_of_a_classifier_called_by_itself_keeps_padding(packed):
    model = fa.accelerate(make(max_position_embeddings=64))
    inputs = padded(model)
    assert not stays(model, packed, **inputs)
    packed.clear()
    assert stays(model.bert, packed, **inputs)


def test_a_head_that_may_read_all_positions_is_given_them(packed):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(32, 3)

        def forward(self, features):
            return self.out(features.mean(1))

    model = make(RobertaForSequenceClassification, max_position_embeddings=64)
    fa.adapt(model, METHODS["houlsby"], "a", head=Mean())
    inputs = padded(model.eval())
    assert stays(model, packed, **inputs)
    assert not stays(fa.activate(model, None), packed, **inputs)


class Mean(nn.Module):
    def forward(self, features):
        return features.mean(1)


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("adapts", [False, True])
def test_a_reader_of_the_users_own_is_given_all_positions(model_class, adapts, packed):
    model = make(model_class, max_position_embeddings=64)
    base = getattr(model, model.base_model_prefix)
    if getattr(base, "pooler", None) is not None:
        base.pooler = Mean()
    else:
        model.classifier = nn.Sequential(Mean(), nn.Linear(32, model.config.num_labels))
    inputs = padded(model.eval())
    with torch.no_grad():
        want = model(**inputs).logits
        if not adapts:
            fa.accelerate(model)
        elif isinstance(model.classifier, nn.Sequential):
            with pytest.raises(ValueError, match="Sequential"):  # no place for the adaptation's own
                fa.adapt(model, METHODS["houlsby"], "a")
        else:
            fa.activate(fa.adapt(model, METHODS["houlsby"], "a"), None)
        torch.testing.assert_close(model.eval()(**inputs).logits, want, **CLOSE)
    assert not packed


def test_threads_that_run_one_model_have_masks_of_their_own(packed):
    model = fa.accelerate(make(max_position_embeddings=64))
    batches = [padded(model), padded(model, LENGTHS[::-1])]
    with torch.no_grad():
        want = [model(**batch).logits for batch in batches]
    packed.clear()
    # Each waits in the embeddings, behind the hooks that note its mask, until the other is there too.
    together = threading.Barrier(2, timeout=60)
    handle = model.bert.embeddings.register_forward_pre_hook(lambda *_: (together.wait(), None)[1])
    got = at_once(*(torch.no_grad()(lambda each=each: model(**each).logits) for each in batches))
    handle.remove()
    assert len(packed) == 2
    for own, expected in zip(got, want, strict=True):
        torch.testing.assert_close(own, expected, **CLOSE)


def test_skip_padding_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="has no fused sublayers"):
        fa.skip_padding(make())
    with pytest.raises(ValueError, match="reads padding too"):
        fa.skip_padding(fa.accelerate(make(BertForQuestionAnswering)))
    with pytest.raises(TypeError, match="skip: got 1"):
        fa.skip_padding(fa.accelerate(make()), 1)


def test_few_tokens_or_little_padding_are_left_alone(packed, monkeypatch):
    model = fa.accelerate(make(max_position_embeddings=64))
    assert stays(model, packed, **padded(model, (40, 40, 39, 38)))
    monkeypatch.setattr(unpad, "LEAST_TOKENS", 512)
    assert stays(model, packed, **padded(model))


def test_restored_models_have_no_trace_of_it():
    model = make(max_position_embeddings=64)
    before = copy.deepcopy(model.bert.encoder.__dict__).keys()
    inputs = padded(model)
    with torch.no_grad():
        stock = model(**inputs).logits
    fa.accelerate(model)
    fa.accelerate(model)
    assert len(model.bert._forward_pre_hooks) == len(model._forward_pre_hooks) == 1
    with torch.no_grad():
        clone = copy.deepcopy(model)
        torch.testing.assert_close(clone(**inputs).logits, model(**inputs).logits)
    fa.restore(model)
    assert not model.bert._forward_pre_hooks and not model._forward_pre_hooks
    assert model.bert.encoder.__dict__.keys() == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)
