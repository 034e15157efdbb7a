"""Sublayers and heads of a batch whose rows have adaptations of their own.

A :class:`Table` says which slot each row of the batch has; a :class:`Routed` stands in a sublayer where an
:class:`Active` does otherwise and holds one of them a slot. Where one text has several tasks, a :class:`Fork` makes
them rows of their own at the first layer in which they differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.modules.active import Active
from fastadapt.modules.bottleneck import Site, norm_alone, norm_of_sum
from fastadapt.modules.heads import HeadSlot
from fastadapt.modules.peer import terms_of
from fastadapt.modules.plain import replaced
from fastadapt.modules.step import Step
from fastadapt.modules.unseen import Given


class Table:
    """The slot of every row of the batch, on the host and on the device.

    Args:
        slots: of every row.
        device: the model's.
        steps: what parts of these slots have to know about a running forward.
        texts: the text of every row, where some text has several; None: each row has its own.
    """

    def __init__(
        self, slots: Sequence[int], device: torch.device, steps: Sequence[Step], texts: Sequence[int] | None = None
    ) -> None:
        self.slots, self.steps = list(slots), list(steps)
        self.rows = torch.tensor(self.slots, dtype=torch.int64).to(device, non_blocking=True)
        self.texts = None
        if texts is not None:
            self.texts = torch.tensor(texts, dtype=torch.int64).to(device, non_blocking=True)
        self.text_count = len(self.slots) if texts is None else len(set(texts))
        self.inference_only: str | None = None  # why, where something can't train
        self.was_split = False  # whether the host ever took the rows apart, so that captured code holds their slots
        self._of_thread = threading.local()  # the pieces of its running forward
        self.each = 1  # rows of the base's batch for one of the model's: the choices of a multiple-choice model

    def assign(self, slots: Sequence[int]) -> None:
        """Give the rows other slots, in place: captured graphs read them at their next replay."""
        self.slots = list(slots)
        self.rows.copy_(torch.tensor(self.slots, dtype=torch.int64), non_blocking=True)

    @property
    def pieces(self) -> tuple[list[int], Tensor] | None:
        """Without padding: the batch row of every piece of x, in the forward that this thread runs."""
        return None if torch.compiler.is_compiling() else getattr(self._of_thread, "pieces", None)

    def of_batch(self) -> Tensor:
        """[B] int64: the slots of the rows of the base's batch, or of the pieces that it was taken apart into."""
        rows = self.rows if self.each == 1 else self.rows.repeat_interleave(self.each)
        pieces = self.pieces
        return rows if pieces is None else rows.index_select(0, pieces[1])

    @contextmanager
    def of_pieces(self, owners: list[int]) -> Iterator[None]:
        """While the context lasts, x has pieces of the batch's rows where it had the rows; ``owners``: which."""
        self._of_thread.pieces = (
            owners,
            torch.tensor(owners, dtype=torch.int64).to(self.rows.device, non_blocking=True),
        )
        try:
            yield
        finally:
            self._of_thread.pieces = None

    def forked(self, value: Any) -> Any:
        """A tensor [texts, ..., ...] with a row a slot instead; anything else, positions of one text too, as it is."""
        if self.texts is None or not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.shape[0] != self.text_count * self.each:
            return value
        texts = self.texts
        if self.each > 1:
            texts = (texts[:, None] * self.each + torch.arange(self.each, device=texts.device)).flatten()
        return value.index_select(0, texts)

    def split(self, device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """(slot and the numbers of its rows, for every slot that has some; the way back into the batch's order).

        Made on the host, where the slots are known, so that nobody waits for the device.
        """
        self.was_split = True
        slots = torch.tensor(self.slots, dtype=torch.int64).repeat_interleave(self.each)
        pieces = self.pieces
        if pieces is not None:
            slots = slots[pieces[0]]
        order = torch.argsort(slots, stable=True)
        found, counts = torch.unique_consecutive(slots[order], return_counts=True)
        parts = order.to(device, non_blocking=True).split(counts.tolist())
        return list(zip(found.tolist(), parts, strict=True)), torch.argsort(order).to(device, non_blocking=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        raise RuntimeError("a routed model can't be copied; accepted is a copy made outside of fa.route")

    def __reduce__(self) -> Any:
        raise RuntimeError("a routed model can't be pickled; accepted is to do so outside of fa.route")


class Routed:
    """What runs in one sublayer, by slot. It answers what an :class:`Active` is asked, for all slots together."""

    prefix = None  # methods with prefixes are not routed

    def __init__(self, table: Table, actives: Sequence[Active]) -> None:
        self.table, self.actives = table, list(actives)

    def touches(self, child: str) -> bool:
        return any(active.touches(child) for active in self.actives)

    def rank(self, children: Sequence[str]) -> int:
        return max(active.rank(children) for active in self.actives)

    def bottleneck(self) -> int:
        """The widest adapter's width; 0 where there is none."""
        sites = (active.site for active in self.actives)
        return max(0 if site is None or site.down is None else site.down.out_features for site in sites)

    def project(self, x: Tensor, linears: Mapping[str, nn.Linear], activation: str, dropout_p: float) -> Tensor:
        """As :func:`fastadapt.modules.project.project`, every row with its slot's biases and LoRAs."""
        weights, theirs = [m.weight for m in linears.values()], terms_of(linears.values())
        own = [(name, m.bias) for name, m in linears.items()]
        if any(active.biases for active in self.actives):
            biases = [active.bias(name, bias) for active in self.actives for name, bias in own]
        else:
            biases = [bias for _, bias in own] * len(self.actives)
        placed = [
            (part, i, slot)
            for slot, active in enumerate(self.actives) if active.loras
            for i, name in enumerate(linears)
            for part in active.loras.get(name, ())
        ]  # fmt: skip
        matrices = [part.matrices() for part, _, _ in placed]
        loras = ops.LowRanks(
            [a for a, _ in matrices], [b for _, b in matrices], [part.scale for part, _, _ in placed],
            [i for _, i, _ in placed], [slot for _, _, slot in placed], [part.dropout_p() for part, _, _ in placed],
            [None] * len(placed),
        ).extend(replace(term, slot=slot) for term in theirs for slot in range(len(self.actives)))  # fmt: skip
        rows = self.table.of_batch()
        return ops.linear(x, weights, biases, activation=activation, dropout_p=dropout_p, loras=loras, rows=rows)

    def close(self, f: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
        """Adapter, residual and LayerNorm of a sublayer: f its output, x its input, [B, S, H]; norm the base's."""
        sites = [None if a.site is None or a.site.asleep() else a.site for a in self.actives]
        own_biases = [a.norm_bias for a in self.actives]
        if replaced(norm, nn.LayerNorm) is None:
            if all(site is None for site in sites) and all(b is None for b in own_biases):
                return ops.add_norm(f, x, norm.weight, norm.bias, eps=norm.eps)
            forms = {site.form() for site in sites if site is not None and site.down is not None}
            if forms <= {"after", "beside"}:
                return self._fused(f, x, norm, sites, own_biases, skip=True)
            if forms == {"normed"}:
                read, total = norm_of_sum(f, x, norm)
                return self._fused(read, total, norm, sites, own_biases, skip=False)
        return self._by_slot(f, x, norm, sites, own_biases)

    def _fused(
        self,
        x: Tensor,
        residual: Tensor,
        norm: nn.LayerNorm,
        sites: Sequence[Site | None],
        own_biases: Sequence[Tensor | None],
        skip: bool,
    ) -> Tensor:
        slots = []
        for site, own_bias in zip(sites, own_biases, strict=True):
            closing = norm if site is None or site.LayerNorm is None else site.LayerNorm
            bias = closing.bias if own_bias is None else own_bias
            if site is None or site.down is None:
                slots.append(ops.Slot(closing.weight, bias, skip=skip))
            else:
                slots.append(site.slot(closing.weight, bias, skip=skip))
        rows = self.table.of_batch()
        chosen = [None if site is None else site.rows() for site in sites]
        drawn = [(i, live) for i, live in enumerate(chosen) if live is not None]
        if drawn:  # the rows that AdapterDrop leaves without their adapter have a slot of the base's own
            slots.append(ops.Slot(norm.weight, norm.bias, skip=skip))
            for i, live in drawn:
                rows = torch.where((rows == i) & ~live.to(rows.device), len(slots) - 1, rows)
        return ops.bottleneck_rows(x, slots, rows, residual=residual, eps=norm.eps)

    def _by_slot(
        self,
        f: Tensor,
        x: Tensor,
        norm: nn.Module,
        sites: Sequence[Site | None],
        own_biases: Sequence[Tensor | None],
    ) -> Tensor:
        """Each slot's rows on their own, for adapters of forms that no op has, or that are not of one form."""

        def close(slot: int, f: Tensor, x: Tensor, live: Tensor | None) -> Tensor:
            site = sites[slot]
            if site is None:
                return _bare(f, x, norm, own_biases[slot])
            y = site(f, x, norm if site.LayerNorm is None else site.LayerNorm)
            return y if live is None else torch.where(live.view(-1, 1, 1), y, _bare(f, x, norm, None))

        parts, back = self.table.split(f.device)
        found = []
        for slot, numbers in parts:
            live = None if sites[slot] is None else sites[slot].rows()
            live = None if live is None else live.to(f.device).index_select(0, numbers)
            found.append(close(slot, f.index_select(0, numbers), x.index_select(0, numbers), live))
        return torch.cat(found).index_select(0, back)

    def norm(self, x: Tensor, own: nn.LayerNorm) -> Tensor:
        """A LayerNorm that stands alone, [B, S, H]."""
        slots = []
        for active in self.actives:
            site = None if active.site is None or active.site.asleep() else active.site
            closing = own if site is None else site.LayerNorm
            slots.append(ops.Slot(closing.weight, closing.bias if active.norm_bias is None else active.norm_bias))
        if all(s.norm_weight is own.weight and s.norm_bias is own.bias for s in slots):
            return norm_alone(x, own.weight, own.bias, own.eps)
        return ops.bottleneck_rows(x, slots, self.table.of_batch(), eps=own.eps)


def _bare(f: Tensor, x: Tensor, norm: nn.Module, own_bias: Tensor | None) -> Tensor:
    if own_bias is None:
        return norm_of_sum(f, x, norm)[0]
    return ops.add_norm(f, x, norm.weight, own_bias, eps=norm.eps)


class RoutedHead:
    """The heads of all slots, in one slot of the model.

    Args:
        table: of the batch.
        heads: the head of every slot, or None for the model's own.
        own: the slot, which is the model's own head.
    """

    def __init__(self, table: Table, heads: Sequence[nn.Module | None], own: HeadSlot) -> None:
        self.table, self.heads, self.own = table, list(heads), own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        heads = [self.own if head is None else head for head in self.heads]
        if x is not None and len(args) == 1 and not kwargs and all(_is_small(m) for m in heads):
            return self._batched(x, heads)
        return self._by_slot(*args, **kwargs)

    def _batched(self, x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
        """All rows as one batched product; x [B, H] or [B, S, H]."""
        rows = self.table.of_batch()
        weight = torch.stack([m.weight for m in linears]).index_select(0, rows)
        y = (x if x.dim() == 3 else x.unsqueeze(1)) @ weight.transpose(1, 2)
        biases = [m.bias for m in linears]
        if any(b is not None for b in biases):
            zero = linears[0].weight.new_zeros(linears[0].out_features)
            bias = torch.stack([zero if b is None else b for b in biases]).index_select(0, rows)
            y = (y + bias.unsqueeze(1)).to(y.dtype)
        return y if x.dim() == 3 else y.squeeze(1)

    def _by_slot(self, *args: Any, **kwargs: Any) -> Any:
        """Each slot's rows through its head."""
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        batch = given[0].shape[0]
        parts, back = self.table.split(given[0].device)

        def take(value: Any, numbers: Tensor) -> Any:
            rowed = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
            return value.index_select(0, numbers) if rowed else value

        found = []
        for slot, numbers in parts:
            head = self.own.run_own if self.heads[slot] is None else self.heads[slot]
            found.append(head(*(take(a, numbers) for a in args), **{k: take(v, numbers) for k, v in kwargs.items()}))
        if isinstance(found[0], tuple):
            return tuple(torch.cat(each).index_select(0, back) for each in zip(*found, strict=True))
        return torch.cat(found).index_select(0, back)


def _is_small(head: nn.Module) -> bool:
    """Whether a head is a linear layer of which a copy for every row costs less than to take the rows apart."""
    return replaced(head, nn.Linear) is None and head.out_features <= head.in_features


class Fork:
    """Before a module's forward: what it is given has a row a slot from here on, where it had a row a text."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        forked = self.table.forked
        return tuple(forked(value) for value in args), {key: forked(value) for key, value in kwargs.items()}


class BeginRouted:
    """Before the base's forward: the batch must have the table's length; then what is drawn in this forward.

    Args:
        let_train: gives the parameters that train their ``requires_grad``, where that was not needed until now.
    """

    def __init__(self, table: Table, let_train: Callable[[], None]) -> None:
        self.table, self.let_train, self.fork = table, let_train, Fork(table)

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, count = Given.to(args, kwargs).tokens, self.table.text_count
        if ids is not None and ids.shape[0] != count * self.table.each:
            raise ValueError(f"names: got {count} in fa.route, but the batch has {ids.shape[0]} rows; accepted is one "
                             "name, or tuple of names, a row")  # fmt: skip
        if base.training and self.table.inference_only is not None:
            raise RuntimeError(f"names: {self.table.inference_only}; accepted is eval")
        self.let_train()
        if self.table.steps:
            args, kwargs = self.fork(base, args, kwargs)
        for step in self.table.steps:
            step.begin(base, args, kwargs)


class CountChoices:
    """Before the model's forward: how many of the base's rows belong to one name."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        shape = () if ids is None and embeds is None else ids.shape if ids is not None else embeds.shape[:-1]
        self.table.each = shape[1] if len(shape) == 3 else 1
