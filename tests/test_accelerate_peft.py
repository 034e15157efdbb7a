"""A live PEFT model in the fused sublayers: its outputs, gradients and switches, in whichever order they come."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastadapt as fa
from tests.tiny import SEQUENCE, batch, make, output

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SIX = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
KINDS = {
    "two": {"r": 4, "target_modules": ["query", "value"]},
    "six": {"r": 3, "lora_alpha": 5, "target_modules": SIX, "use_rslora": True},
    "biased": {"r": 4, "target_modules": ["key", "output.dense"], "bias": "all"},
    "pooled": {"r": 4, "target_modules": ["query", "dense"]},
}


def tuned(kind: str = "six", model_class=SEQUENCE[0], **options) -> nn.Module:
    """A PEFT model with two adapters that do something, the first active."""
    model = make(model_class, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = {**KINDS[kind], **options, "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    if config.get("bias", "none") == "none":
        other = {"r": 2, "target_modules": ["value", "intermediate.dense"], "task_type": "SEQ_CLS"}
        model.add_adapter("other", peft.LoraConfig(**other))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def pair(*args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(an accelerated one, one as PEFT runs it), of equal values."""
    return fa.accelerate(tuned(*args, **kwargs)), tuned(*args, **kwargs)


def assert_same_outputs(ours: nn.Module, theirs: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        a, b = ours(**batch(make())).logits, theirs(**batch(make())).logits
    torch.testing.assert_close(a, b, **CLOSE)
    return a


def ops_of(model: nn.Module) -> set[str]:
    with torch.no_grad():
        return {row.op for row in fa.explain(model).rows}


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, model_class):
    if kind == "pooled" and "Electra" in model_class.__name__:
        pytest.skip("ELECTRA has no pooler")
    ours, theirs = pair(kind, model_class)
    names = [n for n, _ in ours.named_parameters()]
    assert names == [n for n, _ in theirs.named_parameters()] and list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_outputs(ours, theirs)
    assert "original" not in ops_of(ours) and "lora" in ops_of(ours)
    inputs = batch(make(), labels=True)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad and "original_module" not in n}
    wanted = {n: p for n, p in theirs.named_parameters() if p.requires_grad and "original_module" not in n}
    assert list(trained) == list(wanted)
    grads = torch.autograd.grad(ours(**inputs).loss, list(trained.values()), allow_unused=True)
    for name, a, b in zip(
        trained,
        grads,
        torch.autograd.grad(theirs(**inputs).loss, list(wanted.values()), allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None), name
        if a is not None:
            scale = float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 + 1e-4 * scale, msg=lambda m, n=name: n + m)


def test_switching_disabling_and_several_at_once():
    ours, theirs = pair("two")
    first = assert_same_outputs(ours, theirs)
    for m in (ours, theirs):
        m.set_adapter("other")
    other = assert_same_outputs(ours, theirs)
    for m in (ours, theirs):
        for layer in m.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_adapter(["default", "other"])
    both = assert_same_outputs(ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        none = assert_same_outputs(ours, theirs)
        assert "lora" not in ops_of(ours)
    assert torch.equal(assert_same_outputs(ours, theirs), both)
    for m in (ours, theirs):
        m.set_adapter("default")
        for layer in m.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer) and "default" in layer.scaling:
                layer.scaling["default"] = 7.0
    scaled = assert_same_outputs(ours, theirs)
    values = [first, other, both, none, scaled]
    assert not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(values) for b in values[:i])
    for m in (ours, theirs):
        m.delete_adapter("other")
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["two", "six"])
def test_merging_and_unmerging_between_forwards(kind, safe):
    ours, theirs = pair(kind)
    first = assert_same_outputs(ours, theirs)
    for round in range(3):
        for m in (ours, theirs):
            m.merge_adapter(safe_merge=safe)
        if round < 2:
            torch.testing.assert_close(assert_same_outputs(ours, theirs), first, **CLOSE)
            assert "lora" not in ops_of(ours)
        # Other values of A, merged anew without a forward in between: the merged names are the same.
        for m in (ours, theirs):
            m.unmerge_adapter()
        if round == 0:
            torch.testing.assert_close(assert_same_outputs(ours, theirs), first, **CLOSE)
        for m in (ours, theirs):
            with torch.no_grad():
                for name, p in m.named_parameters():
                    if "lora_A.default" in name:
                        p.mul_(-1.0 if round == 1 else 1.0)
            m.merge_adapter(safe_merge=safe)
        merged = assert_same_outputs(ours, theirs)
        assert torch.allclose(merged, first, atol=1e-3) == (round == 0)
        for m in (ours, theirs):
            m.unmerge_adapter()
        assert_same_outputs(ours, theirs)
    for m in (ours, theirs):
        m.merge_adapter(["other"], safe_merge=safe)
    assert_same_outputs(ours, theirs)
    # Disabled while merged, PEFT unmerges in the forward.
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same_outputs(ours, theirs)
        assert_same_outputs(ours, theirs)
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(safe):
    ours, theirs = pair("six")
    first = assert_same_outputs(ours, theirs)
    ours, theirs = ours.merge_and_unload(safe_merge=safe), theirs.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(assert_same_outputs(ours, theirs), first, **CLOSE)
    assert ops_of(ours).isdisjoint({"lora", "original"})
    ours, theirs = pair("six")
    assert_same_outputs(ours, theirs)
    assert_same_outputs(ours.unload(), theirs.unload())


