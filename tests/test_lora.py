"""LoRA on a model: equal to its equation on every path, summed, counted, refused where it cannot be; LoRALinear."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForMaskedLM, BertModel, ElectraForSequenceClassification

import fastadapt as fa
from fastadapt import ops
from fastadapt.modules.linear import FusedLinear
from tests.test_adapt import assert_same, bert_base, snapshot, steps, trained
from tests.test_wiring import V5, reasons
from tests.tiny import ALL, METHODS, SEQUENCE, batch, make, output, shake

__all__ = ["bert_base"]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SIX = ("query", "key", "value", "attention_output", "intermediate", "output")
KINDS = {
    "two": fa.LoRAConfig(r=4),
    "six": fa.LoRAConfig(r=3, alpha=5, targets=SIX, bias="lora_only"),
    "rslora": fa.LoRAConfig(r=4, targets=("key", "output"), rslora=True, init="gaussian"),
    "dora": fa.LoRAConfig(r=4, targets=SIX, dora=True),
    "some": fa.LoRAConfig(r=2, targets=("encoder.layer.1.attention.self.key", "intermediate"), rank_pattern={"key": 5}),
}
by_name = {"ids": lambda c: c.__name__}


def written_out(model: nn.Module, adapted: nn.Module, names: tuple[str, ...] = ("a",)) -> nn.Module:
    """``model`` with the LoRAs of ``adapted`` in plain PyTorch."""
    base = getattr(model, model.base_model_prefix, model)
    forwards = {}
    for name in names:
        for path, part in adapted.fastadapt[name].parts().items():
            forwards.setdefault(path, []).append(part)

    def forward_for(linear: nn.Linear, parts):
        def forward(x):
            bias = next((part.bias for part in parts if part.bias is not None), linear.bias)
            weight = linear.weight
            for part in parts:
                weight = weight + part.scale * part.lora_B.weight @ part.lora_A.weight
            if parts[0].lora_magnitude_vector is not None:
                weight = weight * (parts[0].lora_magnitude_vector / weight.detach().norm(dim=1)).unsqueeze(1)
            return F.linear(x, weight, bias)

        return forward

    for path, parts in forwards.items():
        base.get_submodule(path).forward = forward_for(base.get_submodule(path), parts)
    if "classifier" in model._modules:
        model.classifier = adapted.fastadapt[names[0]].head
    return model


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, inputs) -> None:
    wanted = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert wanted
    a, b = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(a.logits, b.logits, **CLOSE)
    grads = torch.autograd.grad(a.loss, list(wanted.values()))
    for name, x, y in zip(wanted, grads, torch.autograd.grad(b.loss, list(wanted.values())), strict=True):
        assert y.abs().max() > 0, name
        torch.testing.assert_close(
            x, y, rtol=1e-4, atol=1e-6 + 1e-4 * float(y.abs().max()), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_class", SEQUENCE, **by_name)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_equation(model_class, kind, attention):
    if attention == "sdpa" and not V5 and model_class is ElectraForSequenceClassification:
        pytest.skip("transformers 4 has no such ELECTRA")
    model = fa.adapt(make(model_class, attn_implementation=attention), KINDS[kind], name="a")
    torch.testing.assert_close(output(model), output(make(model_class, attn_implementation=attention)), **CLOSE)
    shake(model.fastadapt)
    assert not reasons(model)
    reference = make(model_class, attn_implementation=attention).requires_grad_(False)
    assert_same_gradients(model, written_out(reference, model), batch(model, labels=True))


def _hooked(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(lambda m, a, out: None)
    return {}


def _base_trains(model):
    for name, p in model.named_parameters():
        if not name.startswith("fastadapt."):
            p.requires_grad_(True)
    return {}


def _attentions(model):
    return {"output_attentions": True}


@pytest.mark.parametrize("kind", ["six", "dora"])
@pytest.mark.parametrize("refuse", [_hooked, _base_trains, _attentions])
def test_runs_where_the_fused_forward_is_refused(refuse, kind):
    """The original forward calls the children: they have to add what is active."""
    model = fa.adapt(make(attn_implementation="eager"), KINDS[kind], name="a")
    shake(model.fastadapt)
    reference = written_out(make(attn_implementation="eager"), model).requires_grad_(False)
    for p in model.fastadapt.parameters():
        p.requires_grad_(True)
    inputs = {**batch(model, labels=True), **refuse(model)}
    plain = {key: t for key, t in inputs.items() if key != "output_attentions"}
    out, wanted = model(**inputs), reference(**plain)
    torch.testing.assert_close(out.logits, wanted.logits, **CLOSE)
    ours = {n: p for n, p in model.named_parameters() if n.startswith("fastadapt.") and p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(ours.values()))
    for name, x, y in zip(ours, grads, torch.autograd.grad(wanted.loss, list(ours.values())), strict=True):
        torch.testing.assert_close(
            x, y, rtol=1e-4, atol=1e-6 + 1e-4 * float(y.abs().max()), msg=lambda m, n=name: n + m
        )
    if "output_attentions" in inputs:
        assert len(out.attentions) == 3


def test_a_layer_that_changes_under_an_active_lora_raises():
    model = fa.adapt(make(), KINDS["two"], name="a")

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    query = model.bert.encoder.layer[1].attention.self.query
    query.__class__ = Doubled
    with pytest.raises(RuntimeError, match="query has become a Doubled"):
        model(**batch(model))
    query.__class__ = FusedLinear
    query.forward = lambda x: x
    with pytest.raises(RuntimeError, match="forward of query is patched"):
        model(**batch(model))
    del query.forward
    model(**batch(model))


def test_one_op_call_a_sublayer(monkeypatch):
    from fastadapt.modules import project

    calls = []
    true = ops.linear
    monkeypatch.setattr(
        project.ops, "linear",
        lambda x, w, *a, loras=(), **k: calls.append((len(w), len(loras))) or true(x, w, *a, loras=loras, **k),
    )  # fmt: skip
    model = fa.adapt(make(BertModel), fa.LoRAConfig(targets=SIX), name="a")
    output(model)
    assert calls == [(3, 3), (1, 1), (1, 1), (1, 1)] * 3


@pytest.mark.parametrize("model_class", ALL, **by_name)
@pytest.mark.parametrize("kind", ["six", "dora"])
def test_a_life(model_class, kind):
    model = make(model_class)
    before, stock = snapshot(model), output(model)
    fa.adapt(model, KINDS[kind], name="a")
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith("fastadapt.a.")}
    torch.testing.assert_close(output(model), stock, **CLOSE)
    steps(model)
    changed = output(model)
    assert not torch.allclose(changed, stock, atol=1e-3)
    state = model.state_dict()
    assert all(torch.equal(state[key], t) for key, t in before[1].items())
    fa.activate(model, None)
    assert not trained(model)
    torch.testing.assert_close(output(model), stock, **CLOSE)
    assert not any(type(m) is FusedLinear for m in model.modules())
    fa.activate(model, "a")
    assert torch.equal(output(model), changed)
    fa.adapt(model, METHODS["houlsby"], name="b")
    fa.activate(model, "a")
    assert torch.equal(output(model), changed)
    fa.remove(fa.remove(model, "a"), "b")
    fa.unload(model)
    assert_same(snapshot(model), before)
    assert torch.equal(output(model), stock)


def test_the_pooler_takes_one():
    model = fa.adapt(make(), fa.LoRAConfig(r=4, targets=("query", "pooler.dense")), name="a")
    shake(model.fastadapt)
    reference = make().requires_grad_(False)
    assert_same_gradients(model, written_out(reference, model), batch(model, labels=True))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_each_target(dora):
    """The masks are those of the seeds drawn, one a target; with p = 1 nothing of A and B is left."""
    config = fa.LoRAConfig(r=4, targets=("query", "key"), dropout=0.5, dora=dora)
    model = fa.adapt(make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), config, name="a")
    shake(model.fastadapt)
    calm = output(model)
    model.train()
    torch.manual_seed(0)
    first = output(model)
    assert not torch.equal(output(model), first) and not torch.allclose(first, calm, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(output(model), first)
    out = model(**batch(model, labels=True))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)
    for part in model.fastadapt["a"].parts().values():
        part.dropout = 1.0
    if not dora:
        gone = output(model.eval())
        for part in model.fastadapt["a"].parts().values():
            nn.init.zeros_(part.lora_B.weight)
        model.train()
        torch.testing.assert_close(output(model), output(model.eval()), **CLOSE)
        assert not torch.allclose(gone, output(model), atol=1e-4)


def test_dora_under_dropout_is_its_equation():
    """y = Wx + b + (g - 1) W d + g s BA d with one mask d for both."""
    from fastadapt.modules.lora import LoRA
    from fastadapt.modules.project import project
    from fastadapt.ops.dropout import dropout

    torch.manual_seed(0)
    linear, x = nn.Linear(16, 24), torch.randn(5, 16, requires_grad=True)
    linear.requires_grad_(False)
    part = LoRA(linear, 4, 0.7, dropout=0.4, dora=True)
    shake(part)
    from fastadapt.modules.active import Active

    active = Active(loras={"dense": [part]})
    torch.manual_seed(3)
    y = project(x, {"dense": linear}, active, activation="relu")
    torch.manual_seed(3)
    d = dropout(x, 0.4, torch.randint(0, 2**62, (), dtype=torch.int64))
    update = part.scale * part.lora_B.weight @ part.lora_A.weight
    g = part.lora_magnitude_vector / (linear.weight + update).detach().norm(dim=1)
    wanted = linear(x) + (g - 1) * F.linear(d, linear.weight) + g * F.linear(d, update)
    torch.testing.assert_close(y, wanted.relu())
    inputs = [x, *part.parameters()]
    weight = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, weight), torch.autograd.grad(wanted.relu(), inputs, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind, dtype):
    model = fa.adapt(make(), KINDS[kind], name="a")
    shake(model.fastadapt)
    wanted = output(written_out(make().double(), copy.deepcopy(model).double()))
    model.to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(output(model).double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    again = fa.adapt(make().to(dtype), KINDS[kind], name="a")
    assert all(p.dtype == dtype for p in again.fastadapt.parameters())


@pytest.mark.parametrize("kind", ["six", "dora"])
def test_autocast(kind):
    model = fa.adapt(make(), KINDS[kind], name="a")
    shake(model.fastadapt)
    inputs = batch(model, labels=True)
    wanted = model(**inputs).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.float(), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


def test_gradients_only_where_something_trains():
    model = fa.adapt(make(), fa.LoRAConfig(targets=("encoder.layer.2.attention.self.query",)), name="a").train()
    needs = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(
            lambda m, a, out: needs.append((out if isinstance(out, torch.Tensor) else out[0]).requires_grad)
        )
    model(**batch(model))
    assert needs == [False, False, True]


# -- several -----------------------------------------------------------------------------------------------------


def test_a_list_runs_the_sum():
    model = make()
    for i, (name, config) in enumerate(
        {"a": fa.LoRAConfig(r=4, bias="lora_only"), "b": fa.LoRAConfig(r=2, targets=("value", "output"))}.items()
    ):
        fa.adapt(model, config, name=name, head=3 + i)
        shake(model.fastadapt[name], seed=i)
    alone = output(fa.activate(model, "a"))
    assert fa.activate(model, ["a", "b"]) is model
    both = output(model)
    assert both.shape == (3, 3) and not torch.allclose(both, alone, atol=1e-3)
    torch.testing.assert_close(both, output(written_out(make(), model, ("a", "b"))), **CLOSE)
    expected = {n for n, _ in model.named_parameters() if n.startswith("fastadapt.")}
    assert trained(model) == {n for n in expected if not n.startswith("fastadapt.b.head")}
    assert "active adaptation: a + b" in str(fa.explain(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), both)
    assert output(fa.activate(model, ("b", "a"))).shape == (3, 4)
    fa.activate(model, ["a", "b"], skip_layers=[1])
    assert not any(".layer.1." in n for n in trained(model)) and not torch.equal(output(model), both)
    fa.activate(model, ["a"])
    assert torch.equal(output(model), alone)
    fa.activate(model, ["a", "b"])
    fa.remove(model, "b")
    torch.testing.assert_close(output(model), output(make()), **CLOSE)
    assert not trained(model)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "h"], TypeError, "'h' is a HoulsbyConfig's.*FusionConfig"),
        (["h"], TypeError, "FusionConfig"),
        (["a", "d"], ValueError, "'d' is a DoRA"),
        (["a", "x"], ValueError, "name: got 'x'; known are"),
        ([], ValueError, "name"),
        (["a", "a"], ValueError, "different"),
        ({"a", "b"}, TypeError, "a list"),
        (["b", "c"], ValueError, "own biases"),
        (3, ValueError, "name: got 3"),
    ],
)
def test_lists_that_have_no_sum(names, error, message):
    model = make()
    fa.adapt(model, METHODS["houlsby"], name="h")
    fa.adapt(model, KINDS["dora"], name="d")
    for name in ("b", "c"):
        fa.adapt(model, fa.LoRAConfig(bias="lora_only"), name=name)
    fa.adapt(model, KINDS["two"], name="a")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fa.activate(model, names)
    assert_same(snapshot(model), before)


def test_skipped_layers():
    model = fa.adapt(make(), fa.LoRAConfig(r=4, targets=SIX), name="a")
    shake(model.fastadapt)
    fa.activate(model, "a", skip_layers=[0, 2])
    assert all(".layer.1." in n or ".head." in n for n in trained(model)) and trained(model)
    reference = written_out(make(), model)
    for i in (0, 2):
        for module in reference.bert.encoder.layer[i].modules():
            module.__dict__.pop("forward", None)
    torch.testing.assert_close(output(model), output(reference), **CLOSE)


# -- counts, copies, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (fa.LoRAConfig(), 294_912),
        (fa.LoRAConfig(targets=("query", "key")), 294_912),
        (fa.LoRAConfig(r=1, targets=("intermediate",)), 12 * (768 + 3072)),
        (fa.LoRAConfig(targets=SIX), 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072))),
        (fa.LoRAConfig(dora=True), 294_912 + 24 * 768),
        (fa.LoRAConfig(bias="lora_only"), 294_912 + 24 * 768),
        (fa.LoRAConfig(rank_pattern={"value": 16}), 294_912 * 3 // 2),
    ],
)
def test_parameter_counts_of_bert_base(bert_base, config, count):
    fa.adapt(bert_base, config, name="a")
    report = fa.parameter_report(bert_base)
    fa.unload(bert_base)
    assert (report.tasks["a"].total, report.trained) == (count, count)


def test_initialisation_and_scale():
    model = fa.adapt(make(hidden_size=128), fa.LoRAConfig(r=16, alpha=8), name="k")
    fa.adapt(model, fa.LoRAConfig(r=16, alpha=8, init="gaussian", rslora=True, dora=True), name="g")
    fa.adapt(model, fa.LoRAConfig(rank_pattern={r".*layer\.[01]\..*query": 2}, alpha_pattern={"value": 4}), name="p")
    parts = {name: model.fastadapt[name].parts() for name in "kgp"}
    for part in [*parts["k"].values(), *parts["g"].values()]:
        assert not part.lora_B.weight.any()
    k = torch.cat([part.lora_A.weight.flatten() for part in parts["k"].values()])
    bound = 1 / math.sqrt(128)  # sqrt(6 / ((1 + 5) fan_in))
    assert 0.98 * bound < k.abs().max() <= bound and abs(k.std() - bound / math.sqrt(3)) < 0.03 * bound
    g = torch.cat([part.lora_A.weight.flatten() for part in parts["g"].values()])
    assert abs(g.std() - 1 / 16) < 0.003
    assert {part.scale for part in parts["k"].values()} == {0.5}
    assert {part.scale for part in parts["g"].values()} == {2.0}
    for path, part in parts["g"].items():
        torch.testing.assert_close(part.lora_magnitude_vector, model.bert.get_submodule(path).weight.norm(dim=1))
    ranks = {path: part.rank for path, part in parts["p"].items()}
    assert ranks == {
        f"encoder.layer.{i}.attention.self.{t}": 2 if t == "query" and i < 2 else 8
        for i in range(3) for t in ("query", "value")
    }  # fmt: skip
    assert {part.scale for path, part in parts["p"].items() if path.endswith("value")} == {0.5}
    assert parts["p"]["encoder.layer.0.attention.self.query"].scale == 4.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_class", [*SEQUENCE, BertForMaskedLM], **by_name)
def test_copies_are_whole(model_class, kind):
    model = fa.adapt(make(model_class), KINDS[kind], name="a")
    shake(model.fastadapt)
    before = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), before)
        shake(other.fastadapt, seed=5)
        assert not torch.allclose(output(other), before, atol=1e-4)
        assert torch.equal(output(model), before)
        assert torch.equal(output(fa.unload(other)), output(make(model_class)))


@pytest.mark.parametrize("kind", ["six", "dora"])
def test_compiles_in_one_graph(kind):
    model = fa.adapt(make(), KINDS[kind])
    shake(model.fastadapt)
    eager = output(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch(model)).logits, eager, **CLOSE)
    fa.activate(model, None)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch(model)).logits, output(make()), **CLOSE)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"r": 2.0}, TypeError, "r: got 2.0"),
        ({"r": True}, TypeError, "r: got True"),
        ({"alpha": 0}, ValueError, "alpha: got 0"),
        ({"alpha": "8"}, TypeError, "alpha: got '8'"),
        ({"alpha": float("nan")}, ValueError, "alpha: got nan; accepted is a finite number above 0"),
        ({"alpha": float("inf")}, ValueError, "alpha: got inf; accepted is a finite number above 0"),
        ({"alpha": 10**400}, ValueError, "alpha: got 1000.*accepted is a finite number above 0"),
        ({"targets": ()}, ValueError, "targets: got"),
        ({"targets": ("query", "dense")}, ValueError, "targets: got.*attention_output"),
        ({"targets": ("query", "query")}, ValueError, "each once"),
        ({"targets": 3}, TypeError, "targets: got 3"),
        ({"targets": [["query"]]}, ValueError, r"targets: got \[\['query'\]\]; accepted are"),
        ({"dropout": 1.5}, ValueError, "dropout: got 1.5"),
        ({"dropout": float("nan")}, ValueError, "dropout: got nan"),
        ({"init": "pissa"}, ValueError, "init: got 'pissa'; accepted are 'kaiming', 'gaussian'"),
        ({"rslora": 1}, ValueError, "rslora"),
        ({"dora": "yes"}, ValueError, "dora"),
        ({"bias": "some"}, ValueError, "bias: got 'some'"),
        ({"rank_pattern": {"query": 0}}, ValueError, r"rank_pattern\['query'\]: got 0"),
        ({"rank_pattern": [3]}, TypeError, "rank_pattern"),
        ({"rank_pattern": {"(": 3}}, ValueError, "no regular expression"),
        ({"alpha_pattern": {"query": -1}}, ValueError, "alpha_pattern"),
        ({"alpha_pattern": {"query": float("nan")}}, ValueError, r"alpha_pattern\['query'\]: got nan; accepted is"),
        ({"alpha_pattern": {3: 1}}, TypeError, "alpha_pattern"),
    ],
)
def test_bad_configurations(fields, error, message):
    with pytest.raises(error, match=message):
        fa.LoRAConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 33}, r"r: got 33 for encoder.layer.0.attention.self.query of shape \(32, 32\); accepted is up to 32"),
        ({"rank_pattern": {"value": 40}}, "rank_pattern: got 40"),
        ({"targets": ("encoder.layer.3.output.dense",)}, "targets: got encoder.layer.3.output.dense"),
        ({"rank_pattern": {"key": 4}}, "rank_pattern: got 'key', which fits no target; targets are query, value"),
        ({"alpha_pattern": {"layer.7.attention.self.query": 4}}, "alpha_pattern: got"),
    ],
)
def test_configurations_that_do_not_fit_the_model(fields, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fa.adapt(model, fa.LoRAConfig(**fields))
    assert_same(snapshot(model), before)


def test_targets_that_are_no_plain_linears_are_refused():
    class Quantised(nn.Linear):
        pass

    model = make()
    model.bert.encoder.layer[1].attention.self.query.__class__ = Quantised
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.query is a Quantised"):
        fa.adapt(model, KINDS["two"])
    fa.adapt(model, fa.LoRAConfig(targets=("value",)))
    model = make()
    model.bert.encoder.layer[1].output.dense.forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of encoder\.layer\.1\.output\.dense is patched"):
        fa.adapt(model, fa.LoRAConfig(targets=("output",)))


# -- LoRALinear --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear_is_a_linear_with_a_lora(bias):
    torch.manual_seed(0)
    layer = fa.LoRALinear(24, 16, r=4, alpha=8, bias=bias)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", *(["bias"] if bias else []), "lora_A.weight", "lora_B.weight"]
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]
    x = torch.randn(2, 5, 24, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    shake(layer.lora_A), shake(layer.lora_B, seed=2)
    wanted = F.linear(x, layer.weight + 2 * layer.lora_B.weight @ layer.lora_A.weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    inputs = [x, layer.lora_A.weight, layer.lora_B.weight]
    for a, b in zip(torch.autograd.grad(layer(x).square().sum(), inputs),
                    torch.autograd.grad(wanted.square().sum(), inputs), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    other = fa.LoRALinear(24, 16, r=4, alpha=4, bias=bias)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.eval()(x) * 2 - layer(x), F.linear(x, layer.weight, layer.bias))
    assert "r=4, scale=2" in repr(layer)
    assert fa.LoRALinear(8, 8, r=4, alpha=4, rslora=True).scale == 2.0


def test_lora_linear_shares_what_it_is_made_from():
    linear = nn.Linear(8, 6).eval()
    layer = fa.LoRALinear.from_linear(linear, r=2, dropout=0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not linear.weight.requires_grad
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), linear(x))
    shake(layer.lora_B)
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lora_linear_merges_and_comes_back(dtype):
    torch.manual_seed(0)
    layer = fa.LoRALinear(24, 16, r=4, dtype=dtype).eval()
    shake(layer.lora_B)
    x = torch.randn(5, 24, dtype=dtype)
    weight, before, parameter = layer.weight.detach().clone(), layer(x), layer.weight
    for i in range(20):
        assert layer.merge() is layer and layer.merged
        assert layer.weight is parameter and not torch.equal(layer.weight, weight)
        if i == 0:
            torch.testing.assert_close(layer(x), before, rtol=0, atol=0.02 if dtype != torch.float32 else 1e-5)
            assert torch.equal(layer.state_dict()["weight"], layer.weight)
        shake(layer.lora_A, seed=i)
        assert layer.unmerge() is layer and not layer.merged
        assert torch.equal(layer.weight, weight)
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, layer.weight) and not torch.equal(other.weight, weight)
        assert torch.equal(other.unmerge().weight, weight)
    assert layer.to(dtype).merged and layer.cpu().merged
    layer.double()
    assert not layer.merged and torch.equal(layer.weight, weight.double())


def test_lora_linear_refuses():
    for arguments, error, message in (
        ({"r": 9}, ValueError, "r: got 9 for 8 to 16 features"),
        ({"r": 0}, ValueError, "r: got 0"),
        ({"alpha": -1}, ValueError, "alpha"),
        ({"dropout": 2}, ValueError, "dropout"),
        ({"init": "x"}, ValueError, "init"),
    ):
        with pytest.raises(error, match=message):
            fa.LoRALinear(8, 16, **{"r": 4, **arguments})
    with pytest.raises(TypeError, match="linear: got Conv1d"):
        fa.LoRALinear.from_linear(nn.Conv1d(2, 2, 1))
    layer = fa.LoRALinear(8, 16, r=2)
    shake(layer.lora_B)
    with pytest.raises(ValueError, match="nothing is merged"):
        layer.unmerge()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    merged = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="can't train"):
        layer(torch.randn(2, 8))
    with pytest.raises(RuntimeError, match="call unmerge before loading"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, merged)
    with pytest.raises(ValueError, match="unmerge first"):
        layer.reset_parameters()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(ValueError, match="was written"):
        layer.unmerge()
    layer = fa.LoRALinear(8, 16, r=2)
    layer.lora_A.weight.data[0, 0] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="lora_A of LoRALinear: holds NaN"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="meta"):
        fa.LoRALinear(8, 16, r=2, device="meta").merge()


def _fused():
    return fa.adapt(make(), KINDS["two"]).bert.encoder.layer[0].attention.self.query


def _of_peft():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["query"])).get_submodule(
        "base_model.model.bert.encoder.layer.0.attention.self.query"
    )


def _hooked():
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda module, args, result: 2 * result)
    return linear


def _patched():
    linear = nn.Linear(8, 8)
    linear.forward = lambda input: input
    return linear


@pytest.mark.parametrize(
    ("make_layer", "error", "message"),
    [
        (lambda: fa.LoRALinear(8, 8, r=2), TypeError, "got LoRALinear"),
        (_fused, TypeError, "got FusedLinear"),
        (_of_peft, TypeError, r"got peft\.tuners\.lora\.layer\.Linear"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), TypeError, "got ParametrizedLinear"),
        (_hooked, ValueError, "its Linear has hooks"),
        (_patched, ValueError, "the forward of its Linear is patched"),
    ],
    ids=["LoRALinear", "fused", "PEFT", "parametrized", "hooked", "patched"],
)
def test_lora_linear_is_made_of_no_layer_that_does_more(make_layer, error, message):
    layer = make_layer()
    with pytest.raises(error, match=f"linear: {message}; accepted is a plain nn.Linear"):
        fa.LoRALinear.from_linear(layer, r=2)


def test_lora_linear_saves_with_torch():
    layer = fa.LoRALinear(8, 8, r=2)
    shake(layer.lora_B)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = fa.LoRALinear(8, 8, r=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 8)
    assert torch.equal(other(x), layer(x))
