"""The fused sublayers in whole models: equal to the stock ones, and out of the way where they cannot serve."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, ElectraForSequenceClassification

import fastadapt as fa
from fastadapt.modules.sublayers import FusedOutput, FusedSelfAttention, FusedSublayer
from tests.tiny import ALL, METHODS, SEQUENCE, batch, make, output, shake

V5 = int(transformers.__version__.split(".")[0]) >= 5
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def fused(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FusedSublayer)]


def patched(model: nn.Module, adapted: nn.Module, name: str, method: str) -> nn.Module:
    """``model`` with the adaptation of ``adapted`` written out in plain PyTorch, for the three presets."""
    sites = adapted.fastadapt[name].parts()
    base = getattr(model, model.base_model_prefix)

    def forward_for(module: nn.Module, site):
        def forward(hidden_states, input_tensor):
            f, x = module.dropout(module.dense(hidden_states)), input_tensor
            norm = module.LayerNorm if site.LayerNorm is None else site.LayerNorm
            if method == "houlsby":
                return norm(site.up(F.gelu(site.down(f))) + f + x)
            read = x if method == "parallel" else norm(f + x)
            return norm(f + site.scale * site.up(F.relu(site.down(read))) + x)

        return forward

    for path, site in sites.items():
        module = base.get_submodule(path)
        module.forward = forward_for(module, site)
    for slot in ("classifier", "cls"):
        if slot in model._modules:
            setattr(model, slot, adapted.fastadapt[name].head)
    return model


@pytest.mark.parametrize("model_class", ALL, ids=lambda c: c.__name__)
def test_accelerate_and_restore(model_class):
    model = make(model_class)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    stock = output(model)
    assert fa.accelerate(model) is model
    assert len(fused(model)) == 4 + 4 * 3
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    accelerated = output(model)
    torch.testing.assert_close(accelerated, stock, **CLOSE)
    with torch.no_grad():
        assert not reasons(model)
    assert fa.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(output(model), stock)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_adapted_equals_the_equations(model_class, method, attention):
    if attention == "sdpa" and not V5 and model_class is ElectraForSequenceClassification:
        pytest.skip("transformers 4 has no such ELECTRA")
    model = fa.adapt(make(model_class, attn_implementation=attention), METHODS[method], name="a")
    shake(model.fastadapt)
    reference = make(model_class, attn_implementation=attention)
    reference.requires_grad_(False)
    reference = patched(reference, model, "a", method)
    inputs = batch(model, labels=True)
    ours, theirs = model(**inputs), reference(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(ours.loss, list(trained.values()))
    wanted = torch.autograd.grad(theirs.loss, list(trained.values()))
    for name, a, b in zip(trained, grads, wanted, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 + 1e-4 * scale, msg=lambda m, n=name: n + m)


def test_the_gradient_stops_below_the_lowest_adapter():
    config = fa.HoulsbyConfig(bottleneck=8, leave_out=(0, 1), train_layer_norm="none")
    model = fa.adapt(make(), config).train()
    needs = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(
            lambda m, a, out: needs.append((out if isinstance(out, torch.Tensor) else out[0]).requires_grad)
        )
    model(**batch(model))
    assert needs == [False, False, True]


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("where", ["right", "left", "none", "all_of_a_row"])
def test_padding(model_class, where):
    model = make(model_class)
    inputs = batch(model)
    mask = torch.ones_like(inputs["attention_mask"])
    if where == "right":
        mask[0, 3:] = 0
    elif where == "left":
        mask[0, :4] = 0
    elif where == "all_of_a_row":
        mask[0] = 0
    inputs["attention_mask"] = mask
    stock = output(model, **inputs)
    fused_rows = output(fa.accelerate(model), **inputs)
    rows = slice(1, None) if where == "all_of_a_row" else slice(None)  # stock itself disagrees between versions there
    torch.testing.assert_close(fused_rows[rows], stock[rows], **CLOSE)
    assert torch.isfinite(fused_rows).all()


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions(attention, adapted):
    model = make(attn_implementation=attention)
    inputs = {**batch(model), "output_hidden_states": True, "output_attentions": attention == "eager" or not V5}
    with torch.no_grad():
        stock = model(**inputs)
        if adapted:
            fa.adapt(model, METHODS["parallel"])  # W_up is zero: the bare model's outputs
        else:
            fa.accelerate(model)
        ours = model(**inputs)
    assert len(ours.hidden_states) == 4
    for a, b in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    if inputs["output_attentions"]:
        assert len(ours.attentions) == len(stock.attentions) == 3
        for a, b in zip(ours.attentions, stock.attentions, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_attentions_asked_for_in_the_configuration():
    model = fa.accelerate(make(attn_implementation="eager"))
    model.config.output_attentions = True
    with torch.no_grad():
        out = model(**batch(model))
    assert len(out.attentions) == 3 and out.attentions[0].shape == (3, 4, 10, 10)


def test_inputs_embeds_and_position_ids():
    model = make()
    embeds = torch.randn(2, 6, 32)
    kwargs = {"inputs_embeds": embeds, "position_ids": torch.arange(6).flip(0).unsqueeze(0)}
    stock = output(model, **kwargs)
    torch.testing.assert_close(output(fa.accelerate(model), **kwargs), stock, **CLOSE)


# -- where the original path has to run --------------------------------------------------------------------------


def reasons(model: nn.Module) -> set[str]:
    return {row.refused["fused"] for row in fa.explain(model).rows if row.op == "original"}


def test_training_the_base_takes_the_original_path():
    model, stock = fa.accelerate(make()), make()
    inputs = batch(model, labels=True)
    assert reasons(model) == {"its weight requires a gradient"}
    for m in (model, stock):
        m(**inputs).loss.backward()
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    with torch.no_grad():
        assert not reasons(model)


def test_a_replaced_linear_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for path in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
        model = make()
        layer = model.bert.encoder.layer[1]
        layer.get_submodule(path).__class__ = Doubled
        stock = output(model)
        assert not torch.allclose(stock, output(make()), atol=1e-3)
        with torch.no_grad():
            fa.accelerate(model)
            assert reasons(model) == {"Doubled stands in place of Linear"}
        torch.testing.assert_close(output(model), stock, **CLOSE)


def test_hooks_on_children_are_called():
    model = fa.adapt(make(), METHODS["parallel"])
    stock = output(model)
    calls = []
    layer = model.bert.encoder.layer[0]
    for path in ("attention.self.value", "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense",
                 "output.dense", "output.dropout", "output.LayerNorm"):  # fmt: skip
        layer.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: calls.append(path))
    torch.testing.assert_close(output(model), stock, **CLOSE)
    assert len(calls) == len(set(calls)) == 7


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_runs_behind_a_replaced_dense(method):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = fa.adapt(make(), METHODS[method], name="a")
    shake(model.fastadapt)
    reference = patched(make(), model, "a", method)
    for m in (model, reference):
        for layer in m.bert.encoder.layer:
            layer.output.dense.__class__ = Doubled
    torch.testing.assert_close(output(model), output(reference), **CLOSE)


@pytest.mark.parametrize(
    "activation", ["relu", "gelu", "gelu_new", "silu", "tanh", "quick_gelu", "gelu_10", F.gelu, torch.sin]
)
def test_activations_of_the_model(activation):
    # A callable cannot be stored in every version's configuration: it is put into the layers.
    model = make(hidden_act=activation if isinstance(activation, str) else "gelu")
    if not isinstance(activation, str):
        for layer in model.bert.encoder.layer:
            del layer.intermediate.intermediate_act_fn
            layer.intermediate.intermediate_act_fn = activation
    stock = output(model)
    with torch.no_grad():
        fa.accelerate(model)
        assert bool(reasons(model)) == (activation in ("quick_gelu", "gelu_10", F.gelu, torch.sin))
    torch.testing.assert_close(output(model), stock, **CLOSE)


@pytest.mark.skipif(V5, reason="transformers 5 has none of these")
@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions(kind):
    model = make(position_embedding_type=kind)
    stock = output(model)
    with torch.no_grad():
        fa.accelerate(model)
        assert reasons(model) == {f"position embeddings are {kind}"}
    torch.testing.assert_close(output(model), stock, **CLOSE)


@pytest.mark.skipif(V5, reason="transformers 5 has no head masks")
def test_head_mask():
    model = make()
    kwargs = {**batch(model), "head_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0]] * 3)}
    stock = output(model, **kwargs)
    assert not torch.allclose(stock, output(model), atol=1e-4)
    torch.testing.assert_close(output(fa.accelerate(model), **kwargs), stock, **CLOSE)


def test_decoder_with_cache():
    model = make(BertModel, is_decoder=True)
    ids = batch(model)["input_ids"]
    with torch.no_grad():
        stock = model(ids).last_hidden_state
        fa.accelerate(model)
        ours = model(ids).last_hidden_state
        torch.testing.assert_close(ours, stock, **CLOSE)
        start = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=start.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, stock[:, 6:], **CLOSE)


def test_chunked_feed_forward():
    model = make(chunk_size_feed_forward=2)
    stock = output(model)
    torch.testing.assert_close(output(fa.accelerate(model)), stock, **CLOSE)


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
def test_a_layer_called_alone_gives_what_the_original_gives(model_class):
    model = make(model_class)
    layer = getattr(model, model.base_model_prefix).encoder.layer[1]
    original, x = type(layer), torch.randn(2, 5, 32)
    with torch.no_grad():
        stock = layer(x)
        fa.accelerate(model)
        assert type(layer) is not original
        ours = layer(x)
        assert type(ours) is type(stock)
        ours, stock = (y[0] if isinstance(y, tuple) else y for y in (ours, stock))
        torch.testing.assert_close(ours, stock, **CLOSE)
    assert type(fa.restore(model) and layer) is original


@pytest.mark.parametrize("what", ["hook", "forward", "feed-forward", "class"])
def test_what_stands_in_a_layer_is_called(what):
    model = fa.accelerate(make())
    layer, calls = model.bert.encoder.layer[1], []
    stock = output(model)

    def told(function):
        @functools.wraps(function)
        def tell(*args, **kwargs):
            calls.append(what)
            return function(*args, **kwargs)

        return tell

    if what == "hook":
        layer.attention.register_forward_hook(lambda *_: calls.append(what))
    elif what == "forward":
        layer.attention.forward = told(layer.attention.forward)
    elif what == "feed-forward":
        layer.feed_forward_chunk = told(layer.feed_forward_chunk)
    else:
        kind = type(layer.attention)
        layer.attention.__class__ = type("Told", (kind,), {"forward": told(kind.forward)})
    torch.testing.assert_close(output(model), stock, **CLOSE)
    assert calls == [what]


@pytest.mark.skipif(V5, reason="transformers 5 prunes no heads")
def test_pruned_heads():
    model = make()
    model.prune_heads({0: [1], 2: [0, 3]})
    stock = output(model)
    torch.testing.assert_close(output(fa.accelerate(model)), stock, **CLOSE)


# -- the ecosystem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [*SEQUENCE, BertForMaskedLM], ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_are_whole(model_class, method):
    model = fa.adapt(make(model_class), METHODS[method], name="a")
    fa.adapt(model, METHODS["houlsby"], name="b")
    fa.activate(model, "a")
    shake(model.fastadapt)
    before = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), before)
        ours = {id(p) for p in model.parameters()}
        assert not any(id(p) in ours for p in other.parameters())
        if model_class is BertForMaskedLM:
            decoder = other.fastadapt["a"].head.predictions.decoder
            assert decoder.weight is other.get_input_embeddings().weight
        # The copy's sublayers run the copy's own parameters.
        shake(other.fastadapt, seed=5)
        assert not torch.allclose(output(other), before, atol=1e-4)
        assert torch.equal(output(model), before)
        fa.activate(other, None)
        stock = output(make(model_class))
        torch.testing.assert_close(output(other), stock, **CLOSE)
        fa.unload(other)
        assert torch.equal(output(other), stock)


@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
def test_compiles_in_one_graph(model_class):
    model = fa.adapt(make(model_class), METHODS["houlsby"])
    shake(model.fastadapt)
    inputs = batch(model)
    eager = output(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, eager, **CLOSE)
    # A change of the active adaptation is seen by compiled code.
    fa.activate(model, None)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, output(make(model_class)), **CLOSE)


def test_compiled_training_step():
    model = fa.adapt(make(), METHODS["houlsby"]).train()
    shake(model.fastadapt)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = batch(model, labels=True)
    eager = torch.autograd.grad(model(**inputs).loss, [p for p in model.parameters() if p.requires_grad])
    torch._dynamo.reset()
    loss = torch.compile(model, backend="aot_eager")(**inputs).loss
    compiled = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    model = fa.adapt(make(), METHODS[method]).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    shake(model.fastadapt, std=0.05)
    inputs = batch(model, labels=True)
    exact = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
        hidden = model.bert(**batch(model)).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.float(), exact.logits, rtol=0.1, atol=0.1)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = make().to(dtype)
    stock = output(model)
    fa.adapt(model, METHODS["parallel"])
    tolerance = {torch.bfloat16: 0.06, torch.float16: 0.01, torch.float64: 1e-9}[dtype]
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(output(model), stock, rtol=tolerance, atol=tolerance)
    moved = fa.adapt(make(), METHODS["parallel"]).to(dtype)
    torch.testing.assert_close(output(moved), stock, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not_reentrant", "default"])
@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(model_class, method, reentrant):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = fa.adapt(make(model_class), METHODS[method]).train()
        shake(model.fastadapt)
        if checkpointed:
            kwargs = None if reentrant is None else {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        torch.manual_seed(11)  # dropout is on, and has to be the same when recomputed
        model(**batch(model, labels=True)).loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert list(plain) == list(checkpointed)
    for name, grad in plain.items():
        assert checkpointed[name] is not None, name
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)


def test_checkpointing_a_bare_accelerated_model_is_left_alone():
    model = fa.accelerate(make()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch(model, labels=True)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_optimizer_step_on_the_base_is_seen():
    model = make()
    stock = make()
    fa.accelerate(model)
    output(model)  # weights are packed
    with torch.no_grad():
        for m in (model, stock):
            for p in m.parameters():
                p.mul_(1.1)
    torch.testing.assert_close(output(model), output(stock), **CLOSE)
    for m in (model, stock):
        for p in m.parameters():
            p.data.mul_(1.1)  # unseen by the version counter
    assert fa.refresh(model) is model
    torch.testing.assert_close(output(model), output(stock), **CLOSE)


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("what", ["adaptation", "base"])
def test_every_kind_of_optimizer_is_seen(what, kind):
    """Fused optimizers write weights without moving their version counters: no stale copy may be used after."""
    model = make()
    fa.adapt(model, METHODS["houlsby"]) if what == "adaptation" else fa.accelerate(model)
    before = output(model)  # weights are packed
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **kind)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(model, labels=True)).loss.backward()
        optimizer.step()
        after = output(model)
        with fa.backend("reference"):
            torch.testing.assert_close(after, output(model), **CLOSE)
    assert not torch.allclose(after, before, atol=1e-2)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = fa.adapt(make(), METHODS["houlsby"])
    shake(model.fastadapt)
    inputs = batch(model, labels=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    alone = torch.autograd.grad(model(**inputs).loss, list(trained.values()))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(**inputs).loss.backward()
    finally:
        dist.destroy_process_group()
    for (name, p), grad in zip(trained.items(), alone, strict=True):
        torch.testing.assert_close(p.grad, grad, msg=lambda m, n=name: n + m)


def test_unwired_models_are_refused():
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    for verb in (fa.accelerate, fa.restore, lambda m: fa.adapt(m, METHODS["houlsby"])):
        with pytest.raises(ValueError, match=r"distilbert.*bert, roberta, electra"):
            verb(DistilBertModel(config))
        with pytest.raises(TypeError, match=r"Linear.*bert, roberta, electra"):
            verb(nn.Linear(2, 2))


def test_isinstance_goes_on():
    from transformers.models.bert import modeling_bert as hf

    model = fa.adapt(make(), METHODS["houlsby"])
    layer = model.bert.encoder.layer[0]
    assert isinstance(model, BertForSequenceClassification) and isinstance(layer, hf.BertLayer)
    attention = layer.attention.self
    assert isinstance(attention, hf.BertSelfAttention) and isinstance(attention, FusedSelfAttention)
    assert isinstance(layer.output, hf.BertOutput) and isinstance(layer.output, FusedOutput)
    assert isinstance(model.classifier, nn.Linear)