def test_a_training_loop_of_its_own():
    ours, theirs = pair("six")
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    before = {n: p.clone() for n, p in ours.named_parameters()}
    for _ in range(3):
        for m, optimizer in zip((ours, theirs), optimizers, strict=True):
            m.train()
            optimizer.zero_grad()
            m(**batch(make(), labels=True)).loss.backward()
            optimizer.step()
            m.eval()
        with torch.no_grad():
            a, b = ours(**batch(make())).logits, theirs(**batch(make())).logits
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= {n for n, p in ours.named_parameters() if p.requires_grad}


def test_dropout_is_its_modules():
    ours, theirs = pair("two", lora_dropout=0.5)
    calm = assert_same_outputs(ours, theirs)
    inputs = batch(make())
    ours.train()
    torch.manual_seed(0)
    first = output(ours, **inputs)
    assert not torch.allclose(first, calm, atol=1e-4) and not torch.equal(output(ours, **inputs), first)
    torch.manual_seed(0)
    assert torch.equal(output(ours, **inputs), first)
    for module in ours.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout.eval()
    torch.testing.assert_close(output(ours, **inputs), calm, **CLOSE)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "bias of its own"),
    ],
)
def test_what_is_no_plain_lora_runs_on(options, reason):
    ours, theirs = pair("two", **options)
    assert_same_outputs(ours, theirs)
    with torch.no_grad():
        why = {row.refused["fused"] for row in fa.explain(ours).rows if row.op == "original"}
    assert len(why) == 1 and reason in why.pop()
    for m in (ours, theirs):
        m.merge_adapter()
    assert_same_outputs(ours, theirs)
    assert "original" not in ops_of(ours)


def test_other_tuners_run_on():
    def ia3():
        config = peft.IA3Config(
            target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
        )
        model = peft.get_peft_model(make(), config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "ia3_l" in name:
                    p.mul_(1.5)
        return model

    ours, theirs = fa.accelerate(ia3()), ia3()
    assert_same_outputs(ours, theirs)
    with torch.no_grad():
        assert {r.refused["fused"] for r in fa.explain(ours).rows if r.op == "original"} == {
            "peft.tuners.ia3.layer.Linear stands in place of Linear"
        }


def test_hooks_and_mixed_batches_take_peft_s_own_path():
    ours, theirs = pair("two")
    names = ["default", "__base__", "other"]
    with torch.no_grad():
        a, b = (m(**batch(make()), adapter_names=names).logits for m in (ours, theirs))
    torch.testing.assert_close(a, b, **CLOSE)
    assert_same_outputs(ours, theirs)
    calls = []
    layer = ours.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.lora_A["default"].register_forward_hook(lambda *a: calls.append(1))
    assert_same_outputs(ours, theirs)
    assert calls == [1]


def test_layers_that_came_later_run_on_until_accelerated_again():
    model = fa.accelerate(make())
    config = peft.LoraConfig(**KINDS["two"], init_lora_weights=False, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(make(), config).eval()
    ours = peft.get_peft_model(model, config).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_same_outputs(ours, theirs)
    assert "original" in ops_of(ours)
    fa.accelerate(ours)
    assert_same_outputs(ours, theirs)
    assert "original" not in ops_of(ours)


def test_saving_copying_and_restoring(tmp_path):
    ours, theirs = pair("six")
    classes = [type(m) for m in theirs.modules()]
    first = assert_same_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    again = fa.load(make(hidden_dropout_prob=0.0), tmp_path / "ours")
    torch.testing.assert_close(output(again), first, **CLOSE)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(output(other, **batch(make())), first)
        other.merge_adapter()
        torch.testing.assert_close(output(other, **batch(make())), first, **CLOSE)
        assert torch.equal(output(ours, **batch(make())), first)
    assert fa.restore(ours) is ours
    assert [type(m) for m in ours.modules()] == classes
    assert torch.equal(output(ours, **batch(make())), output(theirs, **batch(make())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    ours, theirs = tuned("six").to(dtype), tuned("six").to(dtype)
    fa.accelerate(ours)
    with torch.no_grad():
        a, b = ours(**batch(make())).logits, theirs(**batch(make())).logits
    assert a.dtype == b.dtype
    tolerance = {torch.bfloat16: 0.05, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_autocast():
    ours, theirs = pair("six")
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(**batch(make(), labels=True)), theirs(**batch(make(), labels=True))
    torch.testing.assert_close(
        a.logits.float(), b.logits.float(), rtol=0, atol=0.05 * float(b.logits.detach().abs().max())
    )
    a.loss.backward()
    grads = [p.grad for n, p in ours.named_parameters() if "lora_" in n and ".default." in n]
    assert grads and all(g is not None and g.dtype == torch.float32 for g in grads)


def test_gradient_checkpointing():
    ours, theirs = pair("six")
    for m in (ours, theirs):
        m.train()
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m(**batch(make(), labels=True)).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if ".default." in name and p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-3, atol=1e-5)


def test_peft_is_not_imported():
    code = (
        "import sys, fastadapt as fa; from transformers import BertConfig, BertModel;"
        "m = fa.accelerate(BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2,"
        "intermediate_size=8, vocab_size=9))); fa.restore(m);"
        "assert not any(n == 'peft' or n.startswith('peft.') for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
