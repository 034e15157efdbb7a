"""The verbs: lifecycle, freezing, heads, counts, and refusals that change nothing."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraForMaskedLM,
    PreTrainedModel,
    RobertaForMaskedLM,
    TextClassificationPipeline,
)

import fastadapt as fa
from tests.tiny import ALL, METHODS, SEQUENCE, batch, make, output, shake

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
by_name = {"ids": lambda c: c.__name__}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module):
    return (
        [(name, type(m)) for name, m in model.named_modules()],
        {key: t.clone() for key, t in model.state_dict().items()},
        trained(model),
        fa.adaptations(model),
        model.__dict__.get("num_labels"),
        model.config.to_dict(),
    )


def assert_same(a, b) -> None:
    assert a[0] == b[0]
    assert list(a[1]) == list(b[1]) and all(torch.equal(a[1][key], b[1][key]) for key in a[1])
    assert a[2:] == b[2:]


def steps(model: nn.Module, count: int = 2) -> None:
    """Train on what requires a gradient, with weight decay, so that anything that could move does."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch(model))[0].float().square().sum().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("model_class", ALL, **by_name)
@pytest.mark.parametrize("method", METHODS)
def test_a_life(model_class, method):
    """Adapt, train, switch off, remove, unload: the base keeps every bit, and comes back as it was."""
    model = make(model_class)
    model.get_input_embeddings().weight.requires_grad_(False)  # something of the user's own, to be given back
    before, stock = snapshot(model), output(model)

    assert fa.adapt(model, METHODS[method], name="a") is model
    assert fa.adaptations(model) == ["a"]
    assert trained(model) and all(name.startswith("fastadapt.a.") for name in trained(model))
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith("fastadapt.a.")}
    torch.testing.assert_close(output(model), stock, rtol=0, atol=1e-3)

    steps(model)
    assert not torch.allclose(output(model), stock, atol=1e-3)
    state = model.state_dict()
    assert all(torch.equal(state[key], t) for key, t in before[1].items())
    assert [key for key in state if not key.startswith("fastadapt.")] == list(before[1])

    assert fa.activate(model, None) is model
    assert not trained(model)
    torch.testing.assert_close(output(model), stock, **CLOSE)
    fa.activate(model, "a")
    assert not torch.allclose(output(model), stock, atol=1e-3)

    assert fa.remove(model, "a") is model
    assert fa.adaptations(model) == [] and list(model.state_dict()) == list(before[1])
    torch.testing.assert_close(output(model), stock, **CLOSE)
    assert fa.unload(model) is model
    assert_same(snapshot(model), before)
    assert torch.equal(output(model), stock)
    assert not any("fastadapt" in repr(type(m)) or "active" in m.__dict__ or "active_head" in m.__dict__
                   for m in model.modules())  # fmt: skip


@pytest.mark.parametrize("model_class", [*SEQUENCE, BertModel], **by_name)
def test_several_adaptations(model_class):
    model = make(model_class)
    for name, config in METHODS.items():
        fa.adapt(model, config, name=name)
        shake(model.fastadapt[name], seed=len(name))
    outputs = {}
    for name in (*METHODS, None):
        fa.activate(model, name)
        outputs[name] = output(model)
        assert all(key.startswith(f"fastadapt.{name}.") for key in trained(model))
        assert bool(trained(model)) == (name is not None)
    values = list(outputs.values())
    assert not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(values) for b in values[:i])
    fa.remove(model, "pfeiffer")
    assert fa.adaptations(model) == ["houlsby", "parallel"]
    for name in ("houlsby", "parallel", None):
        fa.activate(model, name)
        assert torch.equal(output(model), outputs[name])
    # Each alone gives what it gives among others.
    alone = fa.adapt(make(model_class), METHODS["houlsby"], name="x")
    alone.fastadapt["x"].load_state_dict(model.fastadapt["houlsby"].state_dict())
    assert torch.equal(output(alone), outputs["houlsby"])


def test_training_one_leaves_the_others():
    model = fa.adapt(make(), METHODS["houlsby"], name="a")
    fa.adapt(model, METHODS["houlsby"], name="b")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    steps(model)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.startswith("fastadapt.b.")}


