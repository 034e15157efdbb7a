"""The masked adapter against its equations, written out; its loss in the model's; its masks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import fastadapt as fa
from tests.test_methods_life import CLOSE, adapted
from tests.tiny import batch, make, output

HOULSBY = fa.MaskedAdapterConfig(bottleneck=8, mask_prob=0.4, mask_loss_weight=0.3)
PFEIFFER = fa.MaskedAdapterConfig(bottleneck=8, mask_prob=0.4, mask_loss_weight=0.3, placements=("output",),
                                  original_ln_before=True, activation="relu", train_layer_norm="none")  # fmt: skip


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return model


def written_out(model, masks, config, weights):
    """The stock model with the masked equation in its outputs; the cross-entropies go into a list."""
    plain = make(type(model), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    plain.requires_grad_(False)
    losses = []

    def forward_for(module, site, mask):
        def forward(hidden_states, input_tensor):
            f, x = module.dense(hidden_states), input_tensor
            norm = module.LayerNorm if site.LayerNorm is None else site.LayerNorm
            u = norm(f + x) if config.original_ln_before else f
            sigma = F.relu if config.activation == "relu" else F.gelu
            z = mask * sigma(site.down(u))
            o = z @ site.up.weight.T + site.up.bias
            logits = o @ site.mask_head.weight.T + site.mask_head.bias
            each = F.binary_cross_entropy_with_logits(logits, 1.0 - mask, reduction="none")
            losses.append((each * weights[..., None]).sum() / (weights.sum() * mask.shape[-1]))
            return norm(o + f + x)

        return forward

    for path, site in model.fastadapt["a"].parts().items():
        module = plain.bert.get_submodule(path)
        module.forward = forward_for(module, site, masks[path])
    plain.classifier = model.fastadapt["a"].head
    return plain, losses


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("config", [HOULSBY, PFEIFFER], ids=["houlsby", "pfeiffer"])
def test_equals_the_equations(config, padded, monkeypatch):
    model = without_dropout(adapted(config)).train()
    inputs = batch(model, labels=True)
    if not padded:
        del inputs["attention_mask"]
    masks, drawn = {}, []
    import fastadapt.modules.masked as masked

    honest = masked.ops.drop

    def recorded(x, p, **kwargs):
        y = honest(x, p, **kwargs)
        if p == config.mask_prob:
            drawn.append((y != 0).float())
        return y

    with monkeypatch.context() as patch:
        patch.setattr(masked.ops, "drop", recorded)
        ours = model(**inputs)
    masks = dict(zip(model.fastadapt["a"].parts(), drawn, strict=True))
    share = torch.cat([m.flatten() for m in drawn]).mean()
    assert abs(float(share) - 0.6) < 0.05
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    weights = inputs.get("attention_mask", torch.ones(3, 10)).float()
    plain, losses = written_out(model, masks, config, weights)
    theirs = plain(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    total = theirs.loss + config.mask_loss_weight * torch.stack(losses).mean()
    torch.testing.assert_close(ours.loss, total, **CLOSE)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("mask_head" in n for n in parameters)
    got = torch.autograd.grad(ours.loss, list(parameters.values()))
    wanted = torch.autograd.grad(total, list(parameters.values()))
    for name, a, b in zip(parameters, got, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-6 + 1e-4 * float(b.abs().max()), msg=lambda m, n=name: n + m
        )


def test_inference_is_a_plain_adapters():
    model = adapted(HOULSBY)
    plain = fa.adapt(make(), fa.HoulsbyConfig(bottleneck=8), name="a")
    kept = {k: t for k, t in model.fastadapt["a"].state_dict().items() if "mask_head" not in k and "neurons" not in k}
    plain.fastadapt["a"].load_state_dict(kept)
    torch.testing.assert_close(output(model), output(plain), rtol=0, atol=0)
    loss = model(**batch(model, labels=True)).loss
    torch.testing.assert_close(loss, plain(**batch(model, labels=True)).loss)


def test_fixed_masks(tmp_path):
    model = adapted(HOULSBY)
    whole = output(model)
    mask = torch.tensor([True, False] * 4)
    assert fa.keep_neurons(model, "a", mask) is model
    reference = adapted(HOULSBY)
    with torch.no_grad():
        for site in reference.fastadapt["a"].parts().values():
            site.up.weight[:, ~mask] = 0
    masked = output(model)
    torch.testing.assert_close(masked, output(reference), **CLOSE)
    assert not torch.allclose(masked, whole, atol=1e-4)
    with pytest.warns(UserWarning):
        fa.save(model, tmp_path / "a")
    assert torch.equal(output(fa.load(make(), tmp_path / "a")), masked)
    fa.keep_neurons(model, "a", {"encoder.layer.0.output": torch.ones(8, dtype=torch.bool)})
    assert not torch.equal(output(model), masked)
    fa.keep_neurons(model, "a", torch.ones(8, dtype=torch.bool))
    assert torch.equal(output(model), whole)


def test_counts_keep_the_mask_heads_apart():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    fa.adapt(model, fa.MaskedAdapterConfig(bottleneck=48), name="a")
    task = fa.parameter_report(model).tasks["a"]
    assert task.adapter == 1_789_056 and task.training_only == 24 * (48 * 768 + 48)
    assert task.layer_norm == 24 * 2 * 768


def test_the_loss_reaches_whoever_asks():
    model = without_dropout(adapted(HOULSBY)).train()
    inputs = batch(model, labels=True)
    torch.manual_seed(3)
    out = model(**inputs)
    torch.manual_seed(3)
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)
    torch.manual_seed(3)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    extra = fa.auxiliary_loss(model)
    torch.testing.assert_close(F.cross_entropy(logits, labels) + extra, out.loss)
    assert fa.auxiliary_loss(model) is None, "it is taken once"
    fa.activate(model, None)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, make().train()(**inputs, labels=labels).loss,
                               rtol=1, atol=1)  # fmt: skip
    assert "_AddLosses" not in {type(hook).__name__ for hook in model._forward_hooks.values()}
    assert "_Begin" not in {type(hook).__name__ for hook in model.bert._forward_pre_hooks.values()}


def test_copies_between_a_forward_and_its_loss():
    model = adapted(HOULSBY).train()
    model(input_ids=batch(model)["input_ids"])  # no labels: nobody has taken the loss
    other = copy.deepcopy(model)
    torch.testing.assert_close(output(other.eval()), output(model.eval()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = without_dropout(adapted(HOULSBY)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        losses = [model(**batch(model, rows, labels=True)).loss for rows in (3, 2)]
        (1024 * losses[0] + 3 * losses[1]).backward()  # as a GradScaler and an accumulation weigh them
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    assert all(grad.any() for name, grad in gradients[0].items() if "mask_head" in name)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-4)


def test_a_loss_that_joins_nothing_is_told():
    model = adapted(HOULSBY).train()
    inputs = batch(model)
    for _ in range(2):
        model(**inputs)
        assert fa.auxiliary_loss(model).requires_grad and fa.auxiliary_loss(model) is None
    model(**inputs)
    with pytest.warns(UserWarning, match="auxiliary_loss"):
        model(**inputs)


def test_trainer_adds_the_loss(tmp_path):
    model = without_dropout(adapted(HOULSBY))
    rows = [{"input_ids": r, "labels": torch.tensor(i % 3)} for i, r in enumerate(torch.randint(5, 90, (8, 6)))]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                                  save_strategy="no", disable_tqdm=True)  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if "mask_head" in n} <= moved
    assert all(n.startswith("fastadapt.a.") for n in moved)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fa.MaskedAdapterConfig(mask_prob=1.5), ValueError, "mask_prob"),
        (lambda m: fa.MaskedAdapterConfig(mask_prob=float("nan")), ValueError, "mask_prob: got nan"),
        (lambda m: fa.MaskedAdapterConfig(mask_loss_weight=-1), ValueError, "mask_loss_weight"),
        (lambda m: fa.MaskedAdapterConfig(mask_loss_weight=float("nan")), ValueError, "mask_loss_weight: got nan"),
        (lambda m: fa.MaskedAdapterConfig(mask_loss_weight=float("inf")), ValueError, "mask_loss_weight: got inf"),
        (lambda m: fa.MaskedAdapterConfig(mask_loss_weight=None), TypeError, "mask_loss_weight: got None"),
        (lambda m: fa.MaskedAdapterConfig(scale=float("nan")), ValueError, "scale: got nan"),
        (lambda m: fa.keep_neurons(m, "a", torch.ones(7, dtype=torch.bool)), ValueError, r"masks.*\(7,\).*\(8,\)"),
        (lambda m: fa.keep_neurons(m, "a", torch.ones(8)), ValueError, "masks.*float32"),
        (lambda m: fa.keep_neurons(m, "a", {"pooler": torch.ones(8) > 0}), ValueError, "masks.*pooler"),
        (lambda m: fa.keep_neurons(m, "b", torch.ones(8) > 0), ValueError, "name.*'a'"),
        (lambda m: fa.keep_neurons(fa.adapt(m, fa.HeadConfig(), "h"), "h", torch.ones(8) > 0), ValueError, "no masks"),
    ],
)
def test_bad_input(call, error, message):
    model = adapted(HOULSBY)
    with pytest.raises(error, match=message):
        call(model)
