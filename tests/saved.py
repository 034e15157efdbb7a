"""The models that fixtures were made with, and what a model is before and after a refused call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CLASSES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "token": (BertConfig, BertForTokenClassification),
    "mlm": (BertConfig, BertForMaskedLM),
    "bare": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "electra": (ElectraConfig, ElectraForSequenceClassification),
}


def saved_model(root: Path, kind: str, **changes) -> torch.nn.Module:
    """The model of this kind with the weights in ``root``; of other sizes, without them."""
    config_class, model_class = CLASSES[kind]
    sizes = json.loads((root / f"{kind}.json").read_text())
    del sizes["model_type"]
    model = model_class(config_class(**{**sizes, **changes})).eval()
    if not changes:
        model.load_state_dict(load_file(root / f"{kind}.safetensors"))
    return model


def snapshot(model: torch.nn.Module) -> tuple[list[type], dict[str, torch.Tensor], list[bool]]:
    return (
        [type(m) for m in model.modules()],
        {key: t.clone() for key, t in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
    )


def assert_unchanged(model: torch.nn.Module, before) -> None:
    classes, state, flags = snapshot(model)
    assert classes == before[0]
    assert list(state) == list(before[1]) and all(torch.equal(t, before[1][key]) for key, t in state.items())
    assert flags == before[2]
