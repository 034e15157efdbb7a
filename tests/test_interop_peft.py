"""PEFT's folders: its own load to equal outputs and gradients, ours load in PEFT, broken ones change nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel

import fastadapt as fa
from fastadapt.modules.lora import LoRA
from tests.saved import assert_unchanged, saved_model, snapshot
from tests.tiny import METHODS, SEQUENCE, batch, make, output, shake

ROOT = Path(__file__).parent / "fixtures" / "peft"
CASES = json.loads((ROOT / "made_by.json").read_text())["cases"]
SIX = ("query", "key", "value", "attention_output", "intermediate", "output")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
by_name = {"ids": lambda c: c.__name__}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(ROOT / "expected.safetensors")


def inputs_of(expected) -> dict[str, torch.Tensor]:
    return {key: expected[key] for key in ("input_ids", "attention_mask")}


def objective(first: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1.0, 1.0, first.numel(), dtype=first.dtype).view_as(first)
    return (weights * first + 0.1 * first.square()).sum()


def in_file(model: torch.nn.Module, name: str, key: str) -> str:
    """PEFT's name of a parameter of the adaptation ``name``."""
    adaptation = model.fastadapt[name]
    head = f"fastadapt.{name}.head."
    if key.startswith(head):
        slot = next(s for s in ("classifier", "cls", "qa_outputs") if s in model._modules)
        return f"{slot}.{key.removeprefix(head)}"
    path, _, last = key.removeprefix(f"fastadapt.{name}.").rpartition(".")
    prefix = "" if isinstance(model, BertModel) else f"{model.base_model_prefix}."
    if last == "bias" and isinstance(adaptation.get_submodule(path), LoRA):
        return f"{prefix}{path}.base_layer.bias"
    return f"{prefix}{path}.{last}"


