"""What nobody sees of a forward: padding, or all positions but the first.

Two hooks find that out before the encoder runs: one before the forward of a model whose head reads position 0 alone,
one before its base's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from fastadapt import dispatch

if TYPE_CHECKING:
    from fastadapt.modules.unpad import FusedEncoder


@dataclass(frozen=True, eq=False)
class Given:
    """What a forward was called with: token ids (or embeddings) and mask."""

    tokens: Tensor | None
    mask: Tensor | None

    @classmethod
    def to(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        return cls(*(value if isinstance(value, Tensor) else None for value in (tokens, mask)))

    def went_to(self, other: Given) -> bool:
        """Whether the other forward was given the same; a model of several choices gives its base other views."""
        return _one_memory(self.tokens, other.tokens) and _one_memory(self.mask, other.mask)


def _one_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel())


@dataclass(frozen=True, eq=False)
class Unseen:
    """What nobody will see of one forward: ``padding``, by its mask, and whether all ``but_first`` positions."""

    padding: Tensor | None
    but_first: bool


class Notes(threading.local):
    """On their way from the hooks before a forward to its encoder, a thread's own: several may run one model."""

    def __init__(self) -> None:
        # What a model was given whose head reads the first position alone; what its encoder need not compute.
        self.given: WeakKeyDictionary[nn.Module, Given] = WeakKeyDictionary()
        self.unseen: WeakKeyDictionary[nn.Module, Unseen] = WeakKeyDictionary()


notes = Notes()


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees what the module is given or gives: by a hook, or by a forward of the instance's own.

    transformers' hooks stay for good, and see nothing unless hidden states or attentions are asked for.
    """
    if "forward" in module.__dict__ or _global_forward_hooks or _global_forward_pre_hooks:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(
        (getattr(hook, "__module__", None) or "").partition(".")[0] not in ("transformers", "fastadapt")
        for hook in hooks
    )


class HeadReadsFirst:
    """Before the forward of a model whose head reads position 0 alone: nobody sees what its base makes of the others.

    Args:
        encoder: of the model.
        base: the bare model around it.
        holds: whether what runs now behind the base is such: of the model and the base.
    """

    def __init__(self, encoder: FusedEncoder, base: nn.Module, holds: Callable[[nn.Module, nn.Module], bool]) -> None:
        self.encoder, self.base, self.holds = encoder, base, holds

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        notes.given.pop(self.encoder, None)
        if self.holds(model, self.base) and not is_watched(self.encoder):
            notes.given[self.encoder] = Given.to(args, kwargs)


class NoteUnseen:
    """Before the base's forward: tell the encoder what nobody will see of it."""

    def __init__(self, encoder: FusedEncoder) -> None:
        self.encoder = encoder

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        encoder = self.encoder
        if torch.compiler.is_compiling():
            return
        notes.unseen.pop(encoder, None)
        model_given = notes.given.pop(encoder, None)
        if model_given is None and not encoder.skips_padding:
            return
        if dispatch.transformed():  # a mapped tensor has no values to look at, and no memory of its own
            return
        asked = any(
            kwargs.get(name) if kwargs.get(name) is not None else getattr(base.config, name, False)
            for name in ("output_hidden_states", "output_attentions")
        )
        given = Given.to(args, kwargs)
        but_first = model_given is not None and model_given.went_to(given)
        if asked or not (but_first or encoder.skips_padding):
            return
        notes.unseen[encoder] = Unseen(None if encoder.keeps_padding else _readable(given.mask), but_first)


class Forget:
    """After a forward, failed ones too: what was noted of it is not of the next."""

    def __init__(self, encoder: FusedEncoder) -> None:
        self.encoder = encoder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            notes.given.pop(self.encoder, None)
            notes.unseen.pop(self.encoder, None)


def _readable(mask: Tensor | None) -> Tensor | None:
    """A mask [B, S] whose values can be looked at."""
    if mask is None or mask.dim() != 2 or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return mask
