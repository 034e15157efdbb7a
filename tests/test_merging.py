"""Merging: the bare model's forward over merged weights, every bit given back, and refusals that change nothing."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification

import fastadapt as fa
from fastadapt import ops
from tests.test_adapt import assert_same, snapshot, trained
from tests.tiny import METHODS, SEQUENCE, batch, make, output, shake

SIX = ("query", "key", "value", "attention_output", "intermediate", "output")
KINDS = {
    "two": fa.LoRAConfig(r=4),
    "six": fa.LoRAConfig(r=3, alpha=5, targets=SIX),
    "biased": fa.LoRAConfig(r=4, targets=("key", "pooler.dense"), bias="all"),
    "dora": fa.LoRAConfig(r=4, targets=("query", "output"), dora=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 2e-2}


def base_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items() if not k.startswith("fastadapt.")}


def assert_bits(model: nn.Module, bits: dict[str, torch.Tensor]) -> None:
    now = base_bits(model)
    assert list(now) == list(bits)
    for key, was in bits.items():
        assert now[key].dtype == was.dtype
        view = {4: torch.int32, 2: torch.int16, 8: torch.int64}[was.element_size()]
        assert torch.equal(now[key].view(view), was.view(view)), key


def adapted(dtype: torch.dtype = torch.float32, model_class=BertForSequenceClassification, **kinds) -> nn.Module:
    """A model with shaken LoRAs of these names; the first is active."""
    model = make(model_class).to(dtype)
    for i, (name, kind) in enumerate(kinds.items()):
        fa.adapt(model, KINDS[kind] if isinstance(kind, str) else kind, name=name)
        shake(model.fastadapt[name], seed=i)
    return fa.activate(model, next(iter(kinds)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merges_and_gives_every_bit_back(kind, dtype):
    model = adapted(dtype, a=kind)
    parameters = dict(model.named_parameters())
    before, wanted, flags = base_bits(model), output(model), trained(model)
    for i in range(8):
        assert fa.merge(model) is model
        now = dict(model.named_parameters())
        assert list(now) == list(parameters) and all(now[key] is p for key, p in parameters.items())
        if i == 0:
            torch.testing.assert_close(output(model), wanted, rtol=0, atol=NEAR[dtype] * float(wanted.abs().max()))
            changed = {k for k, t in base_bits(model).items() if not torch.equal(t, before[k])}
            targets = {f"bert.{path}.weight" for path, p in model.fastadapt["a"].parts().items() if hasattr(p, "rank")}
            assert changed == targets
            assert not trained(model)
        shake(model.fastadapt["a"], std=0.01, seed=i)  # what happens to A and B meanwhile does not matter
        if kind == "dora":
            model.fastadapt["a"].encoder.layer._modules["0"].attention.self.query.lora_magnitude_vector.data.fill_(0)
        assert fa.unmerge(model) is model
        assert_bits(model, before)
        assert trained(model) == flags


@pytest.mark.parametrize("dtype", DTYPES)
def test_cycles_of_merge_swap_and_unmerge(dtype):
    model = adapted(dtype, a="two", b="two", c="six", d="dora")
    before = base_bits(model)
    outputs = {}
    for name in "abcd":
        fa.merge(model, name)
        outputs[name] = output(model), base_bits(model)
        fa.unmerge(model)
    fa.merge(model, "a")
    for name in "bacbdcadba":
        assert fa.swap(model, name) is model
        assert torch.equal(output(model), outputs[name][0])
        assert_bits(model, outputs[name][1])
    fa.unmerge(model)
    assert_bits(model, before)


@pytest.mark.parametrize("model_class", [*SEQUENCE, BertForMaskedLM], ids=lambda c: c.__name__)
def test_while_merged_the_forward_is_the_bare_models(model_class, monkeypatch):
    model = adapted(model_class=model_class, a="six")
    before, wanted = base_bits(model), output(model)
    fa.merge(model)
    calls = []
    true = ops.linear
    from fastadapt.modules import project

    monkeypatch.setattr(project.ops, "linear", lambda *a, **k: calls.append(k.get("loras")) or true(*a, **k))
    merged = output(model)
    # Four products a layer; in the last one, where position 0 alone is read, the query's is by itself.
    first_alone = model_class.__name__.endswith("SequenceClassification")
    assert len(calls) == 12 + first_alone and not any(calls)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=2e-5)
    assert {row.op for row in fa.explain(model).rows}.isdisjoint({"lora", "original"})
    assert "active adaptation: a (merged)" in str(fa.explain(model))
    # A stock model with these weights, and the adaptation's head, computes the same.
    stock = make(model_class)
    stock.load_state_dict(base_bits(model))
    fa.accelerate(stock)
    head = {"a": model.fastadapt["a"].head}
    for slot in ("classifier", "cls"):
        if slot in stock._modules:
            setattr(stock, slot, head["a"])
    assert torch.equal(output(stock), merged)
    fa.unmerge(model)
    assert_bits(model, before)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=0)


def test_own_biases_go_on_running():
    model = adapted(a="biased")
    wanted = output(model)
    fa.merge(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=2e-5)
    for layer in model.bert.encoder.layer:  # and where the fused forward is refused
        layer.attention.self.key.register_forward_hook(lambda m, a, out: None)
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_merges_as_one(dtype):
    model = adapted(dtype, a="two", b="six")
    fa.activate(model, ["a", "b"])
    before, wanted = base_bits(model), output(model)
    for given in (None, ["a", "b"]):
        fa.merge(model, given)
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=NEAR[dtype] * float(wanted.abs().max()))
        fa.swap(model, "a")
        fa.swap(model, ["a", "b"])
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=NEAR[dtype] * float(wanted.abs().max()))
        fa.unmerge(model)
        assert_bits(model, before)
        assert torch.equal(output(model), wanted)


def test_only_the_layers_in_which_it_runs():
    model = adapted(a="two")
    fa.activate(model, "a", skip_layers=[1])
    before, wanted = base_bits(model), output(model)
    fa.merge(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=2e-5)
    assert all(torch.equal(t, before[k]) for k, t in base_bits(model).items() if ".layer.1." in k)
    fa.unmerge(model)
    assert torch.equal(output(model), wanted)


def test_inexact_keeps_nothing():
    model = adapted(a="six")
    before, wanted = base_bits(model), output(model)
    fa.merge(model, exact=False)
    assert model.fastadapt.merged.residues is None and not model.fastadapt.merged.copies
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=2e-5)
    fa.unmerge(model)
    for key, t in base_bits(model).items():
        torch.testing.assert_close(t, before[key], rtol=0, atol=1e-6)
    assert any(not torch.equal(t, before[key]) for key, t in base_bits(model).items())


def test_what_is_kept_is_small():
    model = adapted(torch.bfloat16, a=fa.LoRAConfig(r=2, targets=SIX))
    fa.merge(model)
    record = model.fastadapt.merged
    weights = sum(w.numel() for w in record.weights())
    assert sum(r.nbytes for r in record.residues) <= 1.25 * weights  # the model is tiny; lists cost more than in BERT


@pytest.mark.parametrize("kind", ["six", "dora"])
def test_copies_and_pickles_unmerge_on_their_own(kind):
    model = adapted(a=kind)
    before = base_bits(model)
    fa.merge(model)
    merged, wanted = base_bits(model), output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bits(other, merged)
        assert torch.equal(output(other), wanted)
        fa.unmerge(other)
        assert_bits(other, before)
        assert trained(other)
        assert_bits(model, merged)
        fa.unload(other)
        assert torch.equal(output(other), output(make()))
    fa.unmerge(model)
    assert_bits(model, before)


def test_saving_a_merged_model(tmp_path):
    model = adapted(a="six")
    wanted = output(model)
    fa.save(model, tmp_path / "before")
    fa.merge(model)
    model.save_pretrained(tmp_path / "model")
    fa.save(model, tmp_path / "lora")
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert_bits(stock, base_bits(model))
    again = fa.load(make(), tmp_path / "lora")
    assert torch.equal(output(again), wanted)
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "lora" / file.name).read_bytes()


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bert.double()])
def test_conversions_unmerge_first(convert):
    model = adapted(a="six")
    bare, flags = make(), trained(model)
    fa.merge(model)
    convert(model)
    convert(bare)
    assert model.fastadapt.merged is None and trained(model) == flags
    assert_bits(model, base_bits(bare))
    with pytest.raises(ValueError, match="nothing is merged"):
        fa.unmerge(model)
    if model.classifier.weight.dtype == model.bert.pooler.dense.weight.dtype:
        output(model)
        fa.merge(model)


CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "double": (lambda m: m.double(), torch.float64),
    "meta": (lambda m: m.to("meta"), torch.float32),
}


@pytest.mark.parametrize("at", ["", "bert", "bert.encoder", "bert.encoder.layer", "bert.encoder.layer.1",
                                "bert.encoder.layer.1.attention", "bert.encoder.layer.1.attention.self"])  # fmt: skip
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_that_is_refused_changes_nothing(conversion, at):
    convert, dtype = CONVERSIONS[conversion]
    model = adapted(a="six")
    bare = make()
    fa.merge(model)
    query = model.bert.encoder.layer[1].attention.self.query
    counter = query.weight._version
    with torch.no_grad():
        query.weight.mul_(2)
    before = {key: (t.dtype, t.device, t._version) for key, t in model.state_dict(keep_vars=True).items()}
    wanted = output(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.query: its weight was written"):
            convert(model.get_submodule(at))
        after = {key: (t.dtype, t.device, t._version) for key, t in model.state_dict(keep_vars=True).items()}
        assert after == before and model.fastadapt.merged is not None
        assert torch.equal(output(model), wanted)
    with torch.no_grad():
        query.weight.mul_(0.5)
    model.fastadapt.merged.seen = None  # the bits are those of the merge again
    assert query.weight._version != counter
    convert(model)
    assert model.fastadapt.merged is None and {p.dtype for p in model.parameters()} == {dtype}
    assert not any("_apply" in vars(m) for m in model.modules())
    if conversion != "meta":
        convert(bare)
        assert_bits(model, base_bits(bare))


@pytest.mark.parametrize("model_class", [*SEQUENCE, BertForMaskedLM])
def test_no_part_of_any_model_is_converted_before_the_refusal(model_class):
    model = adapted(model_class=model_class, a="two")
    fa.swap(fa.merge(model), "a")
    with torch.no_grad():
        model.base_model.encoder.layer[2].attention.self.value.weight.add_(1)
    around = nn.Sequential(model)
    wanted = output(model)
    with pytest.raises(ValueError, match="was written"):
        around.half()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(output(model), wanted)


def test_a_conversion_of_what_lies_beside_merged_layers_leaves_them_merged():
    model = adapted(a="two")
    fa.merge(model)
    before = base_bits(model)
    for module in (model.classifier, model.bert.embeddings, model.bert.encoder.layer[0].output):
        module.double()
    assert model.fastadapt.merged is not None
    for module in (model.classifier, model.bert.embeddings, model.bert.encoder.layer[0].output):
        module.float()
    assert_bits(model, before)


def test_a_copy_that_is_converted_unmerges_itself_and_not_what_it_was_copied_from():
    model = adapted(a="two")
    bits, bare = base_bits(fa.merge(model)), base_bits(make().double())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.double()
        assert other.fastadapt.merged is None
        assert_bits(other, bare)
        assert model.fastadapt.merged is not None and not any("_apply" in vars(m) for m in other.modules())
    assert_bits(model, bits)


def test_conversions_that_change_nothing_leave_it_merged():
    model = adapted(a="six")
    before = base_bits(model)
    fa.merge(model)
    merged = base_bits(model)
    model.to("cpu").float().to(torch.float32)
    assert model.fastadapt.merged is not None
    assert_bits(model, merged)
    fa.unmerge(model)
    assert_bits(model, before)


def test_unload_without_merging_takes_it_out():
    model = adapted(a="six")
    before, stock = base_bits(model), output(make())
    fa.merge(model)
    fa.unload(model)
    assert_bits(model, before)
    assert torch.equal(output(model), stock) and "fastadapt" not in model._modules


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unload_with_merging(kind, merged):
    model = adapted(a=kind)
    before, wanted = snapshot(make()), output(model)
    if merged:
        fa.merge(model)
    assert fa.unload(model, merge=True) is model
    after = snapshot(model)
    assert after[0] == before[0] and list(after[1]) == list(before[1]) and after[2:] == before[2:]
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=2e-5)
    assert torch.equal(output(copy.deepcopy(model)), output(model))


def test_unload_with_merging_refuses_what_the_base_cannot_hold():
    model = make()
    fa.adapt(model, KINDS["two"], name="a", head=5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="another form than the model's own"):
        fa.unload(model, merge=True)
    assert_same(snapshot(model), before)


# -- refusals ----------------------------------------------------------------------------------------------------


def _merged(model):
    return fa.merge(model)


STATE = {
    "twice": (lambda m: fa.merge(m), ValueError, "'a' is merged already; accepted are unmerge and swap"),
    "twice_other": (lambda m: fa.merge(m, "b"), ValueError, "merged already"),
    "activate": (lambda m: fa.activate(m, "b"), ValueError, "'a' is merged into its weights.*unmerge.*swap"),
    "activate_none": (lambda m: fa.activate(m, None), ValueError, "unmerge"),
    "activate_skip": (lambda m: fa.activate(m, "a", skip_layers=[0]), ValueError, "unmerge"),
    "adapt": (lambda m: fa.adapt(m, KINDS["two"], name="n"), ValueError, "unmerge"),
    "remove": (lambda m: fa.remove(m, "a"), ValueError, "unmerge"),
    "swap_unknown": (lambda m: fa.swap(m, "x"), ValueError, "name: got 'x'"),
    "swap_none": (lambda m: fa.swap(m, None), TypeError, "unmerge"),
    "swap_bottleneck": (lambda m: fa.swap(m, "p"), ValueError, "PfeifferConfig's, which merges into no weight"),
    "swap_nan": (lambda m: fa.swap(m, "nan"), ValueError, "lora_A of encoder.layer.0.attention.self.query: holds NaN"),
    "swap_nan_six": (lambda m: fa.swap(m, "nan6"), ValueError, "holds NaN"),
}


@pytest.mark.parametrize("kind", STATE)
def test_what_is_refused_while_merged(kind):
    call, error, message = STATE[kind]
    model = adapted(a="two", b="two", nan="two", nan6="six")
    for name in ("nan", "nan6"):
        part = model.fastadapt[name].encoder.layer._modules["2" if name == "nan6" else "0"].attention.self.query
        part.lora_A.weight.data[1, 2] = float("nan")
    fa.adapt(model, METHODS["pfeiffer"], name="p")
    fa.activate(model, "a")
    clean = base_bits(model)
    fa.merge(model)
    merged, logits, flags = base_bits(model), output(model), trained(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_bits(model, merged)
    assert torch.equal(output(model), logits) and trained(model) == flags
    assert fa.activate(model, "a") is model  # as it is
    fa.remove(model, "b")
    fa.unmerge(model)
    assert_bits(model, clean)


def _break_meta(model):
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(query.weight.to("meta"), requires_grad=False)


def _break_strides(model):
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(query.weight.t().contiguous().t(), requires_grad=False)


def _break_sharing(model):
    layers = model.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight


def _break_memory(model):
    layers = model.bert.encoder.layer
    layers[1].attention.self.query.weight = nn.Parameter(layers[0].attention.self.query.weight.data, False)


def _break_dtype(model):
    model.bert.encoder.layer[1].attention.self.query.half()


def _break_double(model):
    model.double()


def _put(kind, value):
    def break_it(model):
        part = model.fastadapt["a"].encoder.layer._modules["2"].attention.self.value
        tensor = (
            model.bert.encoder.layer[2].attention.self.value.weight if kind == "weight" else getattr(part, kind).weight
        )
        tensor.data[0, 0] = value

    return break_it


BROKEN = {
    "meta": (_break_meta, "meta"),
    "strides": (_break_strides, "contiguous"),
    "sharing": (_break_sharing, "is that of encoder.layer.0.attention.self.query too"),
    "memory": (_break_memory, "shares memory"),
    "mixed": (_break_dtype, "one dtype is accepted"),
    "double": (_break_double, "float64"),
    "nan_a": (_put("lora_A", float("nan")), "lora_A of encoder.layer.2.attention.self.value: holds NaN"),
    "inf_b": (_put("lora_B", float("inf")), "lora_B of encoder.layer.2.attention.self.value: holds NaN"),
    "nan_w": (_put("weight", float("nan")), "weight of encoder.layer.2.attention.self.value: holds NaN"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("active", ["a", "b"])
def test_refused_merges_leave_the_model_as_it_was(kind, active):
    breaking, message = BROKEN[kind]
    model = adapted(a="two", b="two")
    breaking(model)
    fa.activate(model, active)
    kept = {k: (t.data_ptr(), t._version, t.clone()) for k, t in model.state_dict(keep_vars=True).items()}
    flags, classes = trained(model), [type(m) for m in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        fa.merge(model, "a")
    for key, t in model.state_dict(keep_vars=True).items():
        assert (t.data_ptr(), t._version) == kept[key][:2], key
        assert t.is_meta or torch.equal(t.nan_to_num(), kept[key][2].nan_to_num())
    assert trained(model) == flags and [type(m) for m in model.modules()] == classes
    assert model.fastadapt.active == active and model.fastadapt.merged is None


def test_a_dora_that_overflows_changes_nothing():
    model = adapted(torch.float16, a=fa.LoRAConfig(r=4, dora=True))
    part = model.fastadapt["a"].encoder.layer._modules["2"].attention.self.value
    part.lora_magnitude_vector.data.fill_(60000.0)
    part.lora_A.weight.data.mul_(1000)
    model.bert.encoder.layer[2].attention.self.value.weight.data[0] = 0
    part.lora_B.weight.data[0] = 0
    before = base_bits(model)
    with pytest.raises(ValueError, match="value: merging gives NaN or infinity"):
        fa.merge(model)
    assert_bits(model, before)


def test_other_refusals():
    model = make()
    with pytest.raises(ValueError, match="has no adaptation"):
        fa.merge(model)
    fa.adapt(model, METHODS["houlsby"], name="h")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'h', a HoulsbyConfig's, which merges into no weight.*activate"):
        fa.merge(model)
    with pytest.raises(ValueError, match="merges into no weight"):
        fa.unload(model, merge=True)
    with pytest.raises(ValueError, match="nothing is merged"):
        fa.unmerge(model)
    with pytest.raises(ValueError, match="nothing is merged"):
        fa.swap(model, "h")
    assert_same(snapshot(model), before)
    fa.adapt(model, KINDS["dora"], name="d")
    with pytest.raises(ValueError, match="exact: got False, but a DoRA"):
        fa.merge(model, exact=False)
    with pytest.raises(TypeError, match="exact: got 1"):
        fa.merge(model, exact=1)
    fa.activate(model, None)
    with pytest.raises(ValueError, match="no adaptation is active"):
        fa.merge(model)
    with pytest.raises(ValueError, match="BertModel belong to an adapted model"):
        fa.merge(model.bert)
    fa.activate(model, "d", skip_layers=[0, 1, 2])
    with pytest.raises(ValueError, match="runs in no layer"):
        fa.merge(model)


def test_weights_written_while_merged_are_noticed():
    model = adapted(a="two")
    state = copy.deepcopy(model.state_dict())
    fa.merge(model)
    merged = base_bits(model)
    with pytest.raises(RuntimeError, match="call unmerge before loading"):
        model.load_state_dict(state)
    assert_bits(model, merged)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight.mul_(2)
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.query: its weight was written"):
        fa.unmerge(model)
    with pytest.raises(ValueError, match="was written"):
        fa.swap(model, "a")


def test_nothing_trains_while_merged():
    model = adapted(a="two").train()
    fa.merge(model)
    loss = model(**batch(model, labels=True)).loss
    assert not loss.requires_grad
    fa.unmerge(model)
    model(**batch(model, labels=True)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_interrupted_swap_leaves_the_first_one_merged(monkeypatch):
    from fastadapt.modules import merged as module

    model = adapted(a="two", c="six")
    clean = base_bits(model)
    fa.merge(model)
    merged = base_bits(model)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge_", stop)
        with pytest.raises(KeyboardInterrupt):
            fa.swap(model, "c")
    assert_bits(model, merged)
    fa.unmerge(model)
    assert_bits(model, clean)


def test_an_unmerged_model_keeps_nothing_of_the_merge():
    def residues():
        return sum(type(o) is ops.Residue for o in gc.get_objects())

    model = fa.adapt(make(), fa.LoRAConfig(r=2), name="a")
    fa.adapt(model, fa.LoRAConfig(r=2), name="b")
    before = residues()
    fa.merge(model, "a")
    fa.swap(model, "b")
    assert residues() == before + len(model.fastadapt.merged.modules)
    fa.unmerge(model)
    assert residues() == before
