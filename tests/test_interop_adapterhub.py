"""AdapterHub's folders: its own logits from its own files, and ours read by it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraForMaskedLM,
)

import fastadapt as fa
from tests.saved import assert_unchanged, saved_model, snapshot
from tests.tiny import METHODS, SEQUENCE, batch, make, output, shake

ROOT = Path(__file__).parent / "fixtures" / "adapterhub"
CASES: dict[str, str] = json.loads((ROOT / "made_by.json").read_text())["cases"]


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(ROOT / "expected.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_reproduces_its_logits(case, expected):
    model = saved_model(ROOT, CASES[case])
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask")}
    bare = output(model, **inputs)
    fa.load(model, ROOT / case)
    assert fa.adaptations(model) == ["task"]
    logits = output(model, **inputs)
    torch.testing.assert_close(logits, expected[f"logits.{case}"], rtol=1e-4, atol=2e-5)
    assert (logits - bare).abs().max() > 0.1, "the case tests nothing"


def test_reproduces_a_fusion(expected, tmp_path):
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask")}
    model = saved_model(ROOT, "bert")
    with pytest.raises(ValueError, match="adapters.*'a', 'b', 'c'.*known are none"):
        fa.load(model, ROOT / "fusion" / "mix")
    for name in "abc":
        fa.load(model, ROOT / "fusion" / name)
    single = output(model, **inputs)
    fa.load(model, ROOT / "fusion" / "mix")
    assert fa.adaptations(model) == ["a", "b", "c", "a,b,c"]
    logits = output(model, **inputs)
    torch.testing.assert_close(logits, expected["logits.fusion"], rtol=1e-4, atol=2e-5)
    assert (logits - single).abs().max() > 0.05, "the case tests nothing"
    fa.save(model, tmp_path / "mix")
    theirs = load_file(ROOT / "fusion" / "mix" / "model_adapter_fusion.safetensors")
    ours = load_file(tmp_path / "mix" / "model_adapter_fusion.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], t) for key, t in theirs.items())


@pytest.mark.parametrize("case", CASES)
def test_writes_what_it_read(case, expected, tmp_path):
    model = saved_model(ROOT, CASES[case])
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask")}
    fa.load(model, ROOT / case, name="mine")
    logits = output(model, **inputs)
    if case == "lora_left_out":
        with pytest.raises(ValueError, match="format.*target"):
            fa.save(model, tmp_path / "out", name="mine", format="adapterhub")
        return
    fa.save(model, tmp_path / "out", name="mine", format="adapterhub")
    again = fa.load(saved_model(ROOT, CASES[case]), tmp_path / "out")
    assert fa.adaptations(again) == ["mine"]
    assert torch.equal(output(again, **inputs), logits)
    theirs = json.loads((ROOT / case / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(theirs) - {"type"} <= set(ours)
    if case != "legacy":
        assert set(theirs["config"]) == set(ours["config"])
        file = ROOT / case / "adapter.safetensors"
        if file.exists():
            renamed = {key.replace(".mine.", ".task."): t for key, t in load_file(tmp_path / "out" / file.name).items()}
            originals = load_file(file)
            assert set(renamed) == set(originals)
            assert all(torch.equal(renamed[key], t) for key, t in originals.items())


@pytest.mark.skipif(importlib.util.find_spec("adapters") is None, reason="AdapterHub's library is not installed")
@pytest.mark.parametrize("model_class", SEQUENCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "config",
    [
        fa.HoulsbyConfig(bottleneck=7, train_layer_norm="none"),
        fa.PfeifferConfig(bottleneck=5, activation="leaky_relu"),
        fa.ParallelConfig(reduction_factor=4),
        fa.PfeifferConfig(bottleneck=8, gate=True, ln_before=True, scale="learned"),
        fa.HoulsbyConfig(train_layer_norm="none", ln_after=True, scale="channel", leave_out=(1,), activation="none"),
        fa.PrefixConfig(length=3, bottleneck=5, leave_out=(1,)),
        fa.PrefixConfig(length=3, flat=True),
        fa.MAMConfig(fa.PrefixConfig(length=2, bottleneck=5), fa.ParallelConfig(bottleneck=8)),
        fa.LoRAConfig(r=3, alpha=6, targets=("query", "key", "output")),
    ],
    ids=["houlsby", "pfeiffer", "parallel", "gated", "double", "prefix", "flat", "mam", "lora"],
)
def test_it_reads_ours(model_class, config, tmp_path):
    import adapters

    model = make(model_class)
    fa.adapt(model, config, name="ours", head=4)
    shake(model.fastadapt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.save(model, tmp_path / "ours", format="adapterhub")
    logits = output(model)
    theirs = make(model_class, num_labels=4)
    base = {key: t for key, t in make(model_class).state_dict().items() if "classifier" not in key}
    theirs.load_state_dict(base, strict=False)
    adapters.init(theirs)
    theirs.load_adapter(str(tmp_path / "ours"), use_safetensors=True)
    theirs.set_active_adapters("ours")
    torch.testing.assert_close(output(theirs.eval()), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", range(1, 65))
def test_reduction_factor_gives_the_width_back(width):
    from fastadapt.interop.hub_bottleneck import to_hub

    for hidden in (32, 312, 384, 768, 1024):
        assert int(hidden // to_hub(fa.HoulsbyConfig(bottleneck=width), hidden)["reduction_factor"]) == width


@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertModel, BertForMaskedLM, ElectraForMaskedLM],
                         ids=lambda c: c.__name__)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(model_class, method, tmp_path):
    model = fa.adapt(make(model_class), METHODS[method], name="a")
    shake(model.fastadapt)
    before = output(model)
    if method == "houlsby":
        with pytest.warns(UserWarning, match="AdapterHub would compute something else"):
            fa.save(model, tmp_path / "a")
        assert (tmp_path / "a" / "fastadapt.json").is_file()
    else:
        fa.save(model, tmp_path / "a")
        assert not (tmp_path / "a" / "fastadapt.json").exists()
    again = fa.load(make(model_class), tmp_path / "a", name="b")
    assert torch.equal(output(again), before)
    assert not any(p.requires_grad for p in again.parameters())
    training = fa.load(make(model_class), tmp_path / "a", trainable=True)
    assert {n for n, p in training.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_bare_and_headed_models_read_each_other(tmp_path):
    headed = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    shake(headed.fastadapt)
    fa.save(headed, tmp_path / "headed")
    bare = make(BertModel)
    bare.load_state_dict({k.removeprefix("bert."): v for k, v in make().state_dict().items() if k.startswith("bert.")})
    fa.load(bare, tmp_path / "headed")
    expected = headed.bert(**batch(headed))[0]
    assert torch.equal(bare(**batch(bare))[0], expected)
    fa.save(bare, tmp_path / "bare")
    assert not (tmp_path / "bare" / "head_config.json").exists()
    again = fa.load(make(), tmp_path / "bare")
    assert torch.equal(again.bert(**batch(again))[0], expected)


def test_names_of_labels_are_kept(tmp_path):
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a", head=2)
    fa.save(model, tmp_path / "a")
    file = tmp_path / "a" / "head_config.json"
    config = json.loads(file.read_text())
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1} and config["num_labels"] == 2
    file.write_text(json.dumps({**config, "label2id": {"no": 0, "yes": 1}}))
    again = fa.load(make(), tmp_path / "a")
    assert again.num_labels == 2 and again.config.id2label == {0: "no", 1: "yes"}
    fa.save(again, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "head_config.json").read_text())["label2id"] == {"no": 0, "yes": 1}
    for strange in (
        ["no", "yes"],
        {"no": 0},
        {"no": 0, "yes": 2},
        {"no": "0", "yes": "1"},
        {"no": [0], "yes": 1},
        None,
    ):
        file.write_text(json.dumps({**config, "label2id": strange}))
        assert fa.load(make(), tmp_path / "a").config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_head_of_another_class_is_left_out_with_a_warning(tmp_path):
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    fa.save(model, tmp_path / "a")
    other = make(BertForTokenClassification)
    with pytest.warns(UserWarning, match="BertForSequenceClassification"):
        fa.load(other, tmp_path / "a")
    assert torch.equal(other.fastadapt["a"].head.weight, other.classifier.weight)


def test_a_foreign_head_is_announced_as_unsaved(tmp_path):
    head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a", head=head)
    with pytest.warns(UserWarning, match="not saved"):
        fa.save(model, tmp_path / "a")
    with pytest.warns(UserWarning, match="was not saved"):
        fa.load(make(), tmp_path / "a")


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(ROOT / "pfeiffer", tmp_path / "x")
    return tmp_path / "x"


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config.update(changes)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def edit_inner(folder: Path, **changes) -> None:
    edit(folder, config={**json.loads((folder / "adapter_config.json").read_text())["config"], **changes})


def truncate(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def replace_weights(folder: Path, change) -> None:
    weights = load_file(folder / "adapter.safetensors")
    change(weights)
    save_file(weights, folder / "adapter.safetensors")


def put_nan(weights) -> None:
    weights[min(weights)][0] = float("nan")


def evil_pickle(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    torch.save({"w": Path}, folder / "pytorch_adapter.bin")


def nested(depth: int) -> dict:
    config: dict = {}
    for _ in range(depth):
        config = {"method": "MAMConfig", "fields": {"prefix": config}}
    return config


BROKEN = {
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "config_truncated": (lambda f: (f / "adapter_config.json").write_text('{"config": {'), "JSON"),
    "config_deep": (lambda f: (f / "adapter_config.json").write_text('{"a":' * 2000 + "1" + "}" * 2000), "too deep"),
    "config_nested": (lambda f: edit(f, config=nested(200)), "adapter_config.json is nested too deep.*64"),
    "own_nested": (lambda f: (f / "fastadapt.json").write_text(json.dumps({"config": nested(200)})), "too deep"),
    "head_deep": (lambda f: (f / "head_config.json").write_text("[" * 2000 + "]" * 2000), "head_config.json.*too deep"),
    "config_a_list": (lambda f: (f / "adapter_config.json").write_text("[]"), "JSON object"),
    "no_weights": (lambda f: (f / "adapter.safetensors").unlink(), "neither"),
    "truncated": (truncate, "truncated or corrupted"),
    "garbage": (lambda f: (f / "adapter.safetensors").write_bytes(b"\x00" * 64), "truncated or corrupted"),
    "empty": (lambda f: (f / "adapter.safetensors").write_bytes(b""), "truncated or corrupted"),
    "nan": (lambda f: replace_weights(f, put_nan), "NaN"),
    "missing_key": (lambda f: replace_weights(f, lambda w: w.pop(min(w))), "lacks"),
    "extra_key": (lambda f: replace_weights(f, lambda w: w.update(extra=torch.zeros(2))), "extra"),
    "wrong_shape": (lambda f: replace_weights(f, lambda w: w.update({min(w): torch.zeros(5)})), "shape"),
    "hidden_size": (lambda f: edit(f, hidden_size=768), "hidden_size 768"),
    "architecture": (lambda f: edit(f, model_type="roberta"), "roberta"),
    "phm": (lambda f: edit_inner(f, phm_layer=True), "phm_layer"),
    "activation": (lambda f: edit_inner(f, non_linearity="quick_gelu"), "quick_gelu"),
    "lora": (lambda f: edit(f, config={"architecture": "lora"}), "lora"),
    "invertible": (lambda f: edit_inner(f, inv_adapter="nice"), "inv_adapter"),
    "unknown_field": (lambda f: edit_inner(f, brand_new=3), "brand_new"),
    "layer_left": (lambda f: edit_inner(f, leave_out=[1]), "without a place"),
    "layers_beyond": (lambda f: edit_inner(f, leave_out=[7]), "leave_out"),
    "width": (lambda f: edit_inner(f, reduction_factor=2), "shape"),
    "peft": (lambda f: edit(f, peft_type="LORA"), "its configuration sets"),
    "pickle": (evil_pickle, "tensors alone"),
    "head_truncated": (lambda f: (f / "model_head.safetensors").write_bytes(b"\x10"), "truncated or corrupted"),
    "head_width": (
        lambda f: save_file({"classifier.weight": torch.zeros(3, 9)}, f / "model_head.safetensors"),
        "classifier.weight",
    ),
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


def test_a_model_of_other_sizes_is_refused(folder):
    for changes in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        model = saved_model(ROOT, "bert", **changes)
        before = snapshot(model)
        with pytest.raises(ValueError, match="path"):
            fa.load(model, folder)
        assert_unchanged(model, before)


def test_path_and_format_are_checked(tmp_path):
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    with pytest.raises(ValueError, match="path"):
        fa.load(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"format.*adapterhub"):
        fa.save(model, tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match=r"name.*'a'"):
        fa.save(model, tmp_path / "out", name="b")
    with pytest.raises(ValueError, match="in use"):
        fa.save(model, tmp_path / "out")
        fa.load(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder"):
        fa.save(model, tmp_path / "file")
    fa.activate(model, None)
    with pytest.raises(ValueError, match="no adaptation is active"):
        fa.save(model, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    from fastadapt.interop import files

    model = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    fa.save(model, tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("the user's")
    old = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    shake(model.fastadapt)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            fa.save(model, tmp_path / "a")
        with pytest.raises(OSError, match="No space"):
            fa.save(model, tmp_path / "new")
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == old
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    fa.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() != old["adapter.safetensors"]
    assert (tmp_path / "a" / "notes.txt").exists()


SAVES = {
    "houlsby": METHODS["houlsby"],
    "pfeiffer": METHODS["pfeiffer"],
    "prefix": fa.PrefixConfig(length=2, bottleneck=4),
    "lora": fa.LoRAConfig(r=2),
    "bitfit": fa.BitFitConfig(),
    "masked": fa.MaskedAdapterConfig(bottleneck=4),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def two_saved(request, tmp_path):
    """A model with adaptations x and y, folders of both, and the folder ``a`` of x with a file of another program's."""
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in zip("xy", request.param, strict=True):
            fa.adapt(model, SAVES[kind], name=name)
            shake(model.fastadapt[name], seed=ord(name))
            fa.save(model, tmp_path / name, name=name)
        fa.save(model, tmp_path / "a", name="x")
        (tmp_path / "a" / "notes.txt").write_text("the user's")
        yield model