@pytest.mark.parametrize("scope", ["none", "encoder", "all"])
@pytest.mark.parametrize("model_class", SEQUENCE, **by_name)
def test_layer_norms_that_train(model_class, scope):
    model = fa.adapt(make(model_class), fa.HoulsbyConfig(bottleneck=4, train_layer_norm=scope), name="a")
    norms = {name for name in trained(model) if "LayerNorm" in name}
    assert len(norms) == {"none": 0, "encoder": 12, "all": 14}[scope]
    assert ("fastadapt.a.embeddings.LayerNorm.weight" in norms) == (scope == "all")
    stock = output(model)
    model.train()
    model(**batch(model))[0].square().sum().backward()
    assert all(model.get_parameter(name).grad.any() for name in norms)
    model.eval()
    for name in norms:
        with torch.no_grad():
            model.get_parameter(name).add_(0.5)
        changed = output(model)
        assert not torch.allclose(changed, stock, atol=1e-5), f"{name} is not used"
        stock = changed
    fa.activate(model, None)
    torch.testing.assert_close(output(model), output(make(model_class)), **CLOSE)


def test_skipped_layers():
    model = fa.adapt(make(), METHODS["houlsby"], name="a")
    shake(model.fastadapt)
    whole = output(model)
    fa.activate(model, "a", skip_layers=[0, 2])
    assert trained(model) == {
        n for n, _ in model.named_parameters()
        if n.startswith(("fastadapt.a.head", "fastadapt.a.encoder.layer.1."))
    }  # fmt: skip
    skipped = output(model)
    assert not torch.allclose(skipped, whole, atol=1e-4)
    reference = fa.adapt(make(), fa.HoulsbyConfig(bottleneck=8, leave_out=(0, 2), train_layer_norm="none"), name="b")
    site = model.fastadapt["a"].encoder.layer._modules["1"]
    with torch.no_grad():
        for path in ("attention.output", "output"):
            ours = reference.fastadapt["b"].encoder.layer._modules["1"].get_submodule(path)
            ours.load_state_dict(site.get_submodule(path).state_dict(), strict=False)
            # The pretrained LayerNorm of this layer is the adaptation's copy there.
            norm = reference.bert.encoder.layer[1].get_submodule(path).LayerNorm
            norm.load_state_dict(site.get_submodule(path).LayerNorm.state_dict())
        reference.fastadapt["b"].head.load_state_dict(model.fastadapt["a"].head.state_dict())
    torch.testing.assert_close(output(reference), skipped, **CLOSE)
    fa.activate(model, "a")
    assert torch.equal(output(model), whole)


# -- heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [*SEQUENCE, BertForTokenClassification], **by_name)
def test_a_head_of_another_width(model_class):
    model = make(model_class)
    fa.adapt(model, METHODS["pfeiffer"], name="five", head=5)
    fa.adapt(model, METHODS["pfeiffer"], name="own")
    fa.adapt(model, METHODS["pfeiffer"], name="one", head=1)
    width = {"five": 5, "own": 3, "one": 1, None: 3}
    token = "Token" in model_class.__name__
    for name in ("five", None, "one", "own", "five"):
        fa.activate(model, name)
        assert model.num_labels == model.config.num_labels == width[name]
        inputs = batch(model)
        shape = inputs["input_ids"].shape if token else (3,)
        if not token and name == "one":
            labels = torch.tensor([0.5, -1.0, 2.0])
        else:
            labels = torch.full(shape, width[name] - 1)
        out = model(**inputs, labels=labels)
        assert out.logits.shape == (*shape, width[name])
        assert torch.isfinite(out.loss)
        if not token:
            wanted = "regression" if name == "one" else "single_label_classification"
            assert model.config.problem_type == wanted
    fa.unload(model)
    assert model.num_labels == 3
    fa.adapt(model.base_model, METHODS["houlsby"])  # free again


def test_an_explicit_problem_type_belongs_to_the_models_own_head():
    model = make(problem_type="multi_label_classification")
    fa.adapt(model, METHODS["pfeiffer"], name="copy")
    assert model.config.problem_type == "multi_label_classification"
    fa.adapt(model, METHODS["pfeiffer"], name="new", head=7)
    assert model.config.problem_type is None
    model(**batch(model), labels=torch.tensor([0, 6, 3]))
    fa.activate(model, None)
    assert model.config.problem_type == "multi_label_classification"
    fa.activate(model, "new")
    assert model.config.problem_type == "single_label_classification"


