"""What an encoder need not compute: padding, and in the last layer all but position 0 where the head reads that alone.

At the encoder's entry the tokens of all sequences move together, sorted by the length of their sequence; at its exit
they go back, and what was padding is zeros. Between the two, linears, adapters and LayerNorms run over [tokens, H], and
attention runs over each sequence by its length (ByteTransformer, Zhai et al. 2022, arXiv:2210.03052, section III-C).

Of a last layer that is read at position 0 alone, keys and values are of all positions, everything else is of that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.modules.active import Active, Part
from fastadapt.modules.prefix import Prefix
from fastadapt.modules.routed import Routed, Table
from fastadapt.modules.sublayers import FusedLayer, FusedSelfAttention, FusedSublayer, Op, first_alone
from fastadapt.modules.unseen import is_watched, notes

# Below as many tokens, padding included, sorting costs what it saves; and so it does with less padding than this.
LEAST_TOKENS = 512
LEAST_PADDING = {"cpu": 0.1, "cuda": 0.25}
# Rows with adaptations of their own are told apart in pieces of this many tokens, all of one sequence.
ROUTED_PIECE = 16


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
        order: [B] int64, the batch row of every sequence; ``firsts``: [B] int64, where it begins.
    """

    source: Tensor
    place: Tensor | None
    rows: int
    piece: int
    owners: list[int]
    groups: tuple[Group, ...]
    bounds: Tensor
    order: Tensor
    firsts: Tensor

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
            bounds.to(device, non_blocking=True), order.to(device, non_blocking=True),
            starts.to(device, non_blocking=True),
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

    def first(self, x: Tensor) -> Tensor:
        """Position 0 of every sequence, as [B, 1, H]."""
        return x.flatten(0, 1).index_select(0, self.firsts).unsqueeze(1)

    def unpack_first(self, y: Tensor) -> Tensor:
        """[B, 1, H] in the batch's order."""
        return torch.empty_like(y).index_copy(0, self.order, y)

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

    def attention_of_first(
        self, q: Tensor, kv: Tensor, heads: int, prefix: Prefix | None, scale: float | None, p: float
    ) -> Tensor:
        """That of position 0 of each sequence; q [B, 1, H], kv [.., .., 2H]."""
        parts, queries = [], q.split([g.count for g in self.groups])
        for g, asking, own in zip(self.groups, queries, self._by_group(kv), strict=True):
            own = own.view(g.count, g.room, -1)[:, : g.length]
            parts.append(FusedSelfAttention.of_first(asking, own, heads, prefix, None, scale, p))
        return torch.cat(parts)

    def _by_group(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rows of each group. Split, not sliced: the backward of each slice would write a gradient of all rows."""
        return x.flatten(0, -2).split([g.count * g.room for g in self.groups])

    def _by_length(self, qkv: Tensor, heads: int, prefix: Prefix | None, scale: float | None, p: float) -> Tensor:
        """One op for all sequences of a length."""
        before, parts = None if prefix is None else prefix(1), []
        for g, own in zip(self.groups, self._by_group(qkv), strict=True):
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
        out = FusedSelfAttention.attend(q, k, v, prefix, mask, scale, p).flatten(0, 1).index_select(0, at)
        return out if self.place is None else out.new_zeros(self.rows, out.shape[1]).index_copy(0, here, out)


class FusedEncoder(FusedSublayer):
    """The stack of layers, which leaves out what nobody would notice.

    Padding counts where a mask [B, S] of the base's was given. Hidden states of padding are then zeros at the exit, so
    that happens where a head reads position 0 alone, or where the caller has asked for it (``skip_padding``). For such
    a head the last layer computes position 0 alone, and hidden states are [B, 1, H] at the exit.
    """

    sublayers: Sequence[tuple[nn.Module, ...]] = ()  # what may be fused of each layer, attention first
    head: str = "caller"  # who reads the hidden states: "first" position alone, "all", or the caller
    skips_padding: bool = False  # the caller wants zeros where padding is
    keeps_padding: bool = False  # while a graph is captured, whose shapes are fixed

    def refusal(self) -> str | None:
        return None  # the original forward is what runs the layers, with padding or without

    def padding_stays(self) -> str | None:
        """Why the layers see padding, whatever the batch; None where they need not."""
        for attention, *_ in self.sublayers:
            if not isinstance(attention, FusedSelfAttention):
                return f"attention is a {type(attention).__name__}"
            if getattr(attention, "foreign", False):
                return "AdapterHub's library runs these layers"
            if (reason := attention.refusal()) is not None:
                return f"of attention, {reason}"
            prefix = None if attention.active is None else attention.active.prefix
            if prefix is not None and prefix.training and prefix.dropout > 0.0:
                return "a dropout gives every row of the batch its own prefix"
        for site in (active.site for layer in self.sublayers for m in layer for active in _actives(m)):
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

    def all_positions_run(self) -> str | None:
        """Why the last layer computes all positions, though position 0 alone is read; None where it need not."""
        last = self.layer[-1]
        if not isinstance(last, FusedLayer):
            return f"the last layer is a {type(last).__name__}"
        if self.head != "first":
            return "the model's head reads them" if self.head == "all" else "hidden states are outputs"
        for m in self.sublayers[-1]:
            if not isinstance(m, FusedSublayer):
                return f"in the last layer, there is a {type(m).__name__}"
            if getattr(m, "foreign", False):
                return "AdapterHub's library runs these layers"
            if (reason := m.refusal()) is not None:
                return f"in the last layer, {reason}"
        for site in (active.site for m in self.sublayers[-1] for active in _actives(m)):
            if getattr(site, "gate", None) is not None:
                return "a gate is a mean over all positions"
            parts = site.modules() if site is not None and site.training else ()
            if any(isinstance(part, Part) and part.has_loss and part.averaged for part in parts):
                return "a loss is a mean over all positions"
        if any(is_watched(module) for module in last.modules()):
            return "a hook or a forward of its own in the last layer"
        return None

    def ops(self, length: int) -> list[Op]:
        return []

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        unseen = None if torch.compiler.is_compiling() else notes.unseen.pop(self, None)
        if unseen is None or _asks_for_more(args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        packed = None
        if unseen.padding is not None and attention_mask is not None:
            packed = self._packed(unseen.padding, hidden_states)
        table = self._table()
        # Without padding rows with adaptations of their own are told apart by pieces, and on a GPU attention is one op.
        alone = unseen.but_first and (packed is None or (table is None and hidden_states.device.type == "cpu"))
        with first_alone(self.layer[-1] if alone and self.all_positions_run() is None else None) as read:
            if packed is None:
                return super().forward(hidden_states, attention_mask, *args, **kwargs)
            with nullcontext() if table is None else table.of_pieces(packed.owners):
                out = super().forward(packed.pack(hidden_states), packed, *args, **kwargs)
        last = packed.unpack_first(out[0]) if read.called else packed.unpack(out[0], hidden_states.shape)
        if isinstance(out, tuple):
            return (last, *out[1:])
        out["last_hidden_state"] = last
        return out

    def _packed(self, mask: Tensor, x: Tensor) -> Packed | None:
        """The batch without its padding; None where it stays."""
        if mask.shape != x.shape[:2] or mask.numel() < LEAST_TOKENS:
            return None
        if x.device.type not in LEAST_PADDING or self.padding_stays() is not None:
            return None
        real = (mask != 0).cpu()
        if int(real.sum()) > (1.0 - LEAST_PADDING[x.device.type]) * real.numel() or not bool(real[:, 0].all()):
            return None  # the pooler reads position 0, which a mask that hides it does not make padding of
        return Packed.of(real, ROUTED_PIECE if self._table() is not None else 1, x.device)

    def _table(self) -> Table | None:
        """Of a batch whose rows have adaptations of their own."""
        actives = (getattr(m, "active", None) for layer in self.sublayers for m in layer)
        return next((active.table for active in actives if isinstance(active, Routed)), None)


def _actives(module: nn.Module) -> Sequence[Active]:
    """What runs in a sublayer, of all rows."""
    active = getattr(module, "active", None)
    return active.actives if isinstance(active, Routed) else () if active is None else (active,)


def _asks_for_more(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an argument of the encoder asks for something."""
    passive = ("return_dict", "position_ids", "cache_position")
    return any(_set(v) for v in (*args, *(v for k, v in kwargs.items() if k not in passive)))


def _set(value: Any) -> bool:
    """Whether an argument of the encoder asks for something."""
    if isinstance(value, (list, tuple)):
        return any(_set(v) for v in value)
    return value is not None and value is not False and value is not True
