"""AdapterFusion against its equation and against AdapterHub's own, in inference and training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification

import fastadapt as fa
from tests.test_methods_life import CLOSE, MODELS, quiet, trained
from tests.tiny import batch, make, output, shake

NAMES = ("a", "b", "c")
SCALES = {"a": 1.0, "b": "learned", "c": 0.5}


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return model


def mixed(model_class=BertForSequenceClassification, activation="relu", scales=SCALES, **options):
    """A model with three adapters and their mix, every weight drawn wide."""
    options.setdefault("dropout", 0.0)
    model = make(model_class)
    for i, name in enumerate(NAMES):
        fa.adapt(model, fa.PfeifferConfig(bottleneck=6, activation=activation, scale=scales[name]), name=name)
        shake(model.fastadapt[name], 0.3, seed=i)
    fa.adapt(model, fa.FusionConfig(NAMES, **options), name="mix")
    shake(model.fastadapt["mix"], 0.1, seed=9)
    return without_dropout(model)


def written_out(model, config, scores=None):
    """The stock model whose outputs mix the adapters as the paper writes it, every a_n made; masks multiply scores."""
    plain = make(type(model), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain.requires_grad_(False)
    base = getattr(plain, plain.base_model_prefix)
    masks = iter(scores or [])

    def forward_for(module, part, sites):
        def forward(hidden_states, x):
            f = module.dense(hidden_states)
            u = module.LayerNorm(f + x)
            sigma = {"relu": F.relu, "gelu": F.gelu}[part.activation]
            a = torch.stack([s.scale * s.up(sigma(s.down(u))) for s in sites], dim=-2)  # [B, S, N, H]
            if config.mix == "attention":
                s = (part.query(u)[..., None, :] * part.key(a)).sum(-1)
                s = s * next(masks, 1.0)
                values = a if part.value is None else part.value(a)
                o = (torch.softmax(s, -1)[..., None] * values).sum(-2)
            else:
                weights = part.mix if part.mix is not None else torch.tensor(config.weights or [1 / 3] * 3)
                o = (weights[:, None] * a).sum(-2)
            return module.LayerNorm(o + f + x)

        return forward

    for path, part in model.fastadapt["mix"].parts().items():
        sites = [model.fastadapt[name].parts()[path] for name in config.adapters]
        module = base.get_submodule(path)
        module.forward = forward_for(module, part, sites)
    plain.classifier = model.fastadapt["mix"].head
    return plain


MIXES = {
    "attention": {},
    "no_value": {"value": False},
    "average": {"mix": "average"},
    "learned": {"mix": "weights"},
    "fixed": {"mix": "weights", "weights": (0.2, -0.5, 1.5)},
}


@pytest.mark.parametrize("train_adapters", [False, True], ids=["alone", "with_adapters"])
@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("mix", MIXES)
def test_equals_the_equation(mix, model_class, train_adapters):
    activation = "gelu" if model_class is MODELS[1] else "relu"
    model = mixed(model_class, activation, train_adapters=train_adapters, regularization=0.0, **MIXES[mix])
    config = model.fastadapt["mix"].config
    plain = written_out(model, config)
    inputs = batch(model, labels=True)
    wanted = output(plain, **inputs)
    torch.testing.assert_close(output(model, **inputs), wanted, **CLOSE)  # folded
    for m in (model, plain):
        m.train()
    ours, theirs = model(**inputs), plain(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tops = {n.split(".")[1] for n in parameters}
    assert tops == ({"mix", *NAMES} if train_adapters else {"mix"})
    assert not any(n.startswith(tuple(f"fastadapt.{name}.head" for name in NAMES)) for n in parameters)
    got = torch.autograd.grad(ours.loss, list(parameters.values()))
    expected = torch.autograd.grad(theirs.loss, list(parameters.values()))
    for name, a, b in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-6 + 2e-4 * float(b.abs().max()), msg=lambda m, n=name: n + m
        )


def test_dropout_acts_on_the_scores(monkeypatch):
    import fastadapt.modules.fusion as fusion

    model = mixed(dropout=0.5).train()
    masks, honest = [], fusion.ops.mix

    def recorded(sigma, t, count, *, dropout_p, **kwargs):
        seed = len(masks)
        ones = torch.ones(*sigma.shape[:-1], count)
        masks.append((fa.ops.drop(ones, dropout_p, seed=seed) != 0).float() * 2)
        return honest(sigma, t, count, dropout_p=dropout_p, seed=seed, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fusion.ops, "mix", recorded)
        ours = model(**batch(model)).logits
    assert len(masks) == 3 and masks[0].shape == (3, 10, 3)
    plain = written_out(model, model.fastadapt["mix"].config, masks).train()
    torch.testing.assert_close(ours, plain(**batch(model)).logits, **CLOSE)
    # b_k counts once scores are dropped, and cancels where they are not.
    before = output(model.eval())
    with torch.no_grad():
        for part in model.fastadapt["mix"].parts().values():
            part.key.bias.add_(1.0)
    torch.testing.assert_close(output(model), before, **CLOSE)


def test_the_regulariser_joins_the_loss():
    model = mixed(regularization=0.05).train()
    inputs = batch(model, labels=True)
    out = model(**inputs)
    weights = [part.value.weight for part in model.fastadapt["mix"].parts().values()]
    penalty = 0.05 * sum((torch.eye(32) - w).square().sum() for w in weights)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, inputs["labels"]) + penalty)
    torch.testing.assert_close(fa.auxiliary_loss(model), penalty)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, F.cross_entropy(out.logits, inputs["labels"]))
    fresh = make()
    for name in "ab":
        fa.adapt(fresh, fa.PfeifferConfig(bottleneck=4), name=name)
    fa.adapt(fresh, fa.FusionConfig(["a", "b"]), name="f")
    assert fa.auxiliary_loss(fresh).item() == 0.0, "W_v starts at the identity"


def test_what_is_folded_follows_every_parameter():
    model = mixed()
    last = output(model)
    for key in ("fastadapt.a.encoder.layer.1.output.up.weight", "fastadapt.b.encoder.layer.1.output.scale",
                "fastadapt.c.encoder.layer.2.output.down.bias", "fastadapt.mix.encoder.layer.0.output.query.weight",
                "fastadapt.mix.encoder.layer.0.output.value.weight"):  # fmt: skip
        with torch.no_grad():
            model.get_parameter(key).mul_(1.7)
        now = output(model)
        assert (now - last).abs().max() > 1e-5, key
        torch.testing.assert_close(now, output(written_out(model, model.fastadapt["mix"].config)), **CLOSE)
        last = now
    model.load_state_dict({k: t * 1.1 for k, t in model.state_dict().items()})
    assert not torch.allclose(output(model), last)


def test_a_life(tmp_path):
    model = make()
    classes, stock = [type(m) for m in model.modules()], output(model)
    model = mixed()
    expected = output(model)
    adapters = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("fastadapt.mix")}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), expected)
        with torch.no_grad():
            other.fastadapt["a"].parts()["encoder.layer.0.output"].up.weight.mul_(3.0)
        assert not torch.allclose(output(other), expected, atol=1e-4), "a copy mixes the adapters of its own"
        assert torch.equal(output(model), expected)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**batch(model, labels=True)).loss.backward()
    optimizer.step()
    model.eval()
    assert all(torch.equal(p, adapters[n]) for n, p in model.named_parameters() if n in adapters)
    assert not torch.allclose(output(model), expected, atol=1e-4)
    with pytest.raises(ValueError, match="'a', which 'mix' mixes"):
        fa.remove(model, "a")
    fa.activate(model, "mix", skip_layers=[0, 1])
    assert {n.split(".")[4] for n in trained(model) if "encoder" in n} == {"2"}
    fa.activate(model, "a")
    assert {n.split(".")[1] for n in trained(model)} == {"a"}
    fa.remove(model, "mix")
    fa.remove(model, "a")
    fa.activate(model, None)
    torch.testing.assert_close(output(model), stock, **CLOSE)
    fa.unload(model)
    assert [type(m) for m in model.modules()] == classes and torch.equal(output(model), stock)


@pytest.mark.parametrize("mix", MIXES)
def test_save_and_load(mix, tmp_path):
    model = mixed(dropout=None, **MIXES[mix])
    before = output(model)
    for name in (*NAMES, "mix"):
        quiet(fa.save, model, tmp_path / name, name=name)
    assert (tmp_path / "mix" / "adapter_fusion_config.json").is_file() == ("mix" not in MIXES[mix])
    again = make()
    for name in (*NAMES, "mix"):
        fa.load(again, tmp_path / name, name=name)
    assert torch.equal(output(again), before)
    with pytest.raises(ValueError, match="adapters.*'a'.*known are none"):
        fa.load(make(), tmp_path / "mix")


def test_bfloat16_and_the_reference():
    model = mixed()
    with fa.backend("reference"):
        expected = output(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(output(model).float(), expected, rtol=0.1, atol=0.1)
        model(**batch(model, labels=True)).loss.backward()
    torch.testing.assert_close(output(model.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


def test_explain_names_the_products():
    rows = [r.op for r in fa.explain(mixed()).rows if r.path == "encoder.layer.1.output"]
    assert rows == ["linear", "add_norm", "linear", "linear", "mix", "linear", "add_norm"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"adapters": [["a"], ["b"]]}, ValueError, "adapters: got .*accepted are two different names"),
        ({"adapters": None}, TypeError, "adapters: got None; accepted is"),
        ({"mix": "weights", "weights": 3}, TypeError, "weights: got 3; accepted are None and 2 numbers"),
        ({"mix": "weights", "weights": (NAN, 1)}, ValueError, r"weights\[0\]: got nan; accepted is a finite number"),
        ({"mix": "weights", "weights": (1, -INF)}, ValueError, r"weights\[1\]: got -inf; accepted is a finite number"),
        ({"mix": "weights", "weights": (1, 10**400)}, ValueError, r"weights\[1\]: got 1000.*a finite number"),
        ({"mix": "weights", "weights": (1, "2")}, TypeError, r"weights\[1\]: got '2'; accepted is a finite number"),
        ({"dropout": NAN}, ValueError, "dropout: got nan; accepted are None and a probability"),
        ({"regularization": NAN}, ValueError, "regularization: got nan; accepted is a finite number of at least 0"),
        ({"regularization": INF}, ValueError, "regularization: got inf; accepted is a finite number of at least 0"),
        ({"regularization": -0.1}, ValueError, "regularization: got -0.1; accepted is a finite number of at least 0"),
        ({"regularization": "1"}, TypeError, "regularization: got '1'; accepted is a finite number of at least 0"),
    ],
)
def test_bad_configurations(fields, error, message):
    with pytest.raises(error, match=message):
        fa.FusionConfig(**{"adapters": ["a", "b"], **fields})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fa.FusionConfig("ab"), TypeError, "adapters"),
        (lambda m: fa.FusionConfig(["a"]), ValueError, "adapters.*two"),
        (lambda m: fa.FusionConfig(["a", "a"]), ValueError, "adapters"),
        (lambda m: fa.FusionConfig(["a", "b"], mix="sum"), ValueError, "mix.*average"),
        (lambda m: fa.FusionConfig(["a", "b"], weights=(1, 2)), ValueError, "weights"),
        (lambda m: fa.FusionConfig(["a", "b"], mix="weights", weights=(1,)), ValueError, "weights.*2 numbers"),
        (lambda m: fa.adapt(m, fa.FusionConfig(["a", "x"])), ValueError, "adapters.*'x'.*'a'"),
        (lambda m: fa.adapt(m, fa.FusionConfig(["a", "wide"])), ValueError, "width 6.*'wide' has 7"),
        (lambda m: fa.adapt(m, fa.FusionConfig(["a", "gelu"])), ValueError, "activation 'relu'.*'gelu'"),
        (lambda m: fa.adapt(m, fa.FusionConfig(["a", "houlsby"])), ValueError, "'houlsby' has placements"),
        (lambda m: fa.adapt(m, fa.FusionConfig(["a", "bias"])), ValueError, "'bias' is of a BitFitConfig"),
        (lambda m: fa.adapt(m, fa.FusionConfig(["a", "some"])), ValueError, "'some' lies in other layers"),
    ],
)
def test_bad_input(call, error, message):
    model = mixed()
    fa.adapt(model, fa.PfeifferConfig(bottleneck=7), name="wide")
    fa.adapt(model, fa.PfeifferConfig(bottleneck=6, activation="gelu"), name="gelu")
    fa.adapt(model, fa.HoulsbyConfig(bottleneck=6), name="houlsby")
    fa.adapt(model, fa.BitFitConfig(), name="bias")
    fa.adapt(model, fa.PfeifferConfig(bottleneck=6, leave_out=(0,)), name="some")
    before, logits = fa.adaptations(model), output(model)
    with pytest.raises(error, match=message):
        call(model)
    assert fa.adaptations(model) == before and torch.equal(output(model), logits)


# -- the peer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("value", [True, False], ids=["dynamic", "static"])
def test_equals_adapterhub(value, training, tmp_path):
    adapters = pytest.importorskip("adapters")
    ours = mixed(scales={"a": 1.0, "b": 2.0, "c": 0.5}, dropout=None, value=value)
    for name in (*NAMES, "mix"):
        quiet(fa.save, ours, tmp_path / name, name=name)
    theirs = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    adapters.init(theirs)
    for name in NAMES:
        theirs.load_adapter(str(tmp_path / name), use_safetensors=True, with_head=False)
    theirs.load_adapter_fusion(str(tmp_path / "mix"), set_active=True, use_safetensors=True, with_head=False)
    theirs.train_adapter_fusion(adapters.Fuse(*NAMES))
    with torch.no_grad():
        theirs.classifier.load_state_dict(ours.fastadapt["mix"].head.state_dict())
    fusion = ours.fastadapt["mix"]
    for part in fusion.parts().values():
        part.dropout = 0.0  # the two libraries draw differently
    inputs = batch(ours, labels=True)
    for m in (ours, theirs):
        m.train(training)
    mine, wanted = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(mine.logits, wanted.logits, **CLOSE)
    if not training:
        torch.testing.assert_close(output(ours), wanted.logits, **CLOSE)
        return
    loss = wanted.loss
    if value:
        regulariser = theirs.base_model.get_fusion_regularization_loss()
        torch.testing.assert_close(fa.auxiliary_loss(ours), regulariser)
        loss = loss + regulariser
    torch.testing.assert_close(mine.loss, loss)
    mine.loss.backward()
    loss.backward()
    for path, part in fusion.parts().items():
        layer = theirs.bert.get_submodule(path).adapter_fusion_layer["a,b,c"]
        for key, p in part.named_parameters():
            other = layer.get_parameter(key).grad
            torch.testing.assert_close(p.grad, other, rtol=1e-4, atol=1e-6 + 2e-4 * float(other.abs().max()))
