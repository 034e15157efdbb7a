"""PEFT's configuration of a LoRA, as its version 0.21 writes it: which layers it means, and what it asks of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastadapt.config.lora import LoRAConfig

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# What changes nothing about weights that are read, whatever it says.
_PASSIVE = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "eva_config",  # how A was initialised, in init_lora_weights="eva"
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # that leave W as it is


class PeftConfig:
    """A read ``adapter_config.json``.

    Raises:
        ValueError: for another method than LoRA, and naming what it sets that is not known here.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        kind = content.get("peft_type")
        if kind != "LORA":
            raise ValueError(f"path: is PEFT's, of type {kind!r}; accepted is 'LORA'")
        # Whatever a later version adds is off where it says nothing: None, False, 0 or empty.
        unknown = sorted(key for key, value in content.items() if key not in _PASSIVE | _READ and value)
        if unknown:
            given = ", ".join(f"{key}={content[key]!r}" for key in unknown)
            raise ValueError(f"path: its configuration sets {given}; accepted is a LoRA without")
        init = content.get("init_lora_weights", True)
        if not any(type(init) is type(known) and init == known for known in _INITS):
            raise ValueError(
                f"path: its configuration sets init_lora_weights={init!r}, which changes the base's weights; accepted "
                f"are {', '.join(map(repr, _INITS))}"
            )
        self.r = content.get("r", 8)
        self.alpha = content.get("lora_alpha", 8)
        self.dropout = content.get("lora_dropout", 0.0)
        self.rslora, self.dora = bool(content.get("use_rslora")), bool(content.get("use_dora"))
        self.bias: str = content.get("bias") or "none"
        self.init = "gaussian" if init == "gaussian" else "kaiming"
        self.ranks = _mapping("rank_pattern", content)
        self.alphas = _mapping("alpha_pattern", content)
        self.modules_to_save = _strings("modules_to_save", content) or []
        self.targets = _strings("target_modules", content)
        self.excluded = _strings("exclude_modules", content)
        self.layers = content.get("layers_to_transform")
        self.layers_pattern = _strings("layers_pattern", content)
        if self.targets is None:
            raise ValueError("path: its configuration has no target_modules")

    def saves(self, name: str) -> bool:
        """Whether a module of this name is stored whole, or is inside one that is."""
        return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save)

    def targeted(self, name: str) -> bool:
        """Whether PEFT puts a LoRA on the module of this name in the model."""
        if self.excluded is not None and _names(self.excluded, name):
            return False
        if self.saves(name):
            return False
        if not _names(self.targets, name):
            return False
        if isinstance(self.targets, str) or self.layers is None or self.layers == []:
            return True
        return self._layer(name) in ([self.layers] if isinstance(self.layers, int) else self.layers)

    def _layer(self, name: str) -> int | None:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        if not patterns:
            found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        else:
            every = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in patterns)
            found = next((m for m in every if m), None)
        return None if found is None else int(found["index"])

    def to_ours(self, targets: Mapping[str, str], known: Mapping[str, str]) -> LoRAConfig:
        """The configuration that puts the same LoRAs in the same places.

        Args:
            targets: path in the base of every target -> its name in the model, which PEFT's patterns speak of.
            known: path of every layer that may be one -> one of our names for it, or "".
        """
        ranks = {path: _matched(self.ranks, name, self.r) for path, name in targets.items()}
        alphas = {path: _matched(self.alphas, name, self.alpha) for path, name in targets.items()}
        whole = [name for name in dict.fromkeys(known.values())
                 if name and all(path in targets for path, other in known.items() if other == name)]  # fmt: skip
        paths = [path for path in targets if known[path] not in whole]
        r, rank_pattern = _usual(ranks)
        alpha, alpha_pattern = _usual(alphas)
        try:
            return LoRAConfig(
                r=r, alpha=alpha, targets=(*whole, *paths), dropout=self.dropout, init=self.init, rslora=self.rslora,
                dora=self.dora, bias=self.bias, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: its configuration is not accepted: {error}") from error


def to_peft(
    config: LoRAConfig,
    targets: Mapping[str, tuple[int, float]],
    known: Mapping[str, str],
    *,
    model_class: str,
    base: str | None,
    saved: Iterable[str],
) -> dict[str, Any]:
    """PEFT's form of a configuration.

    Args:
        targets: path of every target in the base -> its (rank, α).
        known: path of every layer that may be one -> one of our names for it, or "".
        model_class: class of the model, which says what its task is.
        base: where the base came from, or None.
        saved: names of the modules that are stored whole.
    """
    r, ranks = _usual({path: rank for path, (rank, _) in targets.items()})
    alpha, alphas = _usual({path: alpha for path, (_, alpha) in targets.items()})
    # PEFT matches a list by suffix, where output.dense is attention.output.dense as well; a regular expression is
    # matched whole.
    kinds = dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(path)) for path in targets)
    every = [path for path in known if any(re.fullmatch(kind, path) for kind in kinds)]
    exact = list(kinds) if set(every) == set(targets) else [re.escape(path) for path in targets]
    task = next((task for suffix, task in _TASKS.items() if model_class.endswith(suffix)), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": config.dropout,
        "target_modules": rf"(?:.*\.)?(?:{'|'.join(exact)})",
        "bias": config.bias,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {re.escape(path): _plain(a) for path, a in alphas.items()},
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": False,
    }


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the most frequent value, the paths that have another)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {path: value for path, value in values.items() if value != usual}


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _names(given: str | list[str], name: str) -> bool:
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return name in given or any(name.endswith(f".{each}") for each in given)


def _matched(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _strings(key: str, content: Mapping[str, Any]) -> str | list[str] | None:
    value = content.get(key)
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError(f"path: its configuration has {key}={value!r}; accepted is text, or a list of it")


def _mapping(key: str, content: Mapping[str, Any]) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"path: its configuration has {key}={value!r}; accepted is a mapping")
    return dict(value)
