"""Whole BERT with adapters against stock BERT, inference and a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import fastadapt as fa


@dataclass(frozen=True)
class ModelCase:
    batch: int
    sequence: int
    training: bool
    compiled: bool

    @property
    def name(self) -> str:
        return f"BERT-base {'training' if self.training else 'inference'} {self.batch}x{self.sequence} bfloat16"


def cases() -> Iterator[ModelCase]:
    for training in (False, True):
        for batch in (1, 8, 32) if not training else (8, 32):
            yield ModelCase(batch, 128, training, compiled=batch == 32 and not training)


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
    """Stock (fully fine-tuned where it trains), Houlsby b=64 fused, and stock compiled; each with its own weights."""

    def placed(model: torch.nn.Module) -> torch.nn.Module:
        model = model.cuda()
        return model.train() if case.training else model.bfloat16().eval()

    adapted = fa.adapt(_stock(), fa.HoulsbyConfig(bottleneck=64), name="bench")
    found = {"ours": _step(placed(adapted), case), "eager": _step(placed(_stock()), case)}
    if case.compiled:
        found["compiled"] = _step(torch.compile(placed(_stock()), mode="max-autotune-no-cudagraphs"), case)
    return found