two_of = pytest.mark.parametrize(
    "two_saved",
    [("houlsby", "houlsby"), ("houlsby", "pfeiffer"), ("pfeiffer", "houlsby"), ("lora", "lora"), ("houlsby", "lora"),
     ("lora", "houlsby"), ("bitfit", "prefix"), ("prefix", "bitfit"), ("masked", "bitfit")],
    ids="-".join, indirect=True,
)  # fmt: skip


@two_of
def test_a_failure_between_two_files_leaves_the_old_folder(two_saved, tmp_path, monkeypatch):
    old, replace = contents(tmp_path / "a"), os.replace
    count = 0
    while True:
        left = [count]

        def full_disk(source, target, left=left):
            if left[0] == 0:
                raise OSError("No space left on device")
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full_disk)
            try:
                fa.save(two_saved, tmp_path / "a", name="y")
                break
            except OSError as error:
                assert str(error) == "No space left on device"
            assert contents(tmp_path / "a") == old
            if count < len(contents(tmp_path / "y")):
                with pytest.raises(OSError, match="No space"):
                    fa.save(two_saved, tmp_path / "new", name="y")
            assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "x", "y"]
        count += 1
    new = contents(tmp_path / "a")
    assert count > len(contents(tmp_path / "y"))
    assert new.items() >= (contents(tmp_path / "y") | {"notes.txt": b"the user's"}).items()


