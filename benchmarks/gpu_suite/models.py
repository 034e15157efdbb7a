"""Whole BERT with adapters or LoRAs against stock BERT and PEFT, inference and a training step."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import fastadapt as fa


@dataclass(frozen=True)
class ModelCase:
    """``method``: ``houlsby`` with b=64, or ``lora`` with r=8 on all six linears."""

    method: str
    batch: int
    sequence: int
    training: bool
    compiled: bool

    @property
    def name(self) -> str:
        kind = "training" if self.training else "inference"
        return f"BERT-base {self.method} {kind} {self.batch}x{self.sequence} bfloat16"


def cases() -> Iterator[ModelCase]:
    for method in ("houlsby", "lora"):
        for training in (False, True):
            for batch in (1, 8, 32, 256) if not training else (8, 32):
                compiled = method == "houlsby" and batch == 32 and not training
                yield ModelCase(method, batch, 128, training, compiled)


TARGETS = {  # ours, and the full ends of PEFT's names: "output.dense" alone would be attention's as well
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_output": "attention.output.dense", "intermediate": "intermediate.dense",
    "output": r"\d+.output.dense",
}  # fmt: skip


def work(case: ModelCase) -> tuple[float, float]:
    """(operations of an inference, 0.0: bytes are not what bounds it): products, attention and the adapters' own."""
    tokens, h = case.batch * case.sequence, 768
    low = 2 * 4 * h * 64 if case.method == "houlsby" else 4 * 8 * 18 * h  # six LoRAs: 9 h in, 9 h out
    return 12.0 * tokens * (24 * h * h + 4 * case.sequence * h + low), 0.0


def _adapted(case: ModelCase, layers: int = 12) -> torch.nn.Module:
    if case.method == "houlsby":
        return fa.adapt(_stock(layers), fa.HoulsbyConfig(bottleneck=64), name="bench")
    return fa.adapt(_stock(layers), fa.LoRAConfig(r=8, alpha=8, targets=tuple(TARGETS)), name="bench")


def _peft() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    ends = "|".join(TARGETS.values())
    return get_peft_model(_stock(), LoraConfig(r=8, lora_alpha=8, target_modules=rf".*\.({ends})"))


def _adapterhub() -> torch.nn.Module:
    import adapters

    model = _stock()
    adapters.init(model)
    model.add_adapter("bench", config=adapters.DoubleSeqBnConfig(reduction_factor=768 / 64, non_linearity="gelu"))
    model.train_adapter("bench")
    return model


def _captured(model: torch.nn.Module, case: ModelCase) -> Callable[[], Any]:
    """The model through fa.capture, on the example's own shapes."""
    inputs = _inputs(case)
    run = fa.capture(model, inputs)  # type: ignore[attr-defined]
    return lambda: run(**inputs)


def _stock(layers: int = 12) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing 110 million weights there is fast
        return BertForSequenceClassification(BertConfig(num_labels=2, num_hidden_layers=layers))


def _inputs(case: ModelCase, device: str = "cuda") -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(1000, 30000, (case.batch, case.sequence), device=device, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _step(model: torch.nn.Module, case: ModelCase) -> Callable[[], Any]:
    generator = torch.Generator("cuda").manual_seed(1)
    inputs = _inputs(case)
    if not case.training:

        def inference() -> Any:
            with torch.inference_mode():
                return model(**inputs).logits

        return inference
    inputs["labels"] = torch.randint(0, 2, (case.batch,), device="cuda", generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def train() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def systems(case: ModelCase) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(ours, stock (fully fine-tuned where it trains), peers, each with its own weights; the peers not here and why).

    For LoRA also ours merged. ``captured``: ours in a CUDA graph.
    """

    def placed(model: torch.nn.Module) -> torch.nn.Module:
        model = model.cuda()
        return model.train() if case.training else model.bfloat16().eval()

    found = {"ours": _step(placed(_adapted(case)), case), "eager": _step(placed(_stock()), case)}
    absent: dict[str, str] = {}
    if case.method == "lora":
        if not case.training:
            found["merged"] = _step(fa.merge(placed(_adapted(case)), "bench"), case)
        if importlib.util.find_spec("peft") is not None:
            found["peft"] = _step(placed(_peft()), case)
        else:
            absent["peft"] = "not installed"
    elif importlib.util.find_spec("adapters") is not None:
        found["adapterhub"] = _step(placed(_adapterhub()), case)
    else:
        absent["adapterhub"] = "adapters is not installed"
    if case.batch == 1 and not case.training:
        if hasattr(fa, "capture"):
            found["captured"] = _captured(placed(_adapted(case)), case)
        else:
            absent["captured"] = "fastadapt has no capture yet"
    if case.compiled:
        found["compiled"] = _step(torch.compile(placed(_stock()), mode="max-autotune-no-cudagraphs"), case)
    return found, absent


def wrong(case: ModelCase, device: str = "cuda", layers: int = 12) -> str | None:
    """Why ours is off: the last hidden states, or all gradients together, are more than twice as far from float64's as
    eager code's are.

    Without dropout, and with every trained weight drawn anew, since many begin at zero.
    """
    model = _adapted(case, layers).to(device).eval()
    generator = torch.Generator(device).manual_seed(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += torch.randn(p.shape, device=device, generator=generator) * 0.02
    inputs = _inputs(case, device)
    labels = torch.arange(case.batch, device=device) % 2

    def result(own: torch.nn.Module) -> torch.Tensor:
        if not case.training:
            with torch.no_grad():
                return own.base_model(**inputs).last_hidden_state.double()
        with torch.autocast(device, torch.bfloat16, enabled=own is model):
            loss = own(**inputs, labels=labels).loss
        theirs = [p for p in own.parameters() if p.requires_grad]
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, theirs)])

    with fa.backend("reference"):
        exact = result(copy.deepcopy(model).double())
        model = model if case.training else model.bfloat16()
        allowed = 2.0 * (result(model) - exact).norm().item()
    off = (result(model) - exact).norm().item()
    return None if off <= allowed else f"error {off:.3e}, allowed {allowed:.3e}"
