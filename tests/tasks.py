"""Small text tasks, and a small BERT with a tokenizer in a folder, for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD, BAD = ("fine", "warm", "wise"), ("dull", "cold", "slow")
PLACES, FOODS, BEASTS = ("town", "river"), ("bread", "soup"), ("horse", "wolf")
FILL = ("the", "film", "is", "so")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLACES, *FOODS, *BEASTS, *FILL)


def make_base(folder: Path, *, pooler: bool = True, seed: int = 0, taught: bool = True) -> Path:
    """A folder that ``from_pretrained`` reads: a BERT of two layers and its tokenizer."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=40, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=pooler)
    if taught:
        _teach(model)
    model.save_pretrained(folder)
    return folder


def _teach(model: BertModel) -> None:
    """A pretrained model's part: [CLS] says which kind of word is in the sentence. Adapters then learn in few steps."""
    kinds = (GOOD, BAD, PLACES, FOODS, BEASTS)
    rng = random.Random(7)
    head = torch.nn.Linear(32, len(kinds))
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(80):
        labels = [rng.randrange(len(kinds)) for _ in range(32)]
        sentences = [_sentence(rng, kinds[k], 4).split() for k in labels]
        ids = torch.tensor([[2, *(WORDS.index(word) for word in words), 3] for words in sentences])
        state = model(ids).last_hidden_state[:, 0] if model.pooler is None else model(ids).pooler_output
        torch.nn.functional.cross_entropy(head(state), torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _sentence(rng: random.Random, words: tuple[str, ...], length: int) -> str:
    chosen = [rng.choice(FILL) for _ in range(length)]
    chosen.insert(rng.randrange(length), rng.choice(words))
    return " ".join(chosen)


def write_mood(folder: Path, name: str, rows: int, seed: int) -> Path:
    """TSV with a header: a sentence and 0 or 1."""
    rng = random.Random(seed)
    lines = ["sentence\tlabel"]
    for i in range(rows):
        lines.append(f"{_sentence(rng, (BAD, GOOD)[i % 2], rng.randint(1, 5))}\t{i % 2}")
    path = folder / f"{name}.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_topic(folder: Path, name: str, rows: int, seed: int) -> Path:
    """TSV without a header: class and text, three classes."""
    rng = random.Random(seed)
    kinds = {"PLACE": PLACES, "FOOD": FOODS, "BEAST": BEASTS}
    lines = []
    for i in range(rows):
        label = list(kinds)[i % 3]
        lines.append(f"{label}\t{_sentence(rng, kinds[label], rng.randint(1, 5))}")
    path = folder / f"{name}.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pairs(folder: Path, name: str, rows: int, seed: int) -> Path:
    """JSONL: two texts and how much they agree, 0 to 5."""
    rng = random.Random(seed)
    with (folder / f"{name}.jsonl").open("w") as stream:
        for _ in range(rows):
            sides = rng.random() < 0.5, rng.random() < 0.5
            texts = [_sentence(rng, GOOD if side else BAD, 2) for side in sides]
            score = round((4.0 if sides[0] == sides[1] else 1.0) + rng.random(), 2)
            stream.write(json.dumps({"first": texts[0], "second": texts[1], "score": score}) + "\n")
    return folder / f"{name}.jsonl"