@two_of
def test_what_an_interrupted_save_leaves_is_refused(two_saved, tmp_path, monkeypatch):
    """The folder as it is between any two steps."""
    replace, seen = os.replace, []

    def watched(source, target):
        replace(source, target)
        seen.append(tmp_path / f"seen{len(seen)}")
        shutil.copytree(tmp_path / "a", seen[-1])

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        fa.save(two_saved, tmp_path / "a", name="y")
    assert contents(seen.pop()) == contents(tmp_path / "a") and len(seen) > 2
    for folder in seen:
        with pytest.raises(ValueError, match=r"lacks fastadapt\.json|has none of .*adapter_config\.json"):
            fa.load(make(), folder)


def test_former_files_that_cannot_be_put_back_are_kept(tmp_path, monkeypatch):
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    fa.save(model, tmp_path / "a")
    old, replace = contents(tmp_path / "a"), os.replace

    def device_gone(source, target, seen=[]):  # noqa: B006
        seen.append(target)
        if len(seen) > 2:
            raise OSError("device gone")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", device_gone)
        patch.setattr(Path, "rename", device_gone)
        with pytest.raises(OSError, match="device gone") as caught:
            fa.save(model, tmp_path / "a")
    (note,) = caught.value.__notes__
    kept = contents(Path(note.rpartition(" lies in ")[2]))
    assert len(kept) == 2 and contents(tmp_path / "a") | kept == old
    with pytest.raises(ValueError, match=r"has none of .*adapter_config\.json"):
        fa.load(make(), tmp_path / "a")


