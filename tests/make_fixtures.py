"""Make tests/fixtures/adapterhub with AdapterHub's own library: folders of adapters, and the logits it computes.

Needs ``adapters`` 1.3.0 (and the transformers that it pins): ``python tests/make_fixtures.py``. The base models are
random and tiny; every weight is drawn wide, so that each term of each variant shows in the logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

ROOT = Path(__file__).parent / "fixtures" / "adapterhub"
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
    "roberta": (RobertaConfig, RobertaForSequenceClassification, {"pad_token_id": 1}),
    "electra": (ElectraConfig, ElectraForSequenceClassification, {"embedding_size": 16}),
}

CASES: dict[str, tuple[str, object]] = {
    "houlsby": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=4)),
    "pfeiffer": ("bert", adapters.SeqBnConfig(reduction_factor=4)),
    "parallel": ("bert", adapters.ParBnConfig(reduction_factor=4)),
    "gate": ("bert", adapters.SeqBnConfig(reduction_factor=4, use_gating=True)),
    "gate_parallel": ("bert", adapters.ParBnConfig(reduction_factor=4, use_gating=True, scaling="learned")),
    "ln_before": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=4, ln_before=True, non_linearity="gelu")),
    "ln_after": ("bert", adapters.SeqBnConfig(reduction_factor=4, ln_after=True)),
    "ln_after_under": (
        "bert",
        adapters.DoubleSeqBnConfig(reduction_factor=4, ln_after=True, adapter_residual_before_ln=True),
    ),
    "ln_both_gate": (
        "bert",
        adapters.SeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True, use_gating=True, scaling="channel"),
    ),
    "learned": ("bert", adapters.ParBnConfig(reduction_factor=4, scaling="learned")),
    "channel": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=4, scaling="channel", non_linearity="tanh")),
    "post_add": ("bert", adapters.SeqBnConfig(reduction_factor=4, residual_before_ln="post_add")),
    "residual_after_ln": ("bert", adapters.SeqBnConfig(reduction_factor=4, residual_before_ln=False)),
    "no_ln_after": (
        "bert",
        adapters.SeqBnConfig(reduction_factor=4, residual_before_ln=False, original_ln_after=False),
    ),
    "no_ln_after_own": ("bert", adapters.SeqBnConfig(reduction_factor=4, original_ln_after=False)),
    "sequential_no_ln": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=4, original_ln_after=False)),
    "parallel_no_ln": ("bert", adapters.ParBnConfig(reduction_factor=4, original_ln_after=False)),
    "parallel_both": ("bert", adapters.ParBnConfig(reduction_factor=4, mh_adapter=True, scaling=0.5)),
    "left_out": (
        "bert",
        adapters.DoubleSeqBnConfig(reduction_factor={"1": 3, "default": 8}, leave_out=[0], non_linearity="leakyrelu"),
    ),
    "roberta": ("roberta", adapters.SeqBnConfig(reduction_factor=4)),
    "electra": ("electra", adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="relu")),
    "prefix": ("bert", adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=6)),
    "prefix_flat": ("roberta", adapters.PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[0])),
    "mam": (
        "bert",
        adapters.MAMConfig(
            adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=6), adapters.ParBnConfig(reduction_factor=4)
        ),
    ),
    "lora": (
        "bert",
        adapters.LoRAConfig(r=4, alpha=8, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]),
    ),
    "lora_left_out": ("electra", adapters.LoRAConfig(r=2, alpha=2, leave_out=[0])),
    "lora_legacy": ("bert", adapters.LoRAConfig(r=4, alpha=16)),
    "legacy": ("bert", adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu")),
}
# AdapterHub cannot write ln_before, nor a pool of prefixes, as safetensors.
PICKLED = {"ln_before", "ln_both_gate", "legacy", "prefix", "prefix_flat", "mam"}
FUSED = ("a", "b", "c")


def make_model(kind: str) -> torch.nn.Module:
    config_class, model_class, extra = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **extra)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if "LayerNorm.weight" in name else 0.0
            p.copy_(around + 0.2 * torch.randn(p.shape))
    return model


def age(folder: Path) -> None:
    """Turn a folder into one of the first releases: no version, other key names, an unused invertible adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["version"]
    config["type"] = "text_task"
    config["config"]["invertible_adapter"] = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    renamed = {k.replace("output.adapters.", "output.layer_text_task_adapters."): v for k, v in weights.items()}
    torch.save(renamed, folder / "pytorch_adapter.bin")


def age_lora(folder: Path) -> None:
    """Turn a folder into one of before 1.1.0, which scaled by 1 whatever alpha was."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["version"] = "adapters.1.0.1"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def make_fusion(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Folders of three adapters, one of another scale, and of their fusion; its logits."""
    model = make_model("bert")
    adapters.init(model)
    for name, scale in zip(FUSED, (1.0, 2.0, 0.5), strict=True):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4, scaling=scale))
    fuse = adapters.Fuse(*FUSED)
    model.add_adapter_fusion(fuse)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name or "adapter_fusion_layer" in name:
                p.add_(0.3 * torch.randn(p.shape))
    (ROOT / "fusion").mkdir()
    for name in FUSED:
        model.save_adapter(str(ROOT / "fusion" / name), name, use_safetensors=True, with_head=False)
    model.save_adapter_fusion(str(ROOT / "fusion" / "mix"), fuse, use_safetensors=True)
    model.set_active_adapters(fuse)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def make_case(case: str, kind: str, config: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model = make_model(kind)
    adapters.init(model)
    model.add_adapter("task", config=config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(f".{kind}.task." in name for kind in ("adapters", "loras", "prefix_tunings")):
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                p.copy_(around + 0.3 * torch.randn(p.shape))
        # The head of the folder is not the base's.
        for name, p in model.named_parameters():
            if name.startswith("classifier"):
                p.copy_(0.3 * torch.randn(p.shape))
    folder = ROOT / case
    model.save_adapter(str(folder), "task", use_safetensors=case not in PICKLED)
    if case == "legacy":
        age(folder)
    if case == "lora_legacy":
        age_lora(folder)
    reader = make_model(kind)
    adapters.init(reader)
    reader.load_adapter(str(folder), use_safetensors=case not in PICKLED)
    reader.set_active_adapters("task")
    with torch.no_grad():
        return reader.eval()(**inputs).logits


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
        save_file(make_model(kind).state_dict(), ROOT / f"{kind}.safetensors")
        (ROOT / f"{kind}.json").write_text(
            json.dumps({**SIZES, **extra, "model_type": config_class.model_type}, indent=2, sort_keys=True) + "\n"
        )
    for case, (kind, config) in CASES.items():
        tensors[f"logits.{case}"] = make_case(case, kind, config, inputs)
    tensors["logits.fusion"] = make_fusion(inputs)
    save_file(tensors, ROOT / "expected.safetensors")
    made_by = {"adapters": adapters.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    made_by["cases"] = {case: kind for case, (kind, _) in CASES.items()}
    (ROOT / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")
    assert set(load_file(ROOT / "expected.safetensors")) == set(tensors)


if __name__ == "__main__":
    main()
