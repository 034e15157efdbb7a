"""What is stored: state_dict keys, save_pretrained and from_pretrained, and plain Trainer checkpoints."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import BertForMaskedLM, BertModel, ElectraForMaskedLM, Trainer, TrainingArguments

import fastadapt as fa
from tests.tiny import METHODS, SEQUENCE, batch, make, output, shake

CLASSES = (*SEQUENCE, BertModel, BertForMaskedLM, ElectraForMaskedLM)
by_name = {"ids": lambda c: c.__name__}


def ours_of(state) -> set[str]:
    return {key for key in state if key.startswith("fastadapt.")}


def test_keys():
    model = make()
    base = list(model.state_dict())
    fa.adapt(model, METHODS["houlsby"], name="sst2")
    fa.adapt(model, METHODS["pfeiffer"], name="mnli")
    keys = list(model.state_dict())
    assert keys[: len(base)] == base
    ours = set(keys[len(base) :])
    layer = "fastadapt.sst2.encoder.layer.0.attention.output"
    assert {f"{layer}.down.weight", f"{layer}.down.bias", f"{layer}.up.weight", f"{layer}.up.bias",
            f"{layer}.LayerNorm.weight", f"{layer}.LayerNorm.bias", "fastadapt.sst2.head.weight",
            "fastadapt.mnli.encoder.layer.2.output.down.weight"} <= ours  # fmt: skip
    assert all(key.startswith(("fastadapt.sst2.", "fastadapt.mnli.")) for key in ours)
    assert not any("mnli" in key and ("LayerNorm" in key or "attention" in key) for key in ours)
    bare = fa.adapt(make(BertModel), METHODS["houlsby"], name="sst2")
    assert {k for k in ours if "sst2" in k and "head" not in k} == {k for k in bare.state_dict() if "sst2" in k}


@pytest.mark.parametrize("model_class", CLASSES, **by_name)
@pytest.mark.parametrize("active", [True, False], ids=["active", "off"])
def test_save_pretrained_writes_the_base(model_class, active, tmp_path):
    model = fa.adapt(make(model_class), METHODS["houlsby"], name="a")
    if "Sequence" in model_class.__name__:
        fa.adapt(model, METHODS["pfeiffer"], name="b", head=5)
    shake(model.fastadapt)
    adapted = output(model)
    if not active:
        fa.activate(model, None)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ours_of(stored) == ours_of(model.state_dict()) != set()

    stock = model_class.from_pretrained(tmp_path)
    assert type(stock) is model_class and not hasattr(stock, "fastadapt")
    original = make(model_class)
    for (key, a), b in zip(original.state_dict().items(), stock.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(output(stock.eval()), output(original))

    again = fa.adapt(stock, METHODS["houlsby"], name="a")
    if "Sequence" in model_class.__name__:
        fa.adapt(again, METHODS["pfeiffer"], name="b", head=5)
    missing, unexpected = again.load_state_dict(stored, strict=False)
    assert not unexpected and not any(key.startswith("fastadapt.") for key in missing)
    assert torch.equal(output(again), adapted)


def test_state_dict_round_trip_is_strict():
    model = fa.adapt(make(), METHODS["houlsby"], name="a")
    shake(model.fastadapt)
    other = fa.adapt(make(seed=4), METHODS["houlsby"], name="a")
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), output(model))


class Pairs(Dataset):
    def __init__(self, model):
        self.inputs = batch(model, rows=8, labels=True)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {key: tensor[i] for key, tensor in self.inputs.items()}


def train(model, folder, steps: int, resume: bool = False) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=5e-3,
        weight_decay=0.1, report_to=[], use_cpu=True, seed=3, disable_tqdm=True, logging_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Pairs(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("model_class", SEQUENCE, **by_name)
def test_trainer_resumes(model_class, tmp_path):
    def fresh():
        return fa.adapt(make(model_class), METHODS["houlsby"], name="a")

    straight = fresh()
    train(straight, tmp_path / "straight", 4)
    interrupted = fresh()
    train(interrupted, tmp_path / "halves", 2)
    stored = load_file(tmp_path / "halves" / "checkpoint-2" / "model.safetensors")
    for name, p in interrupted.named_parameters():
        assert not p.requires_grad or torch.equal(stored[name], p), name
    resumed = fresh()
    shake(resumed.fastadapt)  # whatever it holds, the checkpoint's is taken
    train(resumed, tmp_path / "halves", 4, resume=True)
    for (key, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    base = make(model_class).state_dict()
    assert all(torch.equal(t, straight.state_dict()[key]) for key, t in base.items())
    assert not torch.equal(output(straight.eval()), output(fresh()))


def test_trainer_chooses_weight_decay_by_name(tmp_path):
    model = fa.adapt(make(), fa.HoulsbyConfig(bottleneck=4, ln_before=True, ln_after=True), name="a")
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    decayed = {name for name in trainer.get_decay_parameter_names(model) if name.startswith("fastadapt.")}
    assert decayed == {
        name for name, _ in model.named_parameters()
        if name.startswith("fastadapt.") and name.endswith(("down.weight", "up.weight", "head.weight"))
    }  # fmt: skip


def test_extra_keys_are_the_only_thing_from_pretrained_mentions(tmp_path, caplog):
    model = fa.adapt(make(), METHODS["pfeiffer"], name="a")
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] and all(key.startswith("fastadapt.") for key in info["unexpected_keys"])
