"""What every method has to do alike: a life on a model, copies, files, counts."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
)

import fastadapt as fa
from tests.tiny import batch, make, output, shake

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
CONFIGS = {
    "bitfit": fa.BitFitConfig(),
    "bitfit_some": fa.BitFitConfig(("query", "intermediate", "output_layer_norm")),
    "layer_norm": fa.LayerNormConfig(),
    "layer_norm_all": fa.LayerNormConfig("all"),
    "head": fa.HeadConfig(),
    "masked": fa.MaskedAdapterConfig(bottleneck=8),
    "drop": fa.HoulsbyConfig(bottleneck=8, drop=fa.AdapterDrop("independent", p=0.3)),
    "prefix": fa.PrefixConfig(length=5, bottleneck=12),
    "prefix_flat": fa.PrefixConfig(length=3, flat=True, leave_out=(1,)),
    "mam": fa.MAMConfig(fa.PrefixConfig(length=4, bottleneck=6), fa.ParallelConfig(bottleneck=8)),
}
MODELS = (BertForSequenceClassification, RobertaForSequenceClassification, ElectraForSequenceClassification)


def adapted(config, model_class=BertForSequenceClassification, name: str = "a", std: float = 0.1):
    model = fa.adapt(make(model_class), config, name=name)
    shake(model.fastadapt[name], std)
    return model


def quiet(call, *args, **kwargs):
    """Saving tells what no peer can read; here that is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **kwargs)


def trained(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_life(method, model_class):
    model = make(model_class)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    classes, stock = [type(m) for m in model.modules()], output(model)
    fa.adapt(model, CONFIGS[method], name="a")
    ours = {n for n, _ in model.named_parameters() if n.startswith("fastadapt.a.")}
    assert trained(model) == ours != set()

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(**batch(model, labels=True))
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(grads) <= ours and all(torch.isfinite(g).all() for g in grads.values())
        optimizer.step()
    model.eval()
    changed = output(model)
    assert (changed - stock).abs().max() > 1e-3
    after = model.state_dict()
    assert all(torch.equal(after[key], t) for key, t in state.items())

    fa.activate(model, None)
    assert not trained(model)
    torch.testing.assert_close(output(model), stock, **CLOSE)
    fa.activate(model, "a")
    torch.testing.assert_close(output(model), changed, rtol=0, atol=0)
    fa.adapt(model, fa.PfeifferConfig(bottleneck=4), name="b")
    assert all(n.startswith("fastadapt.b.") for n in trained(model))
    fa.activate(model, "a")
    assert torch.equal(output(model), changed) and trained(model) == ours
    fa.remove(model, "a")
    torch.testing.assert_close(output(model), stock, **CLOSE)
    fa.unload(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(output(model), stock)
    assert not any("active" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", CONFIGS)
def test_copies_and_pickles(method):
    model = adapted(CONFIGS[method])
    expected = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), expected)
        shake(other.fastadapt, seed=5)
        assert not torch.allclose(output(other), expected, atol=1e-4)
        assert torch.equal(output(model), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_state_dict_round_trip(method):
    model = adapted(CONFIGS[method])
    other = fa.adapt(make(seed=3), CONFIGS[method], name="a")
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize("model_class", [*MODELS, BertModel], ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", CONFIGS)
def test_save_and_load(method, model_class, tmp_path):
    if model_class is BertModel and method == "head":
        pytest.skip("there is no head")
    model = adapted(CONFIGS[method], model_class)
    quiet(fa.save, model, tmp_path / "a")
    again = fa.load(make(model_class), tmp_path / "a", name="other")
    assert torch.equal(output(again), output(model))
    if method != "mam":  # AdapterHub's files do not tell presets apart
        assert again.fastadapt["other"].config == model.fastadapt["a"].config
    assert not trained(again)
    training = quiet(fa.load, make(model_class), tmp_path / "a", trainable=True)
    assert fa.adaptations(training) == ["a"] and trained(training) == trained(model)


@pytest.mark.parametrize("method", CONFIGS)
def test_bfloat16_and_the_reference(method):
    model = adapted(CONFIGS[method])
    with fa.backend("reference"):
        expected = output(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    torch.testing.assert_close(output(model.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


@pytest.fixture(scope="module")
def bert_base() -> BertModel:
    with torch.device("meta"):
        return BertModel(BertConfig())


@pytest.mark.parametrize(
    ("config", "count", "norms"),
    [
        (fa.BitFitConfig(), 102_912, 0),
        (fa.BitFitConfig(("query", "intermediate")), 46_080, 0),
        (fa.LayerNormConfig(), 0, 12 * 2 * 2 * 768),
        (fa.LayerNormConfig("all"), 0, 25 * 2 * 768),
    ],
)
def test_parameter_counts_of_bert_base(bert_base, config, count, norms):
    fa.adapt(bert_base, config, name="a")
    report = fa.parameter_report(bert_base)
    fa.unload(bert_base)
    task = report.tasks["a"]
    assert (task.adapter, task.layer_norm, task.head) == (count, norms, 0)
    assert report.trained == count + norms
