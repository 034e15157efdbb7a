"""Whole BERT with adapters or LoRAs against stock BERT and PEFT, inference and a training step."""

from __future__ import annotations

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
            for batch in (1, 8, 32) if not training else (8, 32):
                compiled = method == "houlsby" and batch == 32 and not training
                yield ModelCase(method, batch, 128, training, compiled)


TARGETS = {  # ours, and the full ends of PEFT's names: "output.dense" alone would be attention's as well
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_output": "attention.output.dense", "intermediate": "intermediate.dense",
    "output": r"\d+.output.dense",
}  # fmt: skip


def _adapted(case: ModelCase, name: str = "bench") -> torch.nn.Module:
    if case.method == "houlsby":
        return fa.adapt(_stock(), fa.HoulsbyConfig(bottleneck=64), name=name)
    return fa.adapt(_stock(), fa.LoRAConfig(r=8, alpha=8, targets=tuple(TARGETS)), name=name)


def _peft() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    ends = "|".join(TARGETS.values())
    return get_peft_model(_stock(), LoraConfig(r=8, lora_alpha=8, target_modules=rf".*\.({ends})"))


def _stock() -> torch.nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=2))


def _step(model: torch.nn.Module, case: ModelCase) -> Callable[[], Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(1000, 30000, (case.batch, case.sequence), device="cuda", generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
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


def systems(case: ModelCase) -> dict[str, Callable[[], Any]]:
    """Ours, stock (fully fine-tuned where it trains) and stock compiled, each with its own weights.

    For LoRA also ours merged, and PEFT where it is installed.
    """

    def placed(model: torch.nn.Module) -> torch.nn.Module:
        model = model.cuda()
        return model.train() if case.training else model.bfloat16().eval()

    found = {"ours": _step(placed(_adapted(case)), case), "eager": _step(placed(_stock()), case)}
    if case.method == "lora":
        if not case.training:
            found["merged"] = _step(fa.merge(placed(_adapted(case)), "bench"), case)
        if importlib.util.find_spec("peft") is not None:
            found["peft"] = _step(placed(_peft()), case)
    if case.compiled:
        found["compiled"] = _step(torch.compile(placed(_stock()), mode="max-autotune-no-cudagraphs"), case)
    return found
