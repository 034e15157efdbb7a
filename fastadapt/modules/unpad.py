"""Batches without padding: the encoder's layers see the real tokens alone.

At the encoder's entry the tokens of all sequences move together, sorted by the length of their sequence; at its exit
they go back, and what was padding is zeros. Between the two, linears, adapters and LayerNorms run over [tokens, H], and
attention runs over each sequence by its length (ByteTransformer, Zhai et al. 2022, arXiv:2210.03052, section III-C).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from fastadapt import dispatch, ops
from fastadapt.modules.prefix import Prefix
from fastadapt.modules.routed import Routed
from fastadapt.modules.sublayers import FusedSelfAttention, FusedSublayer, Op

# Below as many tokens, padding included, sorting costs what it saves; and so it does with less padding than this.
LEAST_TOKENS = 512
LEAST_PADDING = {"cpu": 0.1, "cuda": 0.25}
# Rows with adaptations of their own are told apart in pieces of this many tokens, all of one sequence.
ROUTED_PIECE = 16


class _Masks(threading.local):
    """Masks on their way from the hooks before a forward to its encoder, a thread's own: several may run one model."""

    def __init__(self) -> None:
        # What a model was given whose head reads the first position alone; what the encoder may take for padding.
        self.given: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
        self.noted: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


_masks = _Masks()