NAMES = {0: "no", 1: "maybe", 2: "yes"}


def named() -> nn.Module:
    """A model whose own labels have names, with an active adaptation of five labels and one of three."""
    model = make(id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    fa.adapt(model, fa.LoRAConfig(r=2), name="own")
    return fa.adapt(model, fa.LoRAConfig(r=2), name="five", head=5)


def numbers(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


def said(model: nn.Module) -> dict[int, str]:
    """The labels' names, which the configuration has in both directions."""
    assert model.config.label2id == {name: i for i, name in model.config.id2label.items()}
    return model.config.id2label


def test_names_of_labels_are_the_active_head_s():
    model = make(id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    ids, names = model.config.id2label, model.config.label2id
    fa.adapt(model, fa.LoRAConfig(r=2), name="own")
    fa.adapt(model, fa.LoRAConfig(r=2), name="five", head=5)
    pipeline = TextClassificationPipeline(model=model)
    logits = model(**batch(model)).logits[:1].detach()
    found = pipeline.postprocess({"logits": logits}, top_k=None)
    assert {each["label"] for each in found} == set(numbers(5).values())
    model.config.id2label = letters = dict(enumerate("abcde"))  # the user's own
    model.config.label2id = {name: i for i, name in letters.items()}
    for name, wanted in (("own", NAMES), ("five", letters), (["own", "five"], NAMES), (None, NAMES), ("five", letters)):
        fa.activate(model, name)
        assert said(model) == wanted and model.num_labels == len(wanted)
    fa.remove(model, "five")
    assert model.config.id2label is ids and model.config.label2id is names and ids == NAMES
    fa.activate(model, "own")
    fa.unload(model)
    assert model.config.id2label is ids and model.config.label2id is names and ids == NAMES


def test_what_is_written_of_a_configuration_names_the_base_s_labels(tmp_path):
    model = named()
    for module, folder in ((model, "model"), (model.bert, "bert"), (model.config, "config")):
        module.save_pretrained(tmp_path / folder)
        assert BertConfig.from_pretrained(tmp_path / folder).id2label == NAMES
        assert said(model) == numbers(5)
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(output(stock), output(make(id2label=NAMES)))


def test_a_configuration_that_names_labels_in_one_direction(tmp_path):
    model = make(id2label=NAMES)
    assert model.config.label2id is None
    for name, head in (("own", None), ("five", 5)):
        fa.adapt(model, METHODS["pfeiffer"], name=name, head=head)
    assert said(copy.deepcopy(model)) == numbers(5)
    assert model.config.to_dict()["id2label"] == NAMES and model.config.to_dict()["label2id"] is None
    fa.save(model, tmp_path, name="own")
    assert said(fa.load(make(), tmp_path)) == NAMES
    for name in ("own", None):
        fa.activate(model, name)
        assert model.config.id2label == NAMES and model.config.label2id is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_names_the_labels_on_its_own(duplicate, tmp_path):
    model = named()
    other = duplicate(duplicate(model))
    fa.activate(model, None)
    assert said(other) == numbers(5) and said(model) == NAMES
    other.save_pretrained(tmp_path)
    assert BertConfig.from_pretrained(tmp_path).id2label == NAMES
    lone = duplicate(other.config)
    assert lone.id2label == numbers(5) and lone.to_dict()["id2label"] == NAMES
    names = other.config.id2label
    assert said(fa.unload(other)) == NAMES
    del other
    assert duplicate(names) in (names, NAMES)


def test_a_head_merged_for_good_takes_its_names_along():
    model = named()
    fa.activate(model, "own")
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    model.config.label2id = {"x": 0, "y": 1, "z": 2}
    assert said(fa.unload(model, merge=True)) == {0: "x", 1: "y", 2: "z"}


def test_a_given_head_is_used_as_it_is():
    head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a", head=head)
    assert model.fastadapt["a"].head is head
    assert model.num_labels == 4
    pooled = model.bert(**batch(model)).pooler_output
    torch.testing.assert_close(model(**batch(model)).logits, head(pooled))
    assert {"fastadapt.a.head.0.weight", "fastadapt.a.head.2.bias"} <= trained(model)


@pytest.mark.parametrize("model_class", [BertForMaskedLM, ElectraForMaskedLM], **by_name)
def test_a_tied_head_stays_tied_and_is_not_counted(model_class):
    model = fa.adapt(make(model_class), METHODS["pfeiffer"], name="a")
    embeddings = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embeddings
    head = model.fastadapt["a"].head
    decoder = head.predictions.decoder if model_class is BertForMaskedLM else head["generator_lm_head"]
    assert decoder.weight is embeddings and not embeddings.requires_grad
    assert not any(p is embeddings for p in model.fastadapt.parameters())
    names = [n for n, _ in model.fastadapt.named_parameters()]
    assert len(names) == len([n for n, _ in model.fastadapt.named_parameters(remove_duplicate=False)])
    steps(model)
    assert torch.equal(embeddings, make(model_class).get_input_embeddings().weight)


LANGUAGE_MODELS = (BertForMaskedLM, RobertaForMaskedLM, ElectraForMaskedLM)


def _with_tied_head(model_class, seed=0):
    model = fa.adapt(make(model_class, seed), METHODS["pfeiffer"], name="a")
    shake(model.fastadapt)
    return model


@pytest.mark.parametrize("size", [104, 90])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS, **by_name)
def test_a_tied_head_follows_a_vocabulary_of_another_size(model_class, size):
    model, kept = _with_tied_head(model_class), min(size, 96)
    keys, ids = list(model.state_dict()), batch(model)["input_ids"].clamp(max=kept - 1)
    before = output(model, input_ids=ids)
    biases = {n: p for n, p in model.fastadapt.named_parameters() if p.shape == (96,)}
    assert len(biases) == 1
    model.resize_token_embeddings(size, mean_resizing=False)
    logits = output(model, input_ids=ids)
    assert logits.shape[-1] == size and list(model.state_dict()) == keys
    torch.testing.assert_close(logits[..., :kept], before[..., :kept])
    for name, p in biases.items():
        assert model.fastadapt.get_parameter(name) is p and p.shape == (size,)
    with fa.route(model, ["a", None, "a"]):
        assert model(ids).logits.shape[-1] == size
    steps(model)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS, **by_name)
def test_a_tied_head_reads_what_lies_there_now(model_class):
    model, other = _with_tied_head(model_class), _with_tied_head(model_class, seed=1)
    state = {key: t.clone() for key, t in other.state_dict().items()}
    expected = output(other)
    once = {key: state[key] for key, _ in model.named_parameters()}  # not by the names of what is tied to them
    called = functional_call(model, once, kwargs=batch(model), tie_weights=True)[0]
    torch.testing.assert_close(called, expected)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    torch.testing.assert_close(output(model), expected)
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS, **by_name)
def test_a_tied_head_is_tied_to_its_own_model_in_a_copy(model_class, duplicate):
    model = _with_tied_head(model_class)
    before, second = output(model), duplicate(model)
    assert torch.equal(output(second), before)
    with torch.no_grad():
        second.get_input_embeddings().weight.mul_(2)
    assert torch.equal(output(model), before)
    stock = make(model_class)
    with torch.no_grad():
        stock.get_input_embeddings().weight.mul_(2)
    fa.adapt(stock, METHODS["pfeiffer"], name="a").load_state_dict(second.state_dict())
    assert torch.equal(output(second), output(stock))


