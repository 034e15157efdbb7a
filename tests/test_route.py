"""``fa.route``: every row of a batch as under its own adaptation alone, in inference and training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
)

import fastadapt as fa
from tests.tiny import batch, make, output, shake

CONFIGS = {
    "narrow": fa.HoulsbyConfig(bottleneck=8),
    "wide": fa.HoulsbyConfig(bottleneck=16, train_layer_norm="all"),
    "beside": fa.ParallelConfig(bottleneck=8),
    "pfeiffer": fa.PfeifferConfig(bottleneck=8),
    "other_pfeiffer": fa.PfeifferConfig(bottleneck=4),
    "gated": fa.BottleneckConfig(bottleneck=8, gate=True, ln_after=True),
    "lora": fa.LoRAConfig(r=4),
    "wide_lora": fa.LoRAConfig(r=6, targets=("query", "intermediate", "output", "pooler.dense"), alpha=3),
    "biased_lora": fa.LoRAConfig(r=2, bias="all"),
    "bitfit": fa.BitFitConfig(),
    "norms": fa.LayerNormConfig("all"),
    "head": fa.HeadConfig(),
}
MIXES = {
    "bottlenecks": ["narrow", "wide", None, "beside", "narrow", "norms"],
    "pfeiffer": ["pfeiffer", None, "other_pfeiffer", "pfeiffer", "norms"],
    "forms": ["pfeiffer", "narrow", None, "gated", "narrow", "pfeiffer"],
    "loras": ["lora", "wide_lora", None, "lora", "biased_lora"],
    "biases": ["bitfit", None, "head", "bitfit", "biased_lora"],
    "all": [*CONFIGS, None],
    "one": ["narrow", "narrow"],
    "bare": [None, None],
}


def adapted(names, model_class=BertForSequenceClassification, **options):
    """A model with these adaptations, each moved from its initialisation, and the bare base active."""
    model = make(model_class, **options)
    for seed, name in enumerate(dict.fromkeys(n for n in names if n is not None)):
        fa.adapt(model, CONFIGS[name], name)
        shake(model.fastadapt[name], seed=seed + 1)
    if "fastadapt" not in model._modules:
        fa.adapt(model, CONFIGS["head"], "unused")
    return fa.activate(model, None)


def row(inputs, i):
    return {key: value[i : i + 1] for key, value in inputs.items()}


def alone(model, names, inputs):
    """Each row under its own adaptation, without gradients."""
    found = []
    for i, name in enumerate(names):
        fa.activate(model, name)
        found.append(output(model, **row(inputs, i)))
    fa.activate(model, None)
    return torch.cat(found)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- equality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mix", MIXES)
def test_inference_is_that_of_each_row_alone(mix, backend):
    names = MIXES[mix]
    model = adapted(names)
    inputs = batch(model, rows=len(names))
    with fa.backend(backend):
        wanted = alone(model, names, inputs)
        with fa.route(model, names):
            got = output(model, **inputs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert len({tuple(r) for r in got.tolist()}) == len(names)


@pytest.mark.parametrize(
    "model_class",
    [BertForTokenClassification, BertForQuestionAnswering, BertForMaskedLM, BertForMultipleChoice, BertModel,
     RobertaForSequenceClassification, ElectraForSequenceClassification],
)  # fmt: skip
def test_every_head_and_architecture(model_class):
    names = ["narrow", None, "lora", "bitfit"]
    model = adapted(names, model_class)
    inputs = batch(model, rows=4)
    wanted = alone(model, names, inputs)
    with fa.route(model, names):
        got = output(model, **inputs)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def test_bfloat16_and_padding():
    names = ["narrow", None, "wide", "lora", "bitfit"]
    model = adapted(names).to(torch.bfloat16)
    inputs = batch(model, rows=5)
    wanted = alone(model, names, inputs)
    with fa.route(model, names):
        got = output(model, **inputs)
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mix", ["bottlenecks", "pfeiffer", "forms", "loras", "biases", "all"])
def test_gradients_are_those_of_each_row_alone(mix):
    names = MIXES[mix]
    model = adapted(names, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = batch(model, rows=len(names), labels=True)
    wanted: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        fa.activate(model, name)
        model.zero_grad()
        loss = model(**row(inputs, i)).loss / len(names)
        if loss.requires_grad:
            loss.backward()
        for key, g in gradients(model).items():
            wanted[key] = wanted[key] + g if key in wanted else g
    fa.activate(model, None)
    model.zero_grad()
    with fa.route(model, names):
        model(**inputs).loss.backward()
    got = gradients(model)
    assert set(got) == set(wanted)
    for key, g in wanted.items():
        torch.testing.assert_close(got[key], g, atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_dropout_is_on_in_training():
    model = adapted(["narrow", "lora"]).train()
    inputs = batch(model, rows=2, labels=True)
    with fa.route(model, ["narrow", "lora"]):
        torch.manual_seed(1)
        first = model(**inputs).loss
        torch.manual_seed(1)
        again = model(**inputs).loss
        other = model(**inputs).loss
        other.backward()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_only_the_named_trainable_tasks_train():
    model = adapted(["narrow", "lora", "bitfit"]).train()
    model.fastadapt["lora"].trainable = False
    inputs = batch(model, rows=3, labels=True)
    with fa.route(model, ["narrow", "lora", "narrow"]):
        trained = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}
        model(**inputs).loss.backward()
    assert trained == {"narrow"}
    assert {n.split(".")[1] for n in gradients(model)} == {"narrow"}


def test_a_task_gets_the_gradients_of_its_rows_alone():
    model = adapted(["narrow", "wide"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = batch(model, rows=4)
    with fa.route(model, ["narrow", "wide", "wide", "narrow"]):
        model(**inputs).logits[:1].sum().backward()
    found = gradients(model)
    assert all(bool(g.any()) == n.startswith("fastadapt.narrow") for n, g in found.items() if "up.weight" in n)


def test_checkpointed_layers_give_the_same_gradients():
    names = ["narrow", "lora", None]
    model = adapted(names, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = batch(model, rows=3, labels=True)
    found = []
    for reentrant in (None, False, True):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with fa.route(model, names):
            model(**inputs).loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert set(other) == set(found[0])
        for key, g in found[0].items():
            torch.testing.assert_close(other[key], g, atol=1e-6, rtol=1e-5)


# -- AdapterDrop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_independent_drop_leaves_rows_bare(p):
    model = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    fa.adapt(model, fa.HoulsbyConfig(bottleneck=8, drop=fa.AdapterDrop("independent", p=p)), "dropped")
    fa.adapt(model, fa.HoulsbyConfig(bottleneck=8), "kept")
    for name in ("dropped", "kept"):
        shake(model.fastadapt[name], seed=len(name))
    names, inputs = ["dropped", "kept", None], batch(model, rows=3)
    wanted = alone(model, names, inputs)
    if p == 1.0:  # its head alone is left
        fa.activate(model, "dropped", skip_layers=range(3))
        wanted[:1] = output(model, **row(inputs, 0))
        fa.activate(model, None)
    with fa.route(model.train(), names):
        got = output(model, **inputs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_independent_drop_draws_for_every_row():
    model = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for i in range(2):
        fa.adapt(model, fa.HoulsbyConfig(bottleneck=8, drop=fa.AdapterDrop("independent", p=0.25)), f"t{i}")
        shake(model.fastadapt[f"t{i}"], seed=i)
    inputs = {key: value[:1].expand(16, -1) for key, value in batch(model).items()}
    torch.manual_seed(0)
    with fa.route(model.train(), ["t0", "t1"] * 8):
        y = model(**inputs).logits
        y.sum().backward()
    assert len({tuple(r) for r in y[::2].tolist()}) > 2
    assert all(bool(g.any()) for n, g in gradients(model).items() if "down.weight" in n)


# -- life --------------------------------------------------------------------------------------------------------


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("active", [None, "narrow"])
def test_leaving_restores_what_was(active):
    model = adapted(["narrow", "lora", "bitfit"])
    fa.activate(model, active)
    if active is not None:
        next(model.fastadapt[active].parameters()).requires_grad_(False)  # as its user has it
    inputs, before = batch(model), flags(model)
    wanted, classes = output(model, **inputs), [type(m) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with fa.route(model, ["lora", None, "bitfit"]):
        routed = output(model, **inputs)
    assert not torch.equal(routed, wanted)
    with pytest.raises(KeyError), fa.route(model, ["lora", None, "bitfit"]):
        raise KeyError
    assert torch.equal(output(model, **inputs), wanted)
    assert flags(model) == before and [type(m) for m in model.modules()] == classes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    output(model, **row(inputs, 0))  # of another length: nothing checks it any more
    fa.unload(model)


@pytest.mark.parametrize("active", [None, "narrow"])
def test_gradients_may_come_on_inside(active):
    names = ["narrow", "lora", None]
    model = adapted(names, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs = batch(model, rows=3, labels=True)
    with fa.route(model, names):
        model(**inputs).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    fa.activate(model, active)
    if active is not None:
        next(model.fastadapt[active].parameters()).requires_grad_(False)
    before = flags(model)
    with torch.no_grad(), fa.route(model, names):
        model(**inputs)
        assert flags(model) == before  # nobody needs them, and a thousand flags cost more than a small forward
        with torch.enable_grad():
            model(**inputs).loss.backward()
    assert flags(model) == before
    found = gradients(model)
    assert set(found) == set(wanted)
    for key, g in wanted.items():
        torch.testing.assert_close(found[key], g, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bitfit", "biased_lora", "lora"])
def test_parameters_that_loading_replaces_are_read_where_they_are(name):
    model = adapted([name])
    inputs = batch(model, rows=2)
    fa.activate(model, name)
    old = output(model, **inputs)
    with fa.route(model, [name, name]):
        output(model, **inputs)
    moved = {key: value + 0.1 if key.startswith("fastadapt") else value for key, value in model.state_dict().items()}
    model.load_state_dict(moved, assign=True)
    with fa.route(model, [name, name]):
        routed = output(model, **inputs)
    new = output(model, **inputs)
    fresh = adapted([name])
    fresh.load_state_dict(moved)
    wanted = output(fa.activate(fresh, name), **inputs)
    assert not torch.equal(new, old) and torch.equal(new, wanted)
    torch.testing.assert_close(routed, wanted, atol=1e-5, rtol=1e-5)


def test_contexts_nest():
    model = adapted(["narrow", "lora", "bitfit"])
    inputs = batch(model)
    outer, inner = ["narrow", None, "lora"], ["bitfit", "lora", "narrow"]
    wanted = [alone(model, names, inputs) for names in (outer, inner)]
    with fa.route(model, outer):
        with fa.route(model, inner):
            torch.testing.assert_close(output(model, **inputs), wanted[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output(model, **inputs), wanted[0], atol=1e-5, rtol=1e-5)
    assert not any(flags(model).values())


def test_rows_can_be_assigned_anew():
    model = adapted(["narrow", "lora", "pfeiffer"])
    inputs, first, second = batch(model), ["narrow", "lora", "pfeiffer"], ["lora", "pfeiffer", "pfeiffer"]
    wanted = alone(model, second, inputs)
    with fa.route(model, first) as routing:
        output(model, **inputs)
        routing.assign(second)
        torch.testing.assert_close(output(model, **inputs), wanted, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="names: got 2; accepted are 3"):
            routing.assign(["lora", "lora"])
        with pytest.raises(ValueError, match="names: got None; accepted here are 'narrow', 'lora', 'pfeiffer'"):
            routing.assign([None, "lora", "lora"])
        torch.testing.assert_close(output(model, **inputs), wanted, atol=1e-5, rtol=1e-5)


def test_compiled_code_follows_assigned_rows():
    model = adapted(["narrow", "wide", "lora", "bitfit"])
    inputs, first, second = batch(model), ["narrow", "lora", "bitfit"], ["lora", "narrow", "narrow"]
    wanted = [alone(model, names, inputs) for names in (first, second)]
    with fa.route(model, first) as routing, torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs)[0], wanted[0], atol=1e-5, rtol=1e-5)
        routing.assign(second)
        torch.testing.assert_close(compiled(**inputs)[0], wanted[1], atol=1e-5, rtol=1e-5)


def test_a_hundred_tasks():
    model = make()
    for i in range(100):
        fa.adapt(model, fa.HoulsbyConfig(bottleneck=4) if i % 2 else fa.LoRAConfig(r=2), f"t{i}")
        shake(model.fastadapt[f"t{i}"], seed=i)
    names = [f"t{i}" for i in range(100)]
    inputs = batch(model, rows=100, length=8)
    wanted = alone(model, names, inputs)
    with fa.route(model, names):
        got = output(model, **inputs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertModel])
def test_another_task_costs_no_walk_through_those_held(model_class, monkeypatch):
    model = make(model_class)
    fa.adapt(model, CONFIGS["narrow"], "first")
    fa.activate(model, None)
    held = model.fastadapt["first"]

    def walk(*_, **__):
        raise AssertionError("a thousand tasks would be walked through for each new one")

    monkeypatch.setitem(held.__dict__, "named_modules", walk)
    for name in ("lora", "wide", "bitfit", "head" if model_class is not BertModel else "pfeiffer"):
        fa.adapt(model, CONFIGS[name], name)


def test_the_labels_names_are_those_that_all_rows_have():
    model = make()
    for name in "abc":
        fa.adapt(model, fa.LoRAConfig(r=2), name=name, head=2)
        if name != "c":
            model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    base, numbered = {i: f"LABEL_{i}" for i in range(3)}, {0: "LABEL_0", 1: "LABEL_1"}
    for active in ("a", None):
        fa.activate(model, active)
        with pytest.raises(RuntimeError, match="an error"), fa.route(model, ["a", "b", "a"]):
            assert model.config.id2label == {0: "no", 1: "yes"} and model.num_labels == 2
            with fa.route(model, [None] * 3):
                assert model.config.id2label == base and model.num_labels == 3
            with fa.route(model, ["a", "c", "b"]):
                assert model.config.id2label == numbered
                assert model.config.to_dict()["id2label"] == base
            assert model.config.id2label == {0: "no", 1: "yes"}
            raise RuntimeError("an error")
        assert model.config.id2label == ({0: "no", 1: "yes"} if active else base)
    fa.activate(model, "c")
    assert model.config.id2label == numbered
    assert fa.unload(model).config.id2label == base


def test_the_problem_type_is_found_in_the_batch_and_kept():
    model = adapted(["narrow", "lora"]).train()
    inputs = batch(model, rows=2, labels=True)
    with fa.route(model, ["narrow", "lora"]):
        model(**inputs)
        assert model.config.problem_type == "single_label_classification"
    assert model.config.problem_type is None
    fa.activate(model, "lora")
    assert model.config.problem_type == "single_label_classification"


# -- bad input ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_routed_is_refused_and_nothing_changes():
    model = adapted(["narrow", "pfeiffer"])
    fa.adapt(model, fa.HoulsbyConfig(bottleneck=8), "wider", head=5)
    fa.adapt(model, CONFIGS["pfeiffer"], "slim")
    fa.adapt(model, fa.PrefixConfig(length=3), "prefix")
    fa.adapt(model, fa.MAMConfig(), "mam")
    fa.adapt(model, fa.LoRAConfig(dora=True), "dora")
    fa.adapt(model, fa.FusionConfig(adapters=("pfeiffer", "slim")), "fusion")
    fa.adapt(model, fa.MaskedAdapterConfig(bottleneck=8), "masked")
    fa.adapt(model, fa.HoulsbyConfig(bottleneck=8), "regression")
    model.config.problem_type = "regression"
    fa.activate(model, "narrow")
    model.config.problem_type = "single_label_classification"
    before, wanted = flags(model), output(model)
    for names, error, message in (
        (["narrow", "missing", None], ValueError, "'missing'; known are 'narrow'"),
        ("narrow", TypeError, "names: got 'narrow'; accepted is a list"),
        ({"narrow"}, TypeError, "names: got"),
        (3, TypeError, "names: got 3"),
        ([3], TypeError, "names: got 3; accepted is a list"),
        ([], ValueError, "names: got \\[\\]; accepted is a list.*at least one"),
        (["narrow", "wider"], ValueError, "heads of unequal width \\('narrow' of 3, 'wider' of 5\\)"),
        ([None, "wider"], ValueError, "heads of unequal width"),
        (["prefix"], ValueError, "'prefix' is of a PrefixConfig, which is not routed"),
        (["mam"], ValueError, "'mam' is of a MAMConfig"),
        (["fusion"], ValueError, "'fusion' is of a FusionConfig"),
        (["dora"], ValueError, "'dora' is a DoRA"),
        (["narrow", "regression"], ValueError, "unequal problem types"),
    ):
        with pytest.raises(error, match=message), fa.route(model, names):
            pytest.fail("entered")
    model.train()
    with pytest.raises(ValueError, match="routed at inference alone"), fa.route(model, ["masked"]):
        pytest.fail("entered")
    model.eval()
    assert flags(model) == before and torch.equal(output(model), wanted) and model.fastadapt.route is None
    with pytest.raises(ValueError, match="model: holds no adaptations"), fa.route(make(), [None]):
        pytest.fail("entered")


def test_a_masked_adapter_runs_at_inference_with_its_mask():
    model = adapted(["narrow"])
    fa.adapt(model, fa.MaskedAdapterConfig(bottleneck=8), "masked")
    shake(model.fastadapt["masked"])
    fa.keep_neurons(model, "masked", torch.arange(8) % 2 == 0)
    names, inputs = ["masked", "narrow", None], batch(model)
    wanted = alone(model, names, inputs)
    with fa.route(model, names):
        torch.testing.assert_close(output(model, **inputs), wanted, atol=1e-5, rtol=1e-5)
        model.train()
        with pytest.raises(RuntimeError, match="'masked' is of a MaskedAdapterConfig"):
            model(**inputs)


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_a_batch_of_another_length_is_refused(rows):
    model = adapted(["narrow"])
    inputs = {key: value.repeat(2, 1)[:rows] for key, value in batch(model).items()}
    with fa.route(model, ["narrow", None, None]):
        with pytest.raises(ValueError, match=f"names: got 3 in fa.route, but the batch has {rows} rows"):
            model(**inputs)
        model(**batch(model))


def test_what_would_change_the_model_is_refused_inside():
    model = adapted(["narrow", "lora"])
    inputs = batch(model)
    with fa.route(model, ["narrow", "lora", None]):
        wanted = output(model, **inputs)
        for verb in (
            lambda: fa.adapt(model, CONFIGS["head"], "new"),
            lambda: fa.activate(model, "lora"),
            lambda: fa.remove(model, "lora"),
            lambda: fa.merge(model, "lora"),
            lambda: fa.unload(model),
        ):
            with pytest.raises(ValueError, match="is inside fa.route"):
                verb()
        with pytest.raises(RuntimeError, match="a routed model can't be copied"):
            copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="a routed model can't be pickled"):
            pickle.dumps(model)
        assert torch.equal(output(model, **inputs), wanted)
    copy.deepcopy(model)
    fa.merge(model, "lora")
    with pytest.raises(ValueError, match="is merged into its weights"), fa.route(model, ["lora"] * 3):
        pytest.fail("entered")


def test_a_head_that_is_no_linear_layer_runs_on_its_rows():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(32, 3)

        def forward(self, x):
            return self.out(x.tanh())

    model = adapted(["narrow", "lora"])
    fa.adapt(model, CONFIGS["head"], "own", head=Head())
    names, inputs = ["own", "narrow", "own", None], batch(model, rows=4)
    wanted = alone(model, names, inputs)
    with fa.route(model, names):
        torch.testing.assert_close(output(model, **inputs), wanted, atol=1e-5, rtol=1e-5)


def test_explain_names_the_routed_op():
    model = adapted(["narrow", "lora"])
    with fa.route(model, ["narrow", "lora", None]):
        told = str(fa.explain(model))
    assert "bottleneck_rows" in told and "'narrow', 'lora', None by row" in told


# -- one text of several tasks ------------------------------------------------------------------------------------


def each_task(model, by_text, inputs, skip_layers=()):
    """Each text under each of its tasks alone, without gradients."""
    found = []
    for i, names in enumerate(by_text):
        for name in names if isinstance(names, tuple) else (names,):
            fa.activate(model, name, skip_layers=skip_layers)
            found.append(output(model, **row(inputs, i)))
    fa.activate(model, None)
    return torch.cat(found)


def rows_of_layers(model, call):
    """How many rows each layer of the encoder is given."""
    seen = []
    layers = model.base_model.encoder.layer
    hooks = [m.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0])) for m in layers]
    # A hook on the layer runs after the one that forks, and sees what that gave.
    call()
    for hook in hooks:
        hook.remove()
    return seen


BY_TEXT = [("narrow", None, "lora"), "narrow", ("lora", "narrow")]


@pytest.mark.parametrize(
    "model_class",
    [BertForSequenceClassification, RobertaForSequenceClassification, ElectraForSequenceClassification, BertModel,
     BertForTokenClassification],
)  # fmt: skip
@pytest.mark.parametrize("skip_layers", [(), (0,), (0, 1), (1,), (0, 1, 2)])
def test_tasks_of_a_text_share_the_layers_below_the_lowest_adapted_one(model_class, skip_layers):
    model = adapted(["narrow", "lora"], model_class)
    inputs = batch(model)
    expected = each_task(model, BY_TEXT, inputs, skip_layers)
    with fa.route(model, BY_TEXT, skip_layers=skip_layers):
        found = output(model, **inputs)
        rows = rows_of_layers(model, lambda: output(model, **inputs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    shared = {(): 0, (0,): 1, (0, 1): 2, (1,): 0, (0, 1, 2): 2}[skip_layers]  # the last layer is never shared
    assert rows == [3] * shared + [6] * (3 - shared)


def test_what_adapts_the_embeddings_leaves_no_trunk():
    model = adapted(["narrow", "wide", "bitfit"])
    inputs = batch(model)
    by_text = [("narrow", "wide"), ("bitfit",), (None, "wide", "narrow")]
    expected = each_task(model, by_text, inputs)
    with fa.route(model, by_text):
        found = output(model, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_text_of_many_tasks():
    names = ["narrow", "lora", "beside", "bitfit", None]
    model = adapted(names)
    inputs = row(batch(model), 1)
    expected = each_task(model, [tuple(names)], inputs, (0,))
    with fa.route(model, [tuple(names)], skip_layers=[0]):
        torch.testing.assert_close(output(model, **inputs), expected, rtol=1e-4, atol=1e-5)


def test_tasks_of_a_text_with_several_choices():
    model = adapted(["narrow", "lora"], BertForMultipleChoice)
    inputs = batch(model)
    expected = each_task(model, BY_TEXT, inputs, (0,))
    with fa.route(model, BY_TEXT, skip_layers=(0,)):
        torch.testing.assert_close(output(model, **inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_of_tasks_of_one_text(reentrant):
    model = adapted(["narrow", "lora"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch(model)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    flat = [n for names in BY_TEXT for n in (names if isinstance(names, tuple) else (names,))]
    repeated = {key: value[[0, 0, 0, 1, 2, 2]] for key, value in inputs.items()}
    with fa.route(model, flat, skip_layers=(0,)):
        model(**repeated, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with fa.route(model, BY_TEXT, skip_layers=(0,)):
        model(**inputs, labels=labels).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_tasks_of_a_text_can_be_assigned_anew_and_compiled():
    model = adapted(["narrow", "lora"])
    inputs = batch(model)
    other = [("lora", "lora", None), None, ("narrow", None)]
    with fa.route(model, BY_TEXT, skip_layers=(0,)) as routing:
        compiled = torch.compile(model, backend="eager")
        output(compiled, **inputs)
        routing.assign(other)
        found = output(compiled, **inputs)
        with pytest.raises(ValueError, match=r"names: got \[2, 1, 3\]; accepted are \[3, 1, 2\]"):
            routing.assign(other[::-1])
    torch.testing.assert_close(found, each_task(model, other, inputs, (0,)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [[("narrow", ()), None, None], [(), None, None], [("narrow", 1), None, None]])
def test_tuples_of_something_else_are_refused(names):
    model = adapted(["narrow"])
    with pytest.raises((TypeError, ValueError), match="names: got"), fa.route(model, names):
        pass
    assert model.fastadapt.route is None


def test_skipped_layers_of_a_route_are_checked():
    model = adapted(["narrow"])
    with pytest.raises(ValueError, match="skip_layers.*0 to 2"), fa.route(model, ["narrow"] * 3, skip_layers=[3]):
        pass
