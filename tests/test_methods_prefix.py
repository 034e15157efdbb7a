"""Prefix tuning and mix-and-match against attention with longer keys and values, written out."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertModel

import fastadapt as fa
from tests.test_methods_life import CLOSE, MODELS, adapted, trained
from tests.tiny import batch, make, output, shake

PREFIXES = {
    "reparametrised": fa.PrefixConfig(length=5, bottleneck=12),
    "flat": fa.PrefixConfig(length=5, flat=True),
    "gelu": fa.PrefixConfig(length=3, bottleneck=7, activation="gelu", leave_out=(1,)),
    "mam": fa.MAMConfig(fa.PrefixConfig(length=4, bottleneck=6), fa.ParallelConfig(bottleneck=8)),
}


def written_out(model, config):
    """The stock model with a self-attention that is the equation: K' = [P_K; K], V' = [P_V; V], mask 0 before."""
    plain = make(type(model))
    plain.requires_grad_(False)
    base = getattr(plain, plain.base_model_prefix)
    parts = model.fastadapt["a"].parts()
    prefix_config = config.prefix if isinstance(config, fa.MAMConfig) else config
    sigma = {"tanh": torch.tanh, "gelu": torch.nn.functional.gelu}[prefix_config.activation]

    def attention_for(module, part):
        def forward(hidden_states, attention_mask=None, *args, **kwargs):
            if part.prefix is None:
                control = model.fastadapt["a"].prefix_tuning
                p = sigma(control.wte.weight @ control.down.weight.T + control.down.bias) @ part.up.weight.T
                p_k, p_v = (p + part.up.bias).chunk(2, dim=-1)
            else:
                p_k, p_v = part.prefix
            rows, length, hidden = hidden_states.shape
            heads = module.num_attention_heads

            def split(t):
                return t.view(rows, -1, heads, hidden // heads).transpose(1, 2)

            k = split(torch.cat([p_k.expand(rows, -1, -1), module.key(hidden_states)], dim=1))
            v = split(torch.cat([p_v.expand(rows, -1, -1), module.value(hidden_states)], dim=1))
            scores = split(module.query(hidden_states)) @ k.transpose(-1, -2) / math.sqrt(hidden // heads)
            before = torch.zeros(rows, 1, 1, p_k.shape[0])
            mask = torch.zeros(rows, 1, 1, length)
            if attention_mask is not None:
                mask = attention_mask
                if mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
                mask = mask[:, :, :1]
            scores = scores + torch.cat([before, mask.expand(rows, 1, 1, length)], dim=-1)
            return (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, hidden), None

        return forward

    def output_for(module, site):
        def forward(hidden_states, input_tensor):
            f = module.dropout(module.dense(hidden_states))
            return module.LayerNorm(f + site.scale * site.up(torch.relu(site.down(input_tensor))) + input_tensor)

        return forward

    for path, part in parts.items():
        module = base.get_submodule(path)
        module.forward = (attention_for if path.endswith("self") else output_for)(module, part)
    plain.classifier = model.fastadapt["a"].head
    return plain


@pytest.mark.parametrize("how", ["fused", "attentions", "sdpa"])
@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", PREFIXES)
def test_equals_the_equation(method, model_class, how, monkeypatch):
    model = adapted(PREFIXES[method], model_class)
    plain = written_out(model, PREFIXES[method])
    inputs = batch(model, labels=True)
    if how == "attentions":
        model.config._attn_implementation = "eager"
        ours = model(**inputs, output_attentions=True)
        config = getattr(PREFIXES[method], "prefix", PREFIXES[method])
        lengths = [10 if i in config.leave_out else 10 + config.length for i in range(3)]
        assert [tuple(a.shape) for a in ours.attentions] == [(3, 4, 10, n) for n in lengths]
        for a in ours.attentions:
            torch.testing.assert_close(a.sum(-1), torch.ones(3, 4, 10))
            assert a[1, :, :, -4:].abs().max() < 1e-6, "padding is attended to"
    else:
        if how == "sdpa":  # what runs where the op has no kernel
            import fastadapt.modules.sublayers as sublayers

            monkeypatch.setattr(sublayers, "attention_runs_here", lambda device: False)
        ours = model(**inputs)
    theirs = plain(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(ours.loss, list(parameters.values()))
    wanted = torch.autograd.grad(theirs.loss, list(parameters.values()))
    for name, a, b in zip(parameters, got, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-6 + 1e-4 * float(b.abs().max()), msg=lambda m, n=name: n + m
        )


def test_positions_are_not_shifted_and_padding_changes_nothing():
    model = adapted(PREFIXES["reparametrised"])
    inputs = batch(model)
    padded = {key: torch.nn.functional.pad(t, (0, 5)) for key, t in inputs.items()}
    torch.testing.assert_close(output(model, **padded), output(model, **inputs), **CLOSE)
    longest = {"input_ids": torch.full((1, 40), 7)}  # as long as the positions go, prefix or not
    assert torch.isfinite(output(model, **longest)).all()


@pytest.mark.parametrize("method", ["reparametrised", "mam"])
def test_eject(method, tmp_path):
    model = adapted(PREFIXES[method])
    before = output(model)
    count = fa.parameter_report(model).tasks["a"].adapter
    assert fa.eject(model, "a") is model
    torch.testing.assert_close(output(model), before, rtol=1e-6, atol=1e-6)
    assert fa.parameter_report(model).tasks["a"].adapter < count
    assert not any("prefix_tuning" in key or ".up." in key for key in model.state_dict() if "attention.self" in key)
    assert "fastadapt.a.encoder.layer.0.attention.self.prefix" in trained(model)
    fa.eject(model)  # again: nothing to do
    fa.save(model, tmp_path / "a")
    again = fa.load(make(), tmp_path / "a")
    assert torch.equal(output(again), output(model))


def test_the_folded_prefix_follows_its_parameters():
    model = adapted(PREFIXES["reparametrised"])
    first = output(model)
    assert torch.equal(output(model), first)
    for change in (
        lambda p: p.data.mul_(1.5),  # what no version counter shows: refresh
        lambda p: p.mul_(1.5),
        lambda p: p.set_(torch.randn(p.shape)),
    ):
        with torch.no_grad():
            change(model.fastadapt["a"].prefix_tuning.wte.weight)
        fa.refresh(model)
        now = output(model)
        assert not torch.equal(now, first)
        first = now
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(**batch(model, labels=True)).loss.backward()
    optimizer.step()
    with fa.backend("reference"):
        expected = model(**batch(model)).logits.detach()  # with gradients nothing is folded
    torch.testing.assert_close(output(model), expected, **CLOSE)


def test_dropout_gives_every_row_its_own():
    config = fa.PrefixConfig(length=6, flat=True, dropout=0.5)
    model = adapted(config)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    model.train()
    inputs = {"input_ids": torch.full((4, 6), 9)}
    rows = model(**inputs).logits
    assert (rows[0] - rows[1]).abs().max() > 1e-4
    rows.sum().backward()
    assert model.fastadapt["a"].parts()["encoder.layer.0.attention.self"].prefix.grad.abs().sum() > 0
    model.eval()
    rows = model(**inputs).logits
    torch.testing.assert_close(rows[0], rows[1])


def test_switching_and_explaining():
    model = adapted(PREFIXES["flat"], name="a")
    fa.adapt(model, fa.PrefixConfig(length=2, flat=True), name="b")
    shake(model.fastadapt["b"])
    outputs = {name: output(fa.activate(model, name)) for name in ("a", "b", None)}
    torch.testing.assert_close(outputs[None], output(make()), **CLOSE)
    assert not torch.allclose(outputs["a"], outputs["b"], atol=1e-3)
    fa.activate(model, "a", skip_layers=[0])
    assert "fastadapt.a.encoder.layer.0.attention.self.prefix" not in trained(model)
    assert not torch.allclose(output(model), outputs["a"], atol=1e-4)
    assert {r.op for r in fa.explain(model).rows if r.path == "encoder.layer.1.attention.self"} == {
        "linear",
        "attention",
    }


def test_what_cannot_run_with_a_prefix_is_refused_in_words():
    model = adapted(PREFIXES["flat"])
    x = torch.randn(2, 4, 32)
    with pytest.raises(RuntimeError, match="prefix is active.*encoder_hidden_states"):
        model.bert.encoder.layer[0].attention.self(x, encoder_hidden_states=x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fa.PrefixConfig(length=0), ValueError, "length"),
        (lambda m: fa.PrefixConfig(length=2.5), TypeError, "length"),
        (lambda m: fa.PrefixConfig(bottleneck=0), ValueError, "bottleneck"),
        (lambda m: fa.PrefixConfig(activation="sine"), ValueError, "activation.*sine"),
        (lambda m: fa.PrefixConfig(activation=["tanh"]), ValueError, "activation: got"),
        (lambda m: fa.PrefixConfig(dropout=2), ValueError, "dropout"),
        (lambda m: fa.PrefixConfig(dropout=float("nan")), ValueError, "dropout: got nan"),
        (lambda m: fa.PrefixConfig(length=float("inf")), TypeError, "length: got inf"),
        (lambda m: fa.MAMConfig(fa.HoulsbyConfig()), TypeError, "prefix"),
        (lambda m: fa.MAMConfig(parallel=64), TypeError, "parallel"),
        (lambda m: fa.adapt(m, fa.PrefixConfig(length=41)), ValueError, "length.*41.*1 to 40"),
        (lambda m: fa.adapt(m, fa.PrefixConfig(leave_out=(7,))), ValueError, "leave_out.*0 to 2"),
        (lambda m: fa.eject(m), ValueError, "name"),
        (lambda m: fa.eject(fa.adapt(m, fa.HeadConfig()), "default"), ValueError, "HeadConfig.*no prefix"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (fa.PrefixConfig(), 9_872_384),
        (fa.PrefixConfig(flat=True), 552_960),
        (fa.MAMConfig(), 9_872_384 + 12 * (2 * 768 * 512 + 512 + 768)),
    ],
)
def test_parameter_counts_of_bert_base(config, count):
    with torch.device("meta"):
        model = BertModel(BertConfig())
    fa.adapt(model, config, name="a")
    assert fa.parameter_report(model).tasks["a"].adapter == count