def test_the_copy_of_a_head_is_the_models_own_not_the_active_one():
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    shake(model.fastadapt["a"].head)
    fa.adapt(model, METHODS["pfeiffer"], name="b")
    assert torch.equal(model.fastadapt["b"].head.weight, model.classifier.weight)
    assert type(model.fastadapt["b"].head) is nn.Linear
    fa.adapt(model, METHODS["pfeiffer"], name="c", head=5)
    fa.adapt(model, METHODS["pfeiffer"], name="d")
    assert model.num_labels == 3 and model.fastadapt["d"].num_labels == 3


# -- bad input ---------------------------------------------------------------------------------------------------

REFUSED = {
    "config_none": (lambda m: fa.adapt(m, None), TypeError, "config.*HoulsbyConfig"),
    "config_dict": (lambda m: fa.adapt(m, {"bottleneck": 8}), TypeError, "config.*PfeifferConfig"),
    "config_class": (lambda m: fa.adapt(m, fa.HoulsbyConfig), TypeError, "config"),
    "name_twice": (lambda m: fa.adapt(m, METHODS["houlsby"], name="here"), ValueError, "name.*'here'.*in use"),
    "name_dotted": (lambda m: fa.adapt(m, METHODS["houlsby"], name="a.b"), ValueError, "name.*dots"),
    "name_empty": (lambda m: fa.adapt(m, METHODS["houlsby"], name=""), ValueError, "name"),
    "name_int": (lambda m: fa.adapt(m, METHODS["houlsby"], name=3), TypeError, "name"),
    "head_text": (lambda m: fa.adapt(m, METHODS["houlsby"], head="3"), TypeError, "head"),
    "head_true": (lambda m: fa.adapt(m, METHODS["houlsby"], head=True), TypeError, "head"),
    "head_zero": (lambda m: fa.adapt(m, METHODS["houlsby"], head=0), ValueError, "head"),
    "head_of_the_model": (lambda m: fa.adapt(m, METHODS["houlsby"], head=m.classifier), ValueError, "head"),
    "leave_out": (lambda m: fa.adapt(m, fa.HoulsbyConfig(leave_out=(3,))), ValueError, "leave_out.*0 to 2"),
    "factors": (lambda m: fa.adapt(m, fa.PfeifferConfig(reduction_factor={"0": 2})), ValueError, "reduction_factor"),
    "activate_unknown": (lambda m: fa.activate(m, "there"), ValueError, "name.*'there'.*'here'"),
    "activate_mapping": (lambda m: fa.activate(m, {"here": 1}), ValueError, "name: got {'here': 1}; known are 'here'"),
    "activate_nested": (
        lambda m: fa.activate(m, [["here"], "b"]),
        ValueError,
        r"name: got \['here'\]; known are 'here'",
    ),
    "save_nowhere": (lambda m: fa.save(m, None, name="here"), TypeError, "path: got None; accepted is a folder's"),
    "load_nothing": (lambda m: fa.load(m, None), TypeError, "path: got None; accepted is a folder's"),
    "load_bytes": (lambda m: fa.load(m, b"here"), TypeError, "path: got b'here'; accepted is a folder's"),
    "load_trainable": (lambda m: fa.load(m, ".", trainable="no"), TypeError, "trainable: got 'no'; accepted are True"),
    "activate_list": (lambda m: fa.activate(m, ["here"]), TypeError, "FusionConfig"),
    "skip_beyond": (lambda m: fa.activate(m, "here", skip_layers=[3]), ValueError, "skip_layers.*0 to 2"),
    "skip_text": (lambda m: fa.activate(m, None, skip_layers="01"), ValueError, "skip_layers"),
    "skip_int": (lambda m: fa.activate(m, None, skip_layers=1), TypeError, "skip_layers"),
    "remove_unknown": (lambda m: fa.remove(m, "there"), ValueError, "name.*'here'"),
    "restore_adapted": (lambda m: fa.restore(m), ValueError, "here.*unload"),
    "unload_merge": (lambda m: fa.unload(m, merge=True), ValueError, "merge"),
    "adapt_inner": (lambda m: fa.adapt(m.bert, METHODS["houlsby"]), ValueError, "unload"),
    "adapt_inner_off": (lambda m: fa.adapt(fa.activate(m, None).bert, METHODS["houlsby"]), ValueError, "unload"),
    "restore_inner": (lambda m: fa.restore(m.bert), ValueError, "BertModel belong to an adapted model"),
    "unload_inner": (lambda m: fa.unload(m.bert), ValueError, "BertModel belong to an adapted model"),
}