def test_a_folder_with_nothing_writable_beside_it_is_saved_to(tmp_path, monkeypatch):
    """A mounted volume, say."""
    model, folder = fa.adapt(make(), METHODS["pfeiffer"], name="a"), tmp_path / "a"
    fa.save(model, folder)
    old, may = contents(folder), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and may(path, mode))
    made = []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda make=tempfile.mkdtemp, **o: made.append(make(**o)) or made[-1])
    fa.save(model, folder)
    assert [Path(m).parent for m in made] == [folder] and contents(folder) == old


@pytest.mark.parametrize("name", ["adapter_config.json", "fastadapt.safetensors", "adapter_model.bin"])
def test_a_folder_in_a_file_s_place_is_refused(name, tmp_path):
    model = fa.adapt(make(), fa.LoRAConfig(r=2), name="a")
    fa.save(model, tmp_path / "a")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).mkdir()
    old = {f.name: f.is_dir() or f.read_bytes() for f in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match=f"path: .*{name} is a folder; accepted is a file"):
        fa.save(model, tmp_path / "a")
    assert {f.name: f.is_dir() or f.read_bytes() for f in (tmp_path / "a").iterdir()} == old


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("fastadapt.json", "has fastadapt.safetensors but lacks fastadapt.json"),
        ("fastadapt.safetensors", "has fastadapt.json but lacks fastadapt.safetensors"),
        ("adapter_config.json", "has adapter.safetensors but lacks adapter_config.json"),
        ("adapter.safetensors", "has neither adapter.safetensors"),
        ("head_config.json", "has model_head.safetensors but lacks head_config.json"),
        ("model_head.safetensors", "has head_config.json but neither model_head.safetensors"),
    ],
)
def test_a_lost_half_of_a_pair_is_missed(lost, message, tmp_path):
    model = fa.adapt(make(), METHODS["houlsby"], name="a")
    with pytest.warns(UserWarning, match="LayerNorms"):
        fa.save(model, tmp_path / "a")
    (tmp_path / "a" / lost).unlink()
    other = make()
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        fa.load(other, tmp_path / "a")
    assert_unchanged(other, before)


def test_saving_removes_what_an_earlier_adaptation_left(tmp_path):
    model = fa.adapt(make(), METHODS["houlsby"], name="a")
    fa.adapt(model, METHODS["pfeiffer"], name="b")
    with pytest.warns(UserWarning):
        fa.save(model, tmp_path / "x", name="a")
    fa.save(model, tmp_path / "x", name="b")
    assert not (tmp_path / "x" / "fastadapt.json").exists()
    assert fa.adaptations(fa.load(make(), tmp_path / "x")) == ["b"]
