"""What is measured: a case names model, method, shapes and dtype, and every system answers the same one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.bench.text import SENTENCES
from fastadapt.config.lora import TARGETS
from fastadapt.errors import UserError
from fastadapt.models import wiring_of

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANDOM_MODELS: dict[str, dict[str, int]] = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
LABELS = 2


@dataclass(frozen=True)
class Case:
    """One cell of a benchmark.

    Attributes:
        model: ``bert-base`` or ``bert-large`` (random weights), a folder, or an id of the model hub.
        method: one of :data:`fastadapt.bench.methods.METHODS`.
        bottleneck: width b of the adapter.
        rank, targets, lora_dropout: of a LoRA; the targets are some of :data:`fastadapt.config.lora.TARGETS`.
        length: of a prefix.
        adapters: how many a fusion mixes.
        drop: layers without an adapter, from the input, of AdapterDrop.
        batch, seq: the input is [batch, seq] tokens without padding.
        dtype: ``fp32`` or ``bf16``; in inference the model's dtype, in training autocast's.
        device: ``cpu`` or ``cuda``.
        layers: keep the first so many layers; ``None`` keeps all.
        pretrained: False gives a folder's or an id's model random weights, and as many layers as ``layers`` says.
        dropout: of hidden states and attention, in training.
        seed: of weights, tokens and labels.
    """

    model: str = "bert-base"
    method: str = "houlsby"
    bottleneck: int = 64
    rank: int = 8
    targets: tuple[str, ...] = TARGETS
    lora_dropout: float = 0.0
    length: int = 30
    adapters: int = 8
    drop: int = 5
    batch: int = 8
    seq: int = 128
    dtype: str = "fp32"
    device: str = "cpu"
    layers: int | None = None
    pretrained: bool = True
    dropout: float = 0.1
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        return self.batch * self.seq


def _random(case: Case) -> bool:
    return case.model in RANDOM_MODELS


def _from_pretrained(auto: Any, case: Case, *, argument: str = "--model", **options: Any) -> Any:
    """``auto.from_pretrained`` with every way it fails told in one line."""
    path = Path(case.model).expanduser()
    if not path.is_dir() and (path.exists() or case.model.startswith((".", "/", "~"))):
        raise UserError(f"{argument}: {case.model!r} is not a folder with a model in it")
    try:
        return auto.from_pretrained(str(path) if path.is_dir() else case.model, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        accepted = f"{', '.join(RANDOM_MODELS)}, a folder or a hub id"
        raise UserError(f"{argument}: cannot load {case.model!r} ({first}); accepted are {accepted}") from error


def load_model(case: Case, *, classifier: bool, dropout: float = 0.0, argument: str = "--model") -> nn.Module:
    """A plain Hugging Face encoder in float32 on the CPU, in evaluation mode, with SDPA attention.

    The same case gives the same weights. ``classifier`` puts a head of two labels on it, for training; ``argument`` is
    what the command line calls the model.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig

    auto = AutoModelForSequenceClassification if classifier else AutoModel
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    labels = {"num_labels": LABELS} if classifier else {}
    torch.manual_seed(case.seed)
    if _random(case):
        shape = dict(RANDOM_MODELS[case.model])
        shape["num_hidden_layers"] = case.layers or shape["num_hidden_layers"]
        config = BertConfig(**shape, **rates, **labels, max_position_embeddings=max(512, case.seq))
    else:
        config = _from_pretrained(AutoConfig, case, argument=argument, **rates, **labels)
        available = getattr(config, "num_hidden_layers", 0)
        if case.pretrained and case.layers is not None and case.layers > available:
            raise UserError(f"--layers: got {case.layers}; {case.model} has {available}")
        config.num_hidden_layers = case.layers or available
        longest = getattr(config, "max_position_embeddings", case.seq)
        if case.seq > longest:
            raise UserError(f"--seq: got {case.seq}; {case.model} accepts at most {longest}")
    if case.pretrained and not _random(case):
        options = {"config": config, "attn_implementation": "sdpa", "dtype": torch.float32}
        model = _from_pretrained(auto, case, argument=argument, **options)
    else:
        model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    try:
        wiring_of(model)
    except (TypeError, ValueError) as error:
        raise UserError(f"{argument}: {str(error).removeprefix('model: ')}") from error
    return model.eval()


def available_layers(case: Case) -> int:
    """How many layers the case's model has when none are left away."""
    from transformers import AutoConfig

    if _random(case):
        return RANDOM_MODELS[case.model]["num_hidden_layers"]
    return getattr(_from_pretrained(AutoConfig, case), "num_hidden_layers", 0)


@lru_cache(maxsize=4)
def _tokenizer(case: Case) -> Any:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, case)


def token_ids(case: Case) -> Tensor:
    """int64 [batch, seq] without padding: random for random weights, else :data:`SENTENCES` through the tokenizer."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    if _random(case):
        return torch.randint(1000, 30000, (case.batch, case.seq), generator=generator).to(case.device)
    tokenizer = _tokenizer(Case(model=case.model))
    rows = []
    for _ in range(case.batch):
        order = torch.randperm(len(SENTENCES), generator=generator).tolist()
        ids: list[int] = []
        while len(ids) < case.seq:  # no row ends early, so no row is padded
            ids += tokenizer(" ".join(SENTENCES[i] for i in order), add_special_tokens=False)["input_ids"]
        body = ids[: max(case.seq - 2, 0)]
        row = [tokenizer.cls_token_id, *body, tokenizer.sep_token_id][: case.seq]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64, device=case.device)


def class_labels(case: Case) -> Tensor:
    """int64 [batch]."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    return torch.randint(0, LABELS, (case.batch,), generator=generator).to(case.device)