def test_what_is_no_model_has_no_adaptations():
    for call in (fa.adaptations, lambda m: fa.remove(m, "a"), fa.eject):
        with pytest.raises(TypeError, match="model: got NoneType; accepted is an nn.Module"):
            call(None)


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_argument_and_change_nothing(kind):
    call, error, message = REFUSED[kind]
    model = fa.adapt(make(), METHODS["pfeiffer"], name="here")
    shake(model.fastadapt)
    before, logits = snapshot(model), output(model)
    with pytest.raises(error, match=message):
        call(model)
    if kind.endswith("_off"):
        fa.activate(model, "here")
    assert_same(snapshot(model), before)
    assert torch.equal(output(model), logits)


def test_refusals_on_a_plain_model_leave_it_plain():
    model = make()
    before = snapshot(model)
    for kind in ("config_none", "name_dotted", "head_zero", "leave_out", "factors", "remove_unknown"):
        call, error, _ = REFUSED[kind]
        with pytest.raises(error):
            call(model)
        assert_same(snapshot(model), before)
    with pytest.raises(ValueError, match="known are none"):
        fa.activate(model, "a")
    assert fa.adaptations(model) == []
    assert_same(snapshot(fa.activate(model, None)), before)
    assert_same(snapshot(fa.unload(model)), before)