@pytest.mark.parametrize("case", CASES)
def test_reproduces_its_outputs_and_gradients(case, expected):
    model = saved_model(ROOT, CASES[case])
    bare = output(model, **inputs_of(expected))
    fa.load(model, ROOT / case, trainable=True)
    name = "task" if case == "named" else "default"
    assert fa.adaptations(model) == [name]
    out = model(**inputs_of(expected))[0]
    torch.testing.assert_close(out, expected[f"output.{case}"], rtol=1e-4, atol=2e-5)
    assert (out - bare).abs().max() > 0.1, "the case tests nothing"
    ours = {in_file(model, name, key): p for key, p in model.named_parameters() if p.requires_grad}
    theirs = {k.removeprefix(f"grad.{case}."): t for k, t in expected.items() if k.startswith(f"grad.{case}.")}
    # PEFT trains no head of a model whose task it does not know, but all biases, which are some of the head's.
    untold = {key for key in set(ours) - set(theirs) if case == "mlm" and key.startswith("cls.")}
    # And nothing reads a bare model's pooler here.
    untold |= {key for key in set(ours) - set(theirs) if case == "bare" and key.startswith("pooler.")}
    assert set(ours) - untold == set(theirs)
    ours = {key: p for key, p in ours.items() if key not in untold}
    grads = torch.autograd.grad(objective(out), list(ours.values()))
    for key, grad in zip(ours, grads, strict=True):
        scale = float(theirs[key].abs().max())
        torch.testing.assert_close(
            grad, theirs[key], rtol=1e-4, atol=1e-5 + 1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_writes_what_it_read(case, expected, tmp_path):
    model = saved_model(ROOT, CASES[case])
    fa.load(model, ROOT / case, name="mine")
    out = output(model, **inputs_of(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.save(model, tmp_path / "out", name="mine")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = fa.load(saved_model(ROOT, CASES[case]), tmp_path / "out")
    assert torch.equal(output(again, **inputs_of(expected)), out)
    file = ROOT / case / ("task" if case == "named" else "") / "adapter_model.safetensors"
    if file.exists():
        ours, theirs = load_file(tmp_path / "out" / file.name), load_file(file)
        rest = {k for k in theirs if ".original_module." in k or ".modules_to_save." in k}
        # The head of a model without a task is stored with the adapter; PEFT leaves it in the base.
        more = {k for k in ours if k.startswith("base_model.model.cls.")} if case == "mlm" else set()
        assert set(ours) - more == set(theirs) - rest - more
        assert all(torch.equal(ours[key], theirs[key]) for key in set(ours) & set(theirs))


@needs_peft
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_wrote(case, expected, tmp_path):
    import peft

    model = fa.load(saved_model(ROOT, CASES[case]), ROOT / case)
    fa.save(model, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as PEFT's own are
        theirs = peft.PeftModel.from_pretrained(saved_model(ROOT, CASES[case]), str(tmp_path / "out")).eval()
    torch.testing.assert_close(output(theirs, **inputs_of(expected)), expected[f"output.{case}"], rtol=1e-4, atol=2e-5)
    count = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert count == sum(p.numel() for n, p in model.fastadapt.named_parameters() if "lora_" in n)


@needs_peft
@pytest.mark.parametrize("model_class", SEQUENCE, **by_name)
@pytest.mark.parametrize(
    "config",
    [
        fa.LoRAConfig(),
        fa.LoRAConfig(r=4, alpha=6.5, targets=SIX, rslora=True, bias="lora_only"),
        fa.LoRAConfig(r=4, targets=("output",), dora=True, bias="all"),
        fa.LoRAConfig(r=4, targets=("query", "output"), rank_pattern={"output": 2, r"layer\.1\..*query": 7},
                      alpha_pattern={"query": 3}),
        fa.LoRAConfig(r=2, targets=("key", "encoder.layer.1.output.dense"), init="gaussian", dropout=0.1),
    ],
    ids=["default", "six", "dora", "patterns", "paths"],
)  # fmt: skip
def test_peft_reads_ours(model_class, config, tmp_path):
    import peft

    model = fa.adapt(make(model_class), config, name="ours")
    shake(model.fastadapt)
    fa.save(model, tmp_path / "ours")
    logits = output(model)
    theirs = peft.PeftModel.from_pretrained(make(model_class), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(theirs, **batch(make(model_class))), logits, rtol=1e-4, atol=1e-5)
    again = fa.load(make(model_class), tmp_path / "ours", trainable=True)
    assert torch.equal(output(again), logits)
    trained = {n.replace(".default.", ".ours.") for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in fa.load(make(model_class), tmp_path / "ours").parameters())


def test_a_head_of_another_width(tmp_path):
    model = fa.adapt(make(), fa.LoRAConfig(), name="a", head=5)
    shake(model.fastadapt)
    fa.save(model, tmp_path / "a")
    again = fa.load(make(), tmp_path / "a")
    assert again.num_labels == 5 and torch.equal(output(again), output(model))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]


def test_a_foreign_head_is_announced_as_unsaved(tmp_path):
    head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    model = fa.adapt(make(), fa.LoRAConfig(), name="a", head=head)
    with pytest.warns(UserWarning, match="not saved"):
        fa.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] is None
    again = fa.load(make(), tmp_path / "a")
    assert torch.equal(again.fastadapt["default"].head.weight, again.classifier.weight)


def test_bare_and_headed_models_read_each_other(tmp_path):
    headed = fa.adapt(make(), fa.LoRAConfig(targets=SIX), name="a")
    shake(headed.fastadapt)
    fa.save(headed, tmp_path / "headed")
    bare = make(BertModel)
    bare.load_state_dict({k.removeprefix("bert."): v for k, v in make().state_dict().items() if k.startswith("bert.")})
    fa.load(bare, tmp_path / "headed")
    wanted = headed.bert(**batch(headed))[0]
    assert torch.equal(bare(**batch(bare))[0], wanted)
    fa.save(bare, tmp_path / "bare")
    assert all(
        k.startswith("base_model.model.encoder.") for k in load_file(tmp_path / "bare" / "adapter_model.safetensors")
    )
    again = fa.load(make(), tmp_path / "bare")
    assert torch.equal(again.bert(**batch(again))[0], wanted)
    with pytest.warns(UserWarning, match="is of classifier"):
        fa.load(make(BertForMaskedLM), tmp_path / "headed")


def test_a_bare_model_reads_a_second_one_beside_its_first(tmp_path):
    first = make(BertModel)
    fa.adapt(first, fa.LoRAConfig(r=2, dora=True, bias="lora_only"), "a")
    shake(first.fastadapt["a"])
    fa.save(first, tmp_path, name="a")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "value"]  # by suffix, as PEFT's own default is
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = make(BertModel)
    for name in ("b", "c"):
        fa.load(model, tmp_path, name=name)
        torch.testing.assert_close(output(model), output(first))


def test_several_in_one_folder(tmp_path):
    for name in ("a", "b"):
        model = fa.adapt(make(), fa.LoRAConfig(), name=name)
        shake(model.fastadapt, seed=len(name))
        fa.save(model, tmp_path / "all" / name)
    model = make()
    with pytest.raises(ValueError, match=r"several adapters \(a, b\)"):
        fa.load(model, tmp_path / "all")
    fa.load(model, tmp_path / "all", name="b")
    assert fa.adaptations(model) == ["b"]
    fa.load(model, tmp_path / "all" / "a")
    assert fa.adaptations(model) == ["b", "default"]


def test_formats(tmp_path):
    model = fa.adapt(make(), METHODS["pfeiffer"], name="p")
    with pytest.raises(ValueError, match="format: got 'peft', which holds no PfeifferConfig"):
        fa.save(model, tmp_path / "p", format="peft")
    assert not (tmp_path / "p").exists()
    fa.save(model, tmp_path / "x")
    fa.adapt(model, fa.LoRAConfig(), name="l")
    fa.save(model, tmp_path / "x", format="peft")
    assert sorted(f.name for f in (tmp_path / "x").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(ROOT / "two", tmp_path / "x")
    return tmp_path / "x"


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def replace_weights(folder: Path, change) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


def rename(weights) -> None:
    key = min(weights)
    weights[key.replace("base_model.model.", "")] = weights.pop(key)


def put_nan(weights) -> None:
    weights[min(weights)][0] = float("nan")


BROKEN = {
    "config_truncated": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": '), "JSON"),
    "no_weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "neither"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 64), "truncated or corrupted"),
    "nan": (lambda f: replace_weights(f, put_nan), "NaN"),
    "missing_key": (lambda f: replace_weights(f, lambda w: w.pop(min(w))), "lacks bert.encoder"),
    "extra_key": (
        lambda f: replace_weights(f, lambda w: w.update({"base_model.model.bert.extra": torch.zeros(2)})),
        "extra",
    ),
    "foreign_key": (lambda f: replace_weights(f, rename), "begin with base_model.model."),
    "head_key": (
        lambda f: replace_weights(f, lambda w: w.pop("base_model.model.classifier.bias")),
        "lacks classifier.bias",
    ),
    "head_more": (
        lambda f: replace_weights(f, lambda w: w.update({"base_model.model.classifier.x": torch.zeros(2)})),
        "classifier.x",
    ),
    "rank": (lambda f: edit(f, r=5), "has shape"),
    "zero_rank": (lambda f: edit(f, r=0), "r: got 0"),
    "more_targets": (lambda f: edit(f, target_modules=["query", "key", "value"]), "lacks"),
    "fewer_targets": (lambda f: edit(f, target_modules=["query"]), "without a place"),
    "no_targets": (lambda f: edit(f, target_modules=["q_proj"]), "q_proj"),
    "null_targets": (lambda f: edit(f, target_modules=None), "target_modules"),
    "embeddings": (lambda f: edit(f, target_modules=["query", "word_embeddings"]), "word_embeddings"),
    "head_targeted": (lambda f: edit(f, target_modules=["query", "classifier"], modules_to_save=None), "on classifier"),
    "base_saved": (lambda f: edit(f, modules_to_save=["classifier", "pooler"]), "pooler is a part of the base"),
    "other_tuner": (lambda f: edit(f, peft_type="IA3"), "'IA3'"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "olora": (lambda f: edit(f, init_lora_weights="olora"), "olora"),
    "corda": (lambda f: edit(f, init_lora_weights="corda"), "corda"),
    "loftq": (lambda f: edit(f, init_lora_weights="loftq"), "loftq"),
    "lora_bias": (lambda f: edit(f, lora_bias=True), "lora_bias=True"),
    "replication": (lambda f: edit(f, layer_replication=[[0, 2]]), "layer_replication"),
    "parameters": (lambda f: edit(f, target_parameters=["x"]), "target_parameters"),
    "tokens": (lambda f: edit(f, trainable_token_indices=[3]), "trainable_token_indices"),
    "alora": (lambda f: edit(f, alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "qalora": (lambda f: edit(f, use_qalora=True), "use_qalora"),
    "brand_new": (lambda f: edit(f, brand_new={"x": 1}), "brand_new"),
    "patterns": (lambda f: edit(f, rank_pattern=[1]), "rank_pattern"),
    "bias": (lambda f: edit(f, bias="sometimes"), "bias: got 'sometimes'"),
    "bias_all": (lambda f: edit(f, bias="all"), "lacks"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_broken_folders_are_refused_and_change_nothing(kind, adapted, folder):
    breaking, message = BROKEN[kind]
    breaking(folder)
    model = saved_model(ROOT, "bert")
    if adapted:
        fa.adapt(model, METHODS["houlsby"], name="here")
    before, logits = snapshot(model), output(model)
    with pytest.raises(ValueError, match=message):
        fa.load(model, folder)
    assert_unchanged(model, before)
    assert torch.equal(output(model), logits)


def test_unknown_keys_at_their_defaults_are_tolerated(folder, expected):
    edit(folder, brand_new=None, other=False, third={}, fourth=[], fan_in_fan_out=True, eva_config=None)
    model = fa.load(saved_model(ROOT, "bert"), folder)
    torch.testing.assert_close(output(model, **inputs_of(expected)), expected["output.two"], rtol=1e-4, atol=2e-5)


def test_biases_that_early_versions_left_out(tmp_path, expected):
    shutil.copytree(ROOT / "bias_lora_only", tmp_path / "x")
    replace_weights(tmp_path / "x", lambda w: [w.pop(k) for k in list(w) if k.endswith("base_layer.bias")])
    model = fa.load(saved_model(ROOT, "bert"), tmp_path / "x")
    assert model.fastadapt["default"].config.bias == "none"


def test_a_model_of_other_sizes_is_refused(folder):
    for changes in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        model = saved_model(ROOT, "bert", **changes)
        before = snapshot(model)
        with pytest.raises(ValueError, match="path"):
            fa.load(model, folder)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="path"):
        fa.load(make(SEQUENCE[1]), folder)
