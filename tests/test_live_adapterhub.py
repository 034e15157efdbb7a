"""``fa.accelerate`` on a live model of AdapterHub's library: its logits, its gradients, its calls."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import BertForSequenceClassification

import fastadapt as fa
from tests.tiny import SEQUENCE, batch, make, output

adapters = pytest.importorskip("adapters")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

CONFIGS = {
    "houlsby": lambda: adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": lambda: adapters.SeqBnConfig(reduction_factor=4),
    "gate": lambda: adapters.SeqBnConfig(reduction_factor=4, use_gating=True, scaling="learned"),
    "ln_before": lambda: adapters.DoubleSeqBnConfig(reduction_factor=4, ln_before=True),
    "parallel": lambda: adapters.ParBnConfig(reduction_factor=4),
    "prefix": lambda: adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=6),
    "mam": lambda: adapters.MAMConfig(adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6)),
    "lora": lambda: adapters.LoRAConfig(r=4, alpha=8, intermediate_lora=True, output_lora=True),
}
REFUSED = {
    "gated_lora": lambda: adapters.LoRAConfig(r=4, use_gating=True),
    "ia3": lambda: adapters.IA3Config(),
    "dora": lambda: adapters.LoRAConfig(use_dora=True),
    "compacter": lambda: adapters.CompacterConfig(phm_dim=2, reduction_factor=4),
    "gated_prefix": lambda: adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6, use_gating=True),
}


def live(config, names=("a",), model_class=BertForSequenceClassification):
    model = make(model_class, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=config())
    if len(names) > 1 and isinstance(config(), adapters.SeqBnConfig):
        model.add_adapter_fusion(adapters.Fuse(*names))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if any(f".{kind}." in key for kind in ("adapters", "loras", "prefix_tunings", "prefix_gates")):
                p.add_(0.2 * torch.randn(p.shape))
            elif "adapter_fusion_layer" in key:
                p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def kinds(model) -> dict[str, str]:
    """Path of a sublayer -> why its original forward runs."""
    with torch.no_grad():
        return {r.path: r.refused["fused"] for r in fa.explain(model).rows if "fused" in r.refused}


def gradients(model):
    model.zero_grad()
    loss = model(**batch(model, labels=True)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", CONFIGS)
def test_one_adapter(method, model_class):
    model = live(CONFIGS[method], model_class=model_class)
    keys, stock = list(model.state_dict()), output(model)
    model.train_adapter("a")
    parameters = {n: id(p) for n, p in model.named_parameters()}
    expected = output(model.eval())
    assert (expected - stock).abs().max() > 1e-3, "the case tests nothing"
    wanted = gradients(model.train())
    fa.accelerate(model)
    assert not kinds(model)
    assert list(model.state_dict()) == keys and {n: id(p) for n, p in model.named_parameters()} == parameters
    torch.testing.assert_close(output(model.eval()), expected, **CLOSE)
    loss, grads = gradients(model.train())
    torch.testing.assert_close(loss, wanted[0], **CLOSE)
    assert set(grads) == set(wanted[1])
    for name, grad in grads.items():
        other = wanted[1][name]
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6 + 2e-4 * float(other.abs().max()))
    model.eval()
    other = copy.deepcopy(model)
    torch.testing.assert_close(output(other), expected, **CLOSE)
    model.set_active_adapters(None)
    torch.testing.assert_close(output(model), stock, **CLOSE)
    model.set_active_adapters("a")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in grads:
                p.add_(0.1)
    moved = output(model)
    fa.restore(model)
    assert not any("fastadapt" in t.__module__ for m in model.modules() for t in type(m).__mro__)
    torch.testing.assert_close(output(model), moved, **CLOSE)
    assert not torch.allclose(moved, expected, atol=1e-4)


def test_a_fuse():
    names = ("a", "b", "c")
    model = live(CONFIGS["pfeiffer"], names)
    model.train_adapter_fusion(adapters.Fuse(*names))
    expected, wanted = output(model.eval()), gradients(model.train())
    fa.accelerate(model)
    assert not kinds(model)
    torch.testing.assert_close(output(model.eval()), expected, **CLOSE)
    _, grads = gradients(model.train())
    assert set(grads) == set(wanted[1])
    for name, grad in grads.items():
        other = wanted[1][name]
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6 + 2e-4 * float(other.abs().max()))
    model.eval().set_active_adapters("b")
    single = output(model)
    fa.restore(model)
    torch.testing.assert_close(output(model), single, **CLOSE)


def test_merging_is_seen():
    model = live(CONFIGS["lora"])
    model.set_active_adapters("a")
    expected = output(model)
    fa.accelerate(model)
    for _ in range(2):
        torch.testing.assert_close(output(model), expected, **CLOSE)
        model.merge_adapter("a")
        torch.testing.assert_close(output(model), expected, **CLOSE)
        model.reset_adapter()
    torch.testing.assert_close(output(model), expected, **CLOSE)
    model.set_active_adapters(None)
    torch.testing.assert_close(output(model), output(make()), **CLOSE)


def test_a_lora_added_later_is_seen():
    model = live(CONFIGS["pfeiffer"])
    fa.accelerate(model)
    torch.manual_seed(2)
    model.add_adapter("late", config=CONFIGS["lora"]())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".loras." in key:
                p.add_(0.2 * torch.randn(p.shape))
    model.eval().set_active_adapters("late")
    fused = output(model)
    fa.restore(model)
    torch.testing.assert_close(output(model), fused, **CLOSE)
    model.set_active_adapters(None)
    assert not torch.allclose(output(model), fused, atol=1e-3), "the case tests nothing"


def test_a_deleted_adapter_is_let_go():
    """Also where another has its name since, or a fusion that is left has mixed it."""
    model = fa.accelerate(live(CONFIGS["pfeiffer"], ("a", "b")))
    for setup in (adapters.Fuse("a", "b"), "b", "a"):
        model.set_active_adapters(setup)
        output(model)
    layer = model.bert.encoder.layer[0].output
    gone = [weakref.ref(layer.adapters[name]) for name in "ab"]
    for name in "ab":
        model.delete_adapter(name)
    model.add_adapter("b", config=CONFIGS["pfeiffer"]())
    output(model)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    model.add_adapter("a", config=CONFIGS["pfeiffer"]())
    model.eval().set_active_adapters(adapters.Fuse("a", "b"))
    fused = output(model)
    fusion = weakref.ref(layer.adapter_fusion_layer["a,b"])
    fa.restore(model)
    torch.testing.assert_close(output(model), fused, **CLOSE)
    fa.accelerate(model)
    output(model)
    model.delete_adapter_fusion("a,b")
    model.set_active_adapters("a")
    output(model)
    gc.collect()
    assert fusion() is None


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_accelerated_runs_on_as_it_was(method):
    model = live(REFUSED[method])
    model.set_active_adapters("a")
    expected = output(model)
    fa.accelerate(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    reasons = kinds(model)
    assert reasons and all(reasons.values())


@pytest.mark.parametrize("sizes", [[1, 1, 1], [0, 2, 1], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "gate", "ln_before", "parallel", "lora"])
def test_a_batch_split(method, sizes):
    names = ("a", "b", "c")
    model = live(CONFIGS[method], names)
    model.train_adapter(names)
    split = adapters.BatchSplit(*names, batch_sizes=sizes)
    model.set_active_adapters(split)
    expected, wanted = output(model.eval()), gradients(model.train())
    fa.accelerate(model)
    assert not kinds(model)
    with torch.inference_mode():
        model.eval()(**batch(model))  # what it keeps of the rows has to be good for training too
    torch.testing.assert_close(output(model), expected, **CLOSE)
    _, grads = gradients(model.train())
    zero = torch.zeros(())
    for name in grads.keys() | wanted[1].keys():  # a part of no rows has zeros or nothing
        ours, theirs = (found.get(name, zero) for found in (grads, wanted[1]))
        ours, theirs = torch.broadcast_tensors(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + 2e-4 * float(theirs.abs().max()))
    assert len(grads) > 3
    model.eval().set_active_adapters("b")
    single = output(model)
    fa.restore(model)
    torch.testing.assert_close(output(model), single, **CLOSE)


def test_a_batch_split_of_unlike_adapters_or_another_batch():
    model = live(CONFIGS["pfeiffer"], ("a", "b"))
    model.add_adapter("late", config=adapters.SeqBnConfig(reduction_factor=4, residual_before_ln=False))
    model.eval().set_active_adapters(adapters.BatchSplit("a", "late", batch_sizes=[1, 2]))
    expected = output(model)
    fa.accelerate(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    assert all("differ" in why for why in kinds(model).values()) and kinds(model)
    model.set_active_adapters(adapters.BatchSplit("a", "b", batch_sizes=[1, 1]))
    with pytest.raises(IndexError, match="batch_sizes: of the active BatchSplit sum to 2; accepted is 3"):
        output(model)


def test_a_batch_split_of_prefixes_runs_on_as_it_was():
    model = make()
    adapters.init(model)
    for name in ("a", "b"):
        model.add_adapter(name, config=CONFIGS["prefix"]())
    model.eval().set_active_adapters(adapters.BatchSplit("a", "b", batch_sizes=[1, 2]))
    expected = output(model)
    fa.accelerate(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    assert all("one of several" in why for why in kinds(model).values()) and kinds(model)


@pytest.mark.parametrize("block", ["Stack", "Parallel", "Split", "Average"])
def test_compositions_run_on_as_they_were(block):
    model = live(CONFIGS["pfeiffer"], ("a", "b"))
    options = {"Split": {"splits": [4, 6]}}.get(block, {})
    model.set_active_adapters(getattr(adapters, block if hasattr(adapters, block) else "Stack")("a", "b", **options))
    if block == "Average":
        from adapters.composition import Average

        model.set_active_adapters(Average("a", "b", weights=[0.5, 0.5]))
    expected = output(model)
    fa.accelerate(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    assert all(block in reason for path, reason in kinds(model).items() if path.endswith("output"))


def test_an_adaptation_of_ours_is_refused_there():
    model = fa.accelerate(live(CONFIGS["pfeiffer"]))
    with pytest.raises(ValueError, match="no fused class"):
        fa.adapt(model, fa.HoulsbyConfig())
    with pytest.raises(ValueError, match="no fused class"):
        fa.adapt(live(CONFIGS["pfeiffer"]), fa.HoulsbyConfig())