def test_heads_without_a_free_width():
    for model_class in (BertForQuestionAnswering, BertForMultipleChoice, BertForMaskedLM):
        with pytest.raises(ValueError, match=r"head.*no free number of labels"):
            fa.adapt(make(model_class), METHODS["houlsby"], head=4)
    with pytest.raises(ValueError, match="BertModel has no head"):
        fa.adapt(make(BertModel), METHODS["houlsby"], head=4)
    with pytest.raises(ValueError, match="generator_lm_head"):
        fa.adapt(make(ElectraForMaskedLM), METHODS["houlsby"], head=nn.Linear(2, 2))


def test_an_unknown_head_class_is_refused():
    class Curious(nn.Linear):
        pass

    model = make()
    model.classifier.__class__ = Curious
    with pytest.raises(ValueError, match=r"classifier \(Curious\)"):
        fa.adapt(model, METHODS["houlsby"])


def test_a_head_in_an_unknown_place_is_refused():
    class BertOwn(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(4, 4)

    model = make(BertOwn)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"extra \(Linear\)"):
        fa.adapt(model, METHODS["houlsby"])
    assert_same(snapshot(model), before)


def test_a_wrapper_is_refused():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.base_model_prefix = inner, inner.config, "bert"

    with pytest.raises(ValueError, match=r"Wrapper, which wraps"):
        fa.adapt(Wrapper(make()), METHODS["houlsby"])
    inner = make()
    stock = output(inner)
    fa.accelerate(Wrapper(inner))
    torch.testing.assert_close(output(inner), stock, **CLOSE)
    assert "Fused" in type(inner.bert.encoder.layer[0].output).__name__


def published(kind: str) -> list[type[nn.Module]]:
    module = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    return [
        value for name, value in vars(module).items()
        if name.startswith(kind) and (name == f"{kind}Model" or "For" in name or "LMHead" in name)
        and isinstance(value, type) and issubclass(value, PreTrainedModel)
    ]  # fmt: skip


PUBLISHED = [model_class for kind in ("Bert", "Roberta", "Electra") for model_class in published(kind)]


@pytest.mark.parametrize("model_class", PUBLISHED, **by_name)
def test_every_published_head(model_class):
    """Whatever the library has: adapted, its whole head is the adaptation's, and it trains."""
    model = make(model_class)
    stock, inputs = output(model), batch(model)
    fa.adapt(model, METHODS["parallel"], name="a")
    torch.testing.assert_close(output(model), stock, **CLOSE)
    model.train()
    out = model(**inputs)
    sum(t.float().square().sum() for t in out.to_tuple() if torch.is_tensor(t)).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    base = getattr(model, model.base_model_prefix, model)
    inside = {id(p) for p in base.parameters()}
    head = sum(p.numel() for n, p in model.named_parameters() if id(p) not in inside and not n.startswith("fastadapt."))
    assert fa.parameter_report(model).tasks["a"].head == head
    fa.unload(model)
    assert torch.equal(output(model.eval()), stock)


def test_an_unknown_output_class_is_refused():
    model = make()

    class Curious(type(model.bert.encoder.layer[1].output)):
        pass

    model.bert.encoder.layer[1].output.__class__ = Curious
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output \(Curious\)"):
        fa.adapt(model, METHODS["houlsby"])


@pytest.mark.parametrize("name", ["training", "forward", "active", "skipped", "äß ?", "0", "add"])
def test_any_name_without_dots_will_do(name):
    model = fa.adapt(make(), METHODS["houlsby"], name=name)
    assert fa.adaptations(model) == [name]
    assert f"fastadapt.{name}.head.weight" in model.state_dict()
    fa.activate(model, None)
    fa.activate(model, name)
    model.train()
    assert model.fastadapt[name].training


