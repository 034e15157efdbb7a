"""A user's own Trainer or loop, in which nothing is new but ``fa.adapt``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastadapt as fa
from tests.tiny import make, shake

CONFIGS = {
    "houlsby": fa.HoulsbyConfig(bottleneck=8),
    "pfeiffer": fa.PfeifferConfig(bottleneck=8),
    "parallel": fa.ParallelConfig(bottleneck=8, scale="learned"),
    "bottleneck": fa.BottleneckConfig(bottleneck=8, dropout=0.1, gate=True, ln_before=True, ln_after=True),
    "masked": fa.MaskedAdapterConfig(bottleneck=8),
    "drop": fa.HoulsbyConfig(bottleneck=8, drop=fa.AdapterDrop()),
    "drop_rows": fa.HoulsbyConfig(bottleneck=8, drop=fa.AdapterDrop("independent", p=0.4)),
    "lora": fa.LoRAConfig(),
    "dora": fa.LoRAConfig(dora=True, bias="lora_only", dropout=0.1),
    "bitfit": fa.BitFitConfig(),
    "layer_norm": fa.LayerNormConfig("all"),
    "head": fa.HeadConfig(),
    "prefix": fa.PrefixConfig(length=4, bottleneck=8),
    "mam": fa.MAMConfig(fa.PrefixConfig(length=4, bottleneck=8), fa.ParallelConfig(bottleneck=8)),
    "fusion": fa.FusionConfig(("one", "two")),
}
OWN_LOSS = ("masked", "fusion")


def adapted(method: str, dropout: float = 0.1, seed: int = 0, layers: int = 3) -> nn.Module:
    """A tiny classifier in training with ``method``; its weights differ from ``seed`` to ``seed``."""
    model = make(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_hidden_layers=layers)
    config = CONFIGS[method]
    if isinstance(config, fa.FusionConfig):
        for i, name in enumerate(config.adapters):
            fa.adapt(model, fa.PfeifferConfig(bottleneck=8), name=name)
            shake(model.fastadapt[name], 0.1, seed=seed + i)
    fa.adapt(model, config, name="task")
    shake(model.fastadapt["task"], 0.05, seed=seed)
    return model.train()


def examples(count: int = 12, length: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        mask = torch.ones(length, dtype=torch.int64)
        mask[length - i % 3 :] = 0
        ids = torch.randint(5, 96, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 3)})
    return rows


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainer_of(model: nn.Module, folder: object, *, callbacks=(), **options: object) -> Trainer:
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
                "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    rows = examples()
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:6], callbacks=list(callbacks))


def trained(model: nn.Module, folder: object, **options: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(the losses, all parameters) after the Trainer's steps."""
    trainer = trainer_of(model, folder, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# -- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_trainer(method, tmp_path):
    """Every method; losses and updates as the reference backend's, dropout on; the base keeps every bit."""
    model = adapted(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    losses, after = trained(model, tmp_path, optim="sgd", learning_rate=0.1)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved <= trains and all("key.bias" in name for name in trains - moved)  # of which softmax takes no notice
    with fa.backend("reference"):
        expected_losses, expected = trained(adapted(method), tmp_path, optim="sgd", learning_rate=0.1)
    assert losses == pytest.approx(expected_losses, rel=2e-5) and len(losses) == 3
    assert_same(after, expected, 2e-5, 2e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("method", CONFIGS)
def test_gradient_checkpointing_in_trainer(method, reentrant, tmp_path):
    kwargs = {"use_reentrant": reentrant}
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    expected_losses, expected = trained(adapted(method), tmp_path, **options)
    losses, after = trained(adapted(method), tmp_path, gradient_checkpointing=True,
                            gradient_checkpointing_kwargs=kwargs, **options)  # fmt: skip
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_same(after, expected, 1e-5, 1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_weight_decay_goes_by_names(method, tmp_path):
    """No bias, no LayerNorm and nothing frozen decays; every trained matrix does."""
    model = adapted(method)
    trainer = trainer_of(model, tmp_path, weight_decay=0.1)
    trainer.create_optimizer()
    decays = {id(p) for group in trainer.optimizer.param_groups for p in group["params"] if group["weight_decay"] > 0}
    others = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} - decays
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert decays | others == {id(p) for p in named.values()}
    for name, p in named.items():
        if name.endswith("bias") or "LayerNorm" in name or ".norm_" in name:
            assert id(p) in others, name
        elif p.dim() == 2:
            assert id(p) in decays, name


@pytest.mark.parametrize("method", ["houlsby", "masked", "fusion", "drop", "mam"])
def test_resume_gives_the_same_numbers(method, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    losses, expected = trained(adapted(method), tmp_path, **options)
    other = adapted(method, seed=5)  # nothing of the adaptation itself comes from where the first one began
    trainer = trainer_of(other, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == losses
    assert_same({name: p.detach() for name, p in other.named_parameters()}, expected, 0, 0)


class Watch(TrainerCallback):
    """Keeps what the model was at every evaluation, and whether it trains after it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model, watch = adapted("houlsby"), Watch()
    trainer = trainer_of(model, tmp_path, callbacks=[watch], max_steps=6, eval_strategy="steps", eval_steps=2,
                         save_strategy="steps", save_steps=2, load_best_model_at_end=True,
                         lr_scheduler_type="constant")  # fmt: skip
    # What is learned is wrong for the rows that judge: the first model is the best.
    trainer.train_dataset = [{**row, "labels": torch.tensor(0)} for row in trainer.train_dataset]
    trainer.eval_dataset = [{**row, "labels": torch.tensor(1)} for row in trainer.eval_dataset]
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(range(3), key=scores.__getitem__)
    assert len(set(scores)) == 3 and best != 2  # else the last model could pass for the best one
    assert_same({name: p.detach() for name, p in model.named_parameters()}, watch.seen[best], 0, 0)
    assert trainer.evaluate()["eval_loss"] == scores[best]  # no packed copy of a later weight is used


@pytest.mark.parametrize("method", ["houlsby", "lora"])
def test_label_smoothing(method, tmp_path):
    """Trainer takes the logits then, and the loss is its own."""
    options = {"label_smoothing_factor": 0.2, "optim": "sgd"}
    losses, after = trained(adapted(method), tmp_path, **options)
    with fa.backend("reference"):
        expected_losses, expected = trained(adapted(method), tmp_path, **options)
    plain, _ = trained(adapted(method), tmp_path, optim="sgd")
    assert losses == pytest.approx(expected_losses, rel=2e-5) and losses != pytest.approx(plain, rel=1e-3)
    assert_same(after, expected, 2e-5, 2e-6)


@pytest.mark.parametrize("method", ["houlsby", "lora", "masked", "fusion"])
def test_bf16_in_trainer(method, tmp_path):
    losses, after = trained(adapted(method), tmp_path, bf16=True, optim="sgd")
    expected_losses, expected = trained(adapted(method), tmp_path, optim="sgd")
    assert losses == pytest.approx(expected_losses, rel=0.03)
    assert all(p.dtype == torch.float32 for p in after.values())
    assert_same(after, expected, 0.02, 0.02)


# -- a loop of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_accumulated_gradients_are_those_of_the_joint_batch(method):
    model = adapted(method, dropout=0.0)
    config = CONFIGS[method]
    if method == "drop_rows" or getattr(config, "mask_prob", 0) or getattr(config, "dropout", 0):
        pytest.skip("draws other masks for each batch")
    rows = [{**row, "attention_mask": torch.ones_like(row["attention_mask"])} for row in examples(8)]
    torch.manual_seed(2)
    model(**stacked(rows)).loss.backward()
    joint = {name: None if g is None else g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    for part in (rows[:4], rows[4:]):
        torch.manual_seed(2)  # AdapterDrop's n
        (model(**stacked(part)).loss / 2).backward()
    assert_same(gradients(model), joint, 1e-4, 1e-6)


@pytest.mark.parametrize("method", ["houlsby", "lora", "masked", "fusion", "mam"])
def test_grad_scaler(method):
    """A power of two scales every term of the loss, and unscaling leaves no trace; an overflow skips the step."""
    inputs = stacked(examples(4))

    def step(scaler: torch.amp.GradScaler, factor: float = 1.0) -> tuple[dict[str, torch.Tensor], ...]:
        model = adapted(method)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(4)
        scaler.scale(factor * model(**inputs).loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return gradients(model), {name: p.detach() for name, p in model.named_parameters()}

    plain, moved = step(torch.amp.GradScaler("cpu", enabled=False))
    scaled, also_moved = step(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_same(scaled, plain, 1e-6, 1e-9)
    assert_same(also_moved, moved, 1e-6, 1e-9)
    overflowing = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    _, unmoved = step(overflowing, 1e4)
    assert_same(unmoved, {name: p.detach() for name, p in adapted(method).named_parameters()}, 0, 0)
    assert overflowing.get_scale() == 2.0**126


def test_float16_autocast_with_a_scaler():
    model = adapted("houlsby", dropout=0.0)
    inputs = stacked(examples(4))
    model(**inputs).loss.backward()
    exact = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16):
        loss = model(**inputs).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_same(gradients(model), exact, 0.05, 5e-3)


@pytest.mark.parametrize("method", OWN_LOSS)
def test_the_losses_of_a_method_join_by_themselves(method):
    """With labels in the model's own loss; without them ``fa.auxiliary_loss`` gives what is missing."""
    model, inputs = adapted(method), stacked(examples(4))
    torch.manual_seed(6)
    joined = model(**inputs).loss
    labels = inputs.pop("labels")
    torch.manual_seed(6)
    task = nn.functional.cross_entropy(model(**inputs).logits, labels)
    extra = fa.auxiliary_loss(model)
    assert extra.item() > 1e-3
    torch.testing.assert_close(joined, task + extra)
    by_model = torch.autograd.grad(joined, [p for p in model.parameters() if p.requires_grad])
    by_hand = torch.autograd.grad(task + extra, [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(by_model, by_hand, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("method", "backend"),
    [("masked", "aot_eager"), ("fusion", "aot_eager"), ("drop", "aot_eager"), ("houlsby", "inductor")],
)
def test_compiled_training(method, backend):
    """One graph without a break, and the eager gradients; n of AdapterDrop, drawn for each batch, breaks it."""
    model = adapted(method, dropout=0.0, layers=1 if backend == "inductor" else 2)
    inputs = stacked(examples(4))
    expected = []
    for seed in (8, 9):
        torch.manual_seed(seed)
        model.zero_grad()
        model(**inputs).loss.backward()
        expected.append({name: None if g is None else g.clone() for name, g in gradients(model).items()})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend)
    for i, seed in enumerate((8, 9)):
        torch.manual_seed(seed)
        model.zero_grad()
        compiled(**inputs).loss.backward()
        if method != "masked":  # compiled code draws its masks elsewhere
            assert_same(gradients(model), expected[i], 1e-4, 1e-6)
    assert all(g.any() for name, g in gradients(model).items() if g is not None and "mask_head.weight" in name)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert method == "drop" or not breaks, breaks
