"""Make tests/fixtures/peft with PEFT itself: folders of LoRAs, and the logits and gradients that it computes.

Needs ``peft`` 0.21: ``python tests/make_fixtures_peft.py``. The base models are random and tiny; every weight is drawn
wide, so that each term of each variant shows in the logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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

ROOT = Path(__file__).parent / "fixtures" / "peft"
SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "num_labels": 3,
}
MODELS = {
    "bert": (BertConfig, BertForSequenceClassification, {}),
    "token": (BertConfig, BertForTokenClassification, {}),
    "mlm": (BertConfig, BertForMaskedLM, {}),
    "bare": (BertConfig, BertModel, {}),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, {"pad_token_id": 1}),
    "electra": (ElectraConfig, ElectraForSequenceClassification, {"embedding_size": 16}),
}
SIX = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
CLS = {"task_type": "SEQ_CLS"}

# case -> (model, name of the adapter, configuration)
CASES: dict[str, tuple[str, str, dict]] = {
    "two": ("bert", "default", {"r": 4, "target_modules": ["query", "value"], **CLS}),
    "six": ("bert", "default", {"r": 3, "lora_alpha": 5, "target_modules": SIX, "lora_dropout": 0.1, **CLS}),
    "suffix": ("bert", "default", {"r": 2, "target_modules": ["output.dense"], **CLS}),
    "all_linear": ("bert", "default", {"r": 2, "target_modules": "all-linear", **CLS}),
    "regex": ("bert", "default", {"r": 4, "target_modules": r".*layer\.1\..*(query|dense)", **CLS}),
    "rslora": ("bert", "default", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["key"], **CLS}),
    "dora": ("bert", "default", {"r": 4, "use_dora": True, "target_modules": ["query", "value", "dense"], **CLS}),
    "dora_rslora_all": (
        "bert",
        "default",
        {"r": 4, "use_dora": True, "use_rslora": True, "bias": "all", "target_modules": ["key", "dense"], **CLS},
    ),
    "patterns": (
        "bert",
        "default",
        {
            "r": 4,
            "target_modules": ["query", "key", "value"],
            "rank_pattern": {r"layer\.1\..*\.query": 2, "query": 3, "layer.0.attention.self.key": 5, "pooler": 7},
            "alpha_pattern": {r".*\.self\.(key|value)": 3, r"layer\.0.*": 11},
            **CLS,
        },
    ),
    "bias_all": ("bert", "default", {"r": 4, "bias": "all", "target_modules": ["query", "value"], **CLS}),
    "bias_lora_only": ("bert", "default", {"r": 4, "bias": "lora_only", "target_modules": SIX, **CLS}),
    "one_layer": (
        "bert",
        "default",
        {"r": 4, "target_modules": ["query", "value"], "layers_to_transform": [1], "layers_pattern": "layer", **CLS},
    ),
    "excluded": (
        "bert",
        "default",
        {
            "r": 4,
            "target_modules": ["query", "dense"],
            "exclude_modules": ["pooler.dense", "intermediate.dense"],
            **CLS,
        },
    ),
    "named": ("bert", "task", {"r": 4, "target_modules": ["query", "value"], **CLS}),
    "pickled": ("bert", "default", {"r": 4, "target_modules": ["query", "value"], **CLS}),
    "gaussian": (
        "bert",
        "default",
        {"r": 4, "target_modules": ["query"], "init_lora_weights": "gaussian", "fan_in_fan_out": False, **CLS},
    ),
    "token": ("token", "default", {"r": 4, "target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}),
    "mlm": ("mlm", "default", {"r": 4, "target_modules": ["query", "value"], "bias": "all"}),
    "bare": ("bare", "default", {"r": 4, "target_modules": ["query", "pooler.dense"], "bias": "all"}),
    "roberta": ("roberta", "default", {"r": 4, "target_modules": ["query", "dense"], **CLS}),
    "electra": ("electra", "default", {"r": 4, "target_modules": SIX, "bias": "lora_only", **CLS}),
}


def make_model(kind: str) -> torch.nn.Module:
    config_class, model_class, extra = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **extra)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if "LayerNorm.weight" in name else 0.0
            p.copy_(around + 0.2 * torch.randn(p.shape))
    return model


def objective(out: object) -> torch.Tensor:
    """A scalar of the first output that weighs every element differently."""
    first = out[0]
    weights = torch.linspace(-1.0, 1.0, first.numel(), dtype=first.dtype).view_as(first)
    return (weights * first + 0.1 * first.square()).sum()


def make_case(case: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kind, name, options = CASES[case]
    trained = get_peft_model(make_model(kind), LoraConfig(**options), adapter_name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    trained.save_pretrained(str(ROOT / case), safe_serialization=case != "pickled")
    for readme in (ROOT / case).rglob("README.md"):
        readme.unlink()
    folder = ROOT / case if name == "default" else ROOT / case / name
    # The logits and gradients of what PEFT itself reads back.
    model = PeftModel.from_pretrained(make_model(kind), str(folder), is_trainable=True).eval()
    out = model(**inputs)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and "original_module" not in n}
    grads = torch.autograd.grad(objective(out), list(parameters.values()), allow_unused=True)
    tensors = {f"output.{case}": out[0].detach().contiguous().clone()}
    for key, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            stored = key.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            stored = stored.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            tensors[f"grad.{case}.{stored}"] = grad.contiguous()
    return tensors


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "input_ids": torch.randint(4, SIZES["vocab_size"], (3, 9), generator=generator),
        "attention_mask": torch.ones(3, 9, dtype=torch.long),
    }
    inputs["attention_mask"][1, 5:] = 0
    tensors = dict(inputs)
    for kind, (config_class, _, extra) in MODELS.items():
        state = {key: t.clone() for key, t in make_model(kind).state_dict().items()}
        save_file(state, ROOT / f"{kind}.safetensors")
        sizes = {**SIZES, **extra, "model_type": config_class.model_type}
        (ROOT / f"{kind}.json").write_text(json.dumps(sizes, indent=2, sort_keys=True) + "\n")
    for case in CASES:
        tensors |= make_case(case, inputs)
    save_file(tensors, ROOT / "expected.safetensors")
    made_by = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    made_by["cases"] = {case: kind for case, (kind, _, _) in CASES.items()}
    (ROOT / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")
    assert set(load_file(ROOT / "expected.safetensors")) == set(tensors)


if __name__ == "__main__":
    main()