@dataclass(frozen=True)
class Group:
    """Sequences of one length, one behind the other: ``count`` of ``length`` tokens in ``room`` rows each."""

    start: int
    count: int
    room: int
    length: int


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the real tokens of a padded batch [B, S] lie without padding. It stands for the attention mask.

    Args:
        source: [T] int64, the places of the real tokens in [B·S].
        place: [T] int64, their rows without padding; None where these are 0 to T - 1.
        rows: how many rows there are, a multiple of ``piece``.
        piece: rows of one sequence that stay together.
        owners: the batch row of every piece.
        groups: the sequences by length.
        bounds: [..] int32, where sequences, and the rows between them, begin and end.
    """

    source: Tensor
    place: Tensor | None
    rows: int
    piece: int
    owners: list[int]
    groups: tuple[Group, ...]
    bounds: Tensor

    @classmethod
    def of(cls, mask: Tensor, piece: int, device: torch.device) -> Packed:
        """Of a boolean mask [B, S] on the CPU, whose every row has a True."""
        lengths = mask.sum(1)
        order = torch.argsort(lengths, stable=True)
        lengths = lengths[order]
        row, column = torch.nonzero(mask[order], as_tuple=True)
        room = (lengths + piece - 1) // piece * piece
        starts = torch.cumsum(room, 0) - room
        firsts = torch.cumsum(lengths, 0) - lengths
        place = starts[row] + torch.arange(row.numel()) - firsts[row]
        groups, start = [], 0
        distinct, counts = torch.unique_consecutive(lengths, return_counts=True)
        for length, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            each = -(-length // piece) * piece
            groups.append(Group(start, count, each, length))
            start += count * each
        ends = torch.stack([starts, starts + lengths], 1).flatten()  # rows between sequences attend to each other
        bounds = torch.unique(torch.cat([ends, torch.tensor([start])])).to(torch.int32)
        return cls(
            (order[row] * mask.shape[1] + column).to(device, non_blocking=True),
            None if piece == 1 else place.to(device, non_blocking=True),
            start, piece, order.repeat_interleave(room // piece).tolist() if piece > 1 else [], tuple(groups),
            bounds.to(device, non_blocking=True),
        )  # fmt: skip

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, H] as [rows / piece, piece, H], or as [1, rows, H] where pieces are single rows."""
        real = x.flatten(0, 1).index_select(0, self.source)
        if self.place is None:
            return real.unsqueeze(0)
        return x.new_zeros(self.rows, x.shape[-1]).index_copy(0, self.place, real).view(-1, self.piece, x.shape[-1])

    def unpack(self, y: Tensor, shape: torch.Size) -> Tensor:
        """The way back, to ``shape`` [B, S, H]; zeros where padding was."""
        real = y.flatten(0, 1)
        real = real if self.place is None else real.index_select(0, self.place)
        return real.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, self.source, real).view(shape)

    # -- attention -------------------------------------------------------------------------------------------------

    def attention(self, qkv: Tensor, heads: int, prefix: Prefix | None, scale: float | None, p: float) -> Tensor:
        """Each sequence's attention to itself; qkv [.., .., 3H]."""
        flat = qkv.flatten(0, 1)
        if flat.device.type == "cpu":
            out = self._by_length(flat, heads, prefix, scale, p)
        elif prefix is None and p == 0.0 and flat.dtype in (torch.bfloat16, torch.float16):
            out = self._varlen(flat, heads, scale)
        else:
            out = self._padded_again(flat, heads, prefix, scale, p)
        return out.view(*qkv.shape[:2], -1)

    def _by_length(self, qkv: Tensor, heads: int, prefix: Prefix | None, scale: float | None, p: float) -> Tensor:
        """One op for all sequences of a length."""
        before, parts = None if prefix is None else prefix(1), []
        sizes = [g.count * g.room for g in self.groups]
        # Split, not sliced: the backward of each slice would write a gradient of all rows.
        for g, own in zip(self.groups, qkv.split(sizes), strict=True):
            own = own.view(g.count, g.room, -1)
            if g.room == g.length:
                out = ops.attention(own, heads, prefix=before, scale=scale, dropout_p=p)
            else:
                out = ops.attention(own[:, : g.length], heads, prefix=before, scale=scale, dropout_p=p)
                out = F.pad(out, (0, 0, 0, g.room - g.length))
            parts.append(out.flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _varlen(self, qkv: Tensor, heads: int, scale: float | None) -> Tensor:
        """FlashAttention over sequences of any length, by where they begin and end."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
        longest = self.groups[-1].length
        return varlen_attn(q, k, v, self.bounds, self.bounds, longest, longest, scale=scale).flatten(1)

    def _padded_again(self, qkv: Tensor, heads: int, prefix: Prefix | None, scale: float | None, p: float) -> Tensor:
        """The padded attention, between a copy and another."""
        longest = self.groups[-1].length
        rows, reached = [], 0
        for g in self.groups:
            first = torch.arange(g.count)[:, None] * longest + reached
            rows.append((first + torch.arange(g.length)).flatten())
            reached += g.count * longest
        at = torch.cat(rows).to(qkv.device, non_blocking=True)
        here = torch.arange(self.rows, device=qkv.device) if self.place is None else self.place
        real = torch.zeros(reached, dtype=torch.bool, device=qkv.device).index_fill(0, at, True)
        padded = qkv.new_zeros(reached, qkv.shape[1]).index_copy(0, at, qkv.index_select(0, here))
        batch = reached // longest
        q, k, v = padded.view(batch, longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mask = real.view(batch, 1, 1, longest).expand(-1, -1, longest, -1)
        if prefix is not None:
            k, v, mask = FusedSelfAttention.behind(prefix, k, v, mask)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
        out = out.transpose(1, 2).reshape(reached, -1).index_select(0, at)
        return out if self.place is None else out.new_zeros(self.rows, out.shape[1]).index_copy(0, here, out)


class FusedEncoder(FusedSublayer):
    """The stack of layers, which removes the padding where that pays and nobody would notice.

    Padding counts where a mask [B, S] of the base's was given. Hidden states of padding are then zeros at the exit, so
    that happens where a head reads position 0 alone, or where the caller has asked for it (``skip_padding``).
    """

    attentions: Sequence[nn.Module] = ()  # of all layers
    others: Sequence[nn.Module] = ()  # what else of the layers may be fused
    head: str = "caller"  # who reads the hidden states: "first" position alone, "all", or the caller
    skips_padding: bool = False  # the caller wants zeros where padding is
    keeps_padding: bool = False  # while a graph is captured, whose shapes are fixed

    def refusal(self) -> str | None:
        return None  # the original forward is what runs the layers, with padding or without

    def padding_stays(self) -> str | None:
        """Why the layers see padding, whatever the batch; None where they need not."""
        for attention in self.attentions:
            if not isinstance(attention, FusedSelfAttention):
                return f"attention is a {type(attention).__name__}"
            if getattr(attention, "foreign", False):
                return "AdapterHub's library runs these layers"
            if (reason := attention.refusal()) is not None:
                return f"of attention, {reason}"
            prefix = None if attention.active is None else attention.active.prefix
            if prefix is not None and prefix.training and prefix.dropout > 0.0:
                return "a dropout gives every row of the batch its own prefix"
        for m in self.others:
            for active in m.active.actives if isinstance(m.active, Routed) else (m.active,) if m.active else ():
                site = active.site
                if site is None:
                    continue
                if getattr(site, "gate", None) is not None:
                    return "a gate is a mean over all positions"
                if site.rows() is not None:
                    return "rows of the batch go without their adapters"
        if self.head == "all":
            return "the model's head reads it"
        if self.head == "caller" and not self.skips_padding:
            return "hidden states of padding are outputs (fa.skip_padding makes them zeros)"
        if getattr(self.config, "chunk_size_feed_forward", 0):
            return "the feed-forward network runs in chunks"
        if any(is_watched(module) for layer in self.layer for module in layer.modules()):
            return "a hook or a forward of its own in a layer"
        return None

    def ops(self, length: int) -> list[Op]:
        return []

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        noted = None if torch.compiler.is_compiling() else _masks.noted.pop(self, None)
        packed = None if noted is None or attention_mask is None else self._packed(noted, hidden_states, args, kwargs)
        if packed is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        with self._routed(packed):
            out = super().forward(packed.pack(hidden_states), packed, *args, **kwargs)
        last = packed.unpack(out[0], hidden_states.shape)
        if isinstance(out, tuple):
            return (last, *out[1:])
        out["last_hidden_state"] = last
        return out

    def _packed(self, mask: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Packed | None:
        """The batch without its padding; None where it stays."""
        asked = [*args, *(v for k, v in kwargs.items() if k not in ("return_dict", "position_ids", "cache_position"))]
        if any(_set(v) for v in asked) or mask.shape != x.shape[:2] or mask.numel() < LEAST_TOKENS:
            return None
        if x.device.type not in LEAST_PADDING or self.padding_stays() is not None:
            return None
        real = (mask != 0).cpu()
        if int(real.sum()) > (1.0 - LEAST_PADDING[x.device.type]) * real.numel() or not bool(real[:, 0].all()):
            return None  # the pooler reads position 0, which a mask that hides it does not make padding of
        return Packed.of(real, ROUTED_PIECE if self._table() is not None else 1, x.device)

    def _table(self):
        modules = (*self.attentions, *self.others)
        return next((m.active.table for m in modules if isinstance(m.active, Routed)), None)

    def _routed(self, packed: Packed) -> AbstractContextManager[None]:
        table = self._table()
        return nullcontext() if table is None else table.of_pieces(packed.owners)


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


def _set(value: Any) -> bool:
    """Whether an argument of the encoder asks for something."""
    if isinstance(value, (list, tuple)):
        return any(_set(v) for v in value)
    return value is not None and value is not False and value is not True


def _mask_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask if isinstance(mask, Tensor) else None


class HeadReadsFirst:
    """Before the forward of a model whose head reads position 0 alone: nobody sees what the base makes of padding.

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
        _masks.given.pop(self.encoder, None)
        mask = _mask_of(args, kwargs)
        if mask is not None and self.holds(model, self.base) and not is_watched(self.encoder):
            _masks.given[self.encoder] = mask


class NoteMask:
    """Before the base's forward: tell the encoder which positions are padding, where nobody will see what is there."""

    def __init__(self, encoder: FusedEncoder) -> None:
        self.encoder = encoder

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        encoder = self.encoder
        if torch.compiler.is_compiling() or encoder.keeps_padding:
            return
        _masks.noted.pop(encoder, None)
        given, mask = _masks.given.pop(encoder, None), _mask_of(args, kwargs)
        if mask is None or mask.dim() != 2 or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if dispatch.transformed():  # a mapped mask has no values to look at, and no memory of its own
            return
        # A model of several choices gives the base another view of its mask.
        unseen = given is not None and given.data_ptr() == mask.data_ptr() and given.numel() == mask.numel()
        config = base.config
        asked = any(
            kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name, False)
            for name in ("output_hidden_states", "output_attentions")
        )
        if (unseen or encoder.skips_padding) and not asked:
            _masks.noted[encoder] = mask
