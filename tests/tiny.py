"""Small random models of every wired architecture, for the tests of modules and wiring."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)

import fastadapt as fa

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
CONFIGS = {"Bert": BertConfig, "Roberta": RobertaConfig, "Electra": ElectraConfig}
SEQUENCE = (BertForSequenceClassification, RobertaForSequenceClassification, ElectraForSequenceClassification)
ALL = (
    *SEQUENCE,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertModel,
    RobertaForTokenClassification,
    RobertaForMaskedLM,
    RobertaModel,
    ElectraForTokenClassification,
    ElectraForMaskedLM,
    ElectraModel,
)
METHODS = {
    "houlsby": fa.HoulsbyConfig(bottleneck=8),
    "pfeiffer": fa.PfeifferConfig(bottleneck=8),
    "parallel": fa.ParallelConfig(bottleneck=8),
}


def make(model_class: type[nn.Module] = BertForSequenceClassification, seed: int = 0, **options) -> nn.Module:
    """A random model in eval mode, with weights wide enough for every term to show."""
    kind = next(c for name, c in CONFIGS.items() if model_class.__name__.startswith(name))
    extra = {} if "QuestionAnswering" in model_class.__name__ else {"num_labels": 3}
    if kind is RobertaConfig:
        extra["pad_token_id"] = 1
    torch.manual_seed(seed)
    config = kind(**{**SIZES, **extra, **options})
    if "attn_implementation" in options:
        config._attn_implementation = options["attn_implementation"]
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1.0 if "LayerNorm.weight" in name else 0.0) + 0.1 * torch.randn(p.shape))
    return model.eval()


def batch(model: nn.Module, rows: int = 3, length: int = 10, labels: bool = False) -> dict[str, torch.Tensor]:
    """Token ids with padding at the end of one row, in the shape that the model's head takes."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith("MultipleChoice"):
        return {key: torch.stack([t, t.flip(0)], dim=1) for key, t in inputs.items()}
    if labels:
        inputs["labels"] = torch.arange(rows) % 3
    return inputs


def output(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The first output, without gradients."""
    with torch.no_grad():
        return model(**(inputs or batch(model)))[0]


@torch.no_grad()
def shake(module: nn.Module, std: float = 0.2, seed: int = 1) -> None:
    """Move parameters away from their initialisation, so that an adaptation does something."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(std * torch.randn(p.shape, generator=generator).to(p))


def at_once(*runs: Callable[[], Any]) -> list[Any]:
    """What each gives, run in a thread of its own."""
    got: list[Any] = [None] * len(runs)

    def keep(i: int) -> None:
        got[i] = runs[i]()

    threads = [threading.Thread(target=keep, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got
