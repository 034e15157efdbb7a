"""BitFit, LayerNorm-only and head-only tuning against a plain model whose own parameters are the changed ones."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel, ElectraForSequenceClassification

import fastadapt as fa
from fastadapt import dispatch
from tests.test_methods_life import CLOSE, MODELS, adapted
from tests.tiny import batch, make, output, shake

TERMS = {
    "query": "attention.self.query.bias",
    "key": "attention.self.key.bias",
    "value": "attention.self.value.bias",
    "attention_output": "attention.output.dense.bias",
    "attention_layer_norm": "attention.output.LayerNorm.bias",
    "intermediate": "intermediate.dense.bias",
    "output": ".output.dense.bias",
    "output_layer_norm": ".output.LayerNorm.bias",
    "embeddings_layer_norm": "embeddings.LayerNorm.bias",
    "pooler": "pooler.dense.bias",
    "embeddings_project": "embeddings_project.bias",
}


def written_out(model):
    """A plain model with the adaptation's values in the places of the base's own, nothing else requiring a gradient."""
    plain = make(type(model))
    plain.requires_grad_(False)
    names = {}
    for key, p in model.fastadapt["a"].named_parameters():
        name = key.replace("head.", "classifier.", 1) if key.startswith("head.") else f"{plain.base_model_prefix}.{key}"
        target = plain.get_parameter(name)
        with torch.no_grad():
            target.copy_(p)
        target.requires_grad_(True)
        names[key] = name
    return plain, names


CONFIGS = [fa.BitFitConfig(), fa.BitFitConfig(("query", "intermediate")), fa.LayerNormConfig("all"),
           fa.LayerNormConfig(), fa.HeadConfig()]  # fmt: skip


@pytest.mark.parametrize("attention", [False, True], ids=["fused", "attentions"])
@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_equals_a_model_with_these_parameters(config, model_class, attention):
    model = adapted(config, model_class)
    plain, names = written_out(model)
    inputs = {**batch(model, labels=True), "output_attentions": attention}
    if attention:
        for m in (model, plain):
            m.config._attn_implementation = "eager"
    ours, theirs = model(**inputs), plain(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    ours.loss.backward()
    theirs.loss.backward()
    for key, name in names.items():
        wanted = plain.get_parameter(name).grad
        got = model.fastadapt["a"].get_parameter(key).grad
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 + 1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("model_class", [*MODELS, BertModel], ids=lambda c: c.__name__)
def test_all_is_every_bias(model_class):
    model = make(model_class)
    base = getattr(model, model.base_model_prefix, model)
    biases = {name for name, _ in base.named_parameters() if name.endswith("bias")}
    fa.adapt(model, fa.BitFitConfig(), name="a")
    assert {key for key, _ in model.fastadapt["a"].named_parameters() if not key.startswith("head.")} == biases


@pytest.mark.parametrize("term", TERMS)
def test_each_term(term):
    model = make(ElectraForSequenceClassification if term == "embeddings_project" else MODELS[0], embedding_size=16)
    stock = output(model)
    fa.adapt(model, fa.BitFitConfig(term), name="a")
    keys = [key for key, _ in model.fastadapt["a"].named_parameters() if not key.startswith("head.")]
    assert keys and all(key.endswith(TERMS[term]) for key in keys)
    if term == "output":
        assert not any("attention" in key for key in keys)
    torch.testing.assert_close(output(model), stock, **CLOSE)
    with torch.no_grad():
        for key in keys:
            model.fastadapt["a"].get_parameter(key).add_(
                torch.linspace(-1, 1, model.fastadapt["a"].get_parameter(key).numel())
            )
    changed = output(model)
    if term == "key":  # a constant in every score of a query: softmax does not see it
        torch.testing.assert_close(changed, stock, rtol=1e-4, atol=1e-4)
    else:
        assert (changed - stock).abs().max() > 1e-3


def test_switching_packs_no_weight_and_gives_each_its_own():
    model = adapted(fa.BitFitConfig(), name="a")
    fa.adapt(model, fa.BitFitConfig(), name="b")
    shake(model.fastadapt["b"], seed=9)
    outputs = {name: output(fa.activate(model, name)) for name in ("a", "b", None)}
    versions = {n: (p._version, p.data_ptr()) for n, p in model.named_parameters()}
    for name in ("b", None, "a", "b"):
        assert torch.equal(output(fa.activate(model, name)), outputs[name])
    assert {n: (p._version, p.data_ptr()) for n, p in model.named_parameters()} == versions
    assert not torch.allclose(outputs["a"], outputs["b"], atol=1e-3)
    if isinstance(dispatch.load("cpu"), str):
        return
    # A write that moves no version counter: it shows only where a weight is packed anew.
    model.bert.encoder.layer[0].intermediate.dense.weight.data.mul_(2)
    for name in ("a", None, "b"):
        assert torch.equal(output(fa.activate(model, name)), outputs[name])
    fa.refresh(model)
    assert not torch.allclose(output(model), outputs["b"], atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fa.BitFitConfig("bias"), ValueError, "terms.*'bias'.*query"),
        (lambda m: fa.BitFitConfig(()), ValueError, "terms"),
        (lambda m: fa.BitFitConfig(("query", "query")), ValueError, "terms.*once"),
        (lambda m: fa.BitFitConfig(3), TypeError, "terms"),
        (lambda m: fa.BitFitConfig(terms=[[1]]), ValueError, r"terms: got \[\[1\]\]; accepted are 'all' or"),
        (lambda m: fa.BitFitConfig(None), TypeError, "terms: got None; accepted are 'all' or"),
        (lambda m: fa.LayerNormConfig("none"), ValueError, "layer_norms"),
        (lambda m: fa.adapt(m, fa.BitFitConfig("embeddings_project")), ValueError, "terms.*no bias at embeddings_proj"),
        (lambda m: fa.adapt(m.bert, fa.HeadConfig()), ValueError, "config.*no head"),
    ],
)
def test_bad_input(call, error, message):
    model = make()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        call(model)
    assert not fa.adaptations(model) and list(model.state_dict()) == list(before)


def test_no_peer_has_a_format(tmp_path):
    model = adapted(fa.BitFitConfig())
    with pytest.warns(UserWarning, match="no other library"):
        fa.save(model, tmp_path / "a")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "fastadapt.json", "fastadapt.safetensors", "head_config.json", "model_head.safetensors",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="format.*BitFitConfig"):
        fa.save(model, tmp_path / "b", format="adapterhub")
    assert not (tmp_path / "b").exists()