# -- counts and reports ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_base() -> BertModel:
    with torch.device("meta"):
        return BertModel(BertConfig())


@pytest.mark.parametrize(
    ("config", "count", "norms"),
    [
        (fa.HoulsbyConfig(bottleneck=48), 1_789_056, 12 * 2 * 2 * 768),
        (fa.PfeifferConfig(bottleneck=48), 894_528, 0),
        (fa.PfeifferConfig(), 894_528, 0),
        (fa.ParallelConfig(bottleneck=384), 7_091_712, 0),
        (fa.ParallelConfig(), 7_091_712, 0),
        (fa.HoulsbyConfig(bottleneck=48, train_layer_norm="all"), 1_789_056, (12 * 2 + 1) * 2 * 768),
        (fa.HoulsbyConfig(bottleneck=48, train_layer_norm="none", scale="learned"), 1_789_056 + 24, 0),
        (fa.HoulsbyConfig(bottleneck=48, train_layer_norm="none", leave_out=range(6)), 1_789_056 // 2, 0),
    ],
)
def test_parameter_counts_of_bert_base(bert_base, config, count, norms):
    base = sum(p.numel() for p in bert_base.parameters())
    fa.adapt(bert_base, config, name="a")
    report = fa.parameter_report(bert_base)
    fa.unload(bert_base)
    task = report.tasks["a"]
    assert (task.adapter, task.layer_norm, task.head) == (count, norms, 0)
    assert report.base == base and report.total == base + count + norms and report.trained == count + norms
    assert task.share == pytest.approx((count + norms) / base)


def test_parameter_report_of_several_tasks():
    model = fa.adapt(make(), METHODS["houlsby"], name="a")
    fa.adapt(model, METHODS["pfeiffer"], name="b", head=5)
    report = fa.parameter_report(model)
    assert report.tasks["a"].head == 33 * 3 and report.tasks["b"].head == 33 * 5
    assert report.trained == report.tasks["b"].total
    assert report.total == report.base + sum(t.total for t in report.tasks.values())
    assert report.total == sum(p.numel() for p in model.parameters())
    text = str(report)
    assert "trained" in text and f"{report.tasks['a'].adapter:,}" in text and "share" in text
    assert fa.parameter_report(make()).trained_share == 1.0
    with pytest.raises(TypeError, match="model"):
        fa.parameter_report(None)


def test_explain():
    model = make()
    rows = fa.explain(model).rows
    assert {row.op for row in rows} == {"original"} and {row.refused["fused"] for row in rows} == {"not accelerated"}
    fa.adapt(model, METHODS["pfeiffer"], name="a")
    explanation = fa.explain(model)
    ops = {}
    for row in explanation.rows:
        ops.setdefault(row.path, []).append(row.op)
    layer = "encoder.layer.1"
    assert ops[f"{layer}.attention.self"] == ["linear", "attention"]
    assert ops[f"{layer}.attention.output"] == ["linear", "add_norm"]
    assert ops[f"{layer}.intermediate"] == ["linear"]
    assert ops[f"{layer}.output"] == ["linear", "bottleneck"]
    text = str(explanation)
    assert "active adaptation: a" in text and "encoder.layer.0-2.output" in text
    with fa.backend("reference"):
        assert {r.backend for r in fa.explain(model).rows} == {"reference", "torch"}
    half = fa.explain(model.half())
    assert half.dtype == "float16" and {r.backend for r in half.rows} == {"reference", "torch"}
    if fa.dispatch.forced() is None:
        assert all("cpu" in r.refused for r in half.rows if r.backend == "reference")


def test_reports_and_verbs_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fa.adapt(make(), METHODS["houlsby"])
        str(fa.explain(model))
        str(fa.parameter_report(model))
        fa.unload(fa.activate(model, None))


def test_importing_is_lean():
    import subprocess
    import sys

    code = (
        "import sys, fastadapt; loaded = [m for m in ('transformers', 'triton', 'adapters') if m in sys.modules];"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_is_no_model():
    with pytest.raises(TypeError, match="model"):
        fa.adapt(BertForSequenceClassification, METHODS["houlsby"])
    with pytest.raises(TypeError, match="model"):
        fa.refresh("bert")
