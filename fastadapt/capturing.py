"""``capture``: inference in padded buckets of fixed shapes, each one a CUDA graph."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import dispatch
from fastadapt.models import wiring_of
from fastadapt.modules import folded
from fastadapt.modules.routed import Routed, Table
from fastadapt.modules.state import container_of
from fastadapt.modules.unpad import FusedEncoder

_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_LEAST_LENGTH = 16  # of the buckets that are chosen here
_WARM_UP = 3  # forwards before a capture: what is packed, folded or tabled once is so outside of the graph


def capture(
    model: nn.Module,
    example: Mapping[str, Tensor],
    *,
    batches: Iterable[int] | None = None,
    lengths: Iterable[int] | None = None,
) -> Captured:
    """The model's forward for inference, as one CUDA graph for each bucket of shapes; without launches, what is left of
    a small batch is its kernels.

    The result is called with the tensors of ``example``, of any batch and length up to the largest bucket. It copies
    them into the smallest bucket's buffers, pads ids with the padding id and the mask with zeros, replays the bucket's
    graph, and gives a copy of the model's output without the padding. A bucket is captured at its first use, after a
    few forwards to warm up.

    What changes afterwards is followed: another active adaptation, merge, swap, ``route`` and what its ``assign``
    writes, ``.to``, a load, an optimizer step. Whatever a graph holds that is not read anew at a replay is compared at
    each call, and the bucket is captured again where that changed. Writes through ``.data`` that keep the address need
    :func:`fastadapt.refresh`, as elsewhere.

    On a CPU there are no graphs: the same buckets run the model as it is, so that a program can be tried anywhere. It
    gains nothing there, and :attr:`Captured.graphs` is False.

    Args:
        model: of a wired architecture, accelerated or adapted, in eval mode.
        example: the inputs by their names, on the model's device: ``input_ids`` [B, S] (or [B, C, S] for multiple
            choice) and ``attention_mask``, which the call may leave out; ``token_type_ids`` and ``position_ids`` where
            they are given.
        batches: sizes of the buckets; None is the powers of two up to the example's and the example's.
        lengths: likewise; None is the powers of two from 16 and the example's.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted. A call raises for other inputs
            than the example's, for shapes beyond the largest bucket, and for a model in training mode.
    """
    return Captured(model, example, batches, lengths)


@dataclass(eq=False)
class _Bucket:
    """Buffers of one shape, what runs over them, and the state of the model for which that holds."""

    inputs: dict[str, Tensor]
    run: Callable[[], Any]
    state: tuple[Any, ...]


class Captured:
    """What :func:`capture` returns.

    Attributes:
        graphs: whether buckets are CUDA graphs.
        batches, lengths: of the buckets, smallest first.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Mapping[str, Tensor],
        batches: Iterable[int] | None,
        lengths: Iterable[int] | None,
    ) -> None:
        wiring = wiring_of(model)
        self._base = wiring.base_of(model)
        self._encoder = attrgetter(wiring.encoder)(self._base)
        self._model, self._sublayers = model, [m for _, m in wiring.sublayers(self._base)]
        if not isinstance(example, Mapping) or not isinstance(example.get("input_ids"), Tensor):
            raise TypeError("example: accepted is a mapping of the model's inputs, with input_ids")
        for name, value in example.items():
            if name not in _TOKENS:
                raise ValueError(f"example: got {name!r}; accepted are {', '.join(_TOKENS)}")
            if not isinstance(value, Tensor) or value.shape != example["input_ids"].shape:
                raise ValueError(f"example: {name} is not a tensor of input_ids' shape")
        ids = example["input_ids"]
        if ids.dim() not in (2, 3) or not ids.numel():
            raise ValueError(f"example: input_ids have shape {tuple(ids.shape)}; accepted are [B, S] and [B, C, S]")
        _check_mode(model)
        self.device = next(model.parameters()).device
        self.graphs = self.device.type == "cuda"
        self.batches = _sizes("batches", batches, ids.shape[0], 1)
        self.lengths = _sizes("lengths", lengths, ids.shape[-1], _LEAST_LENGTH)
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and self.lengths[-1] > most:
            raise ValueError(f"lengths: got {self.lengths[-1]}; accepted are lengths up to {most}, the model's longest")
        self._choices = ids.shape[1:-1]
        self._dtypes = {"attention_mask": torch.int64} | {name: value.dtype for name, value in example.items()}
        pad = getattr(model.config, "pad_token_id", None)
        self._fill = {"input_ids": 0 if pad is None else pad}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self._buckets: dict[tuple[tuple[int, int], tuple[Any, ...]], _Bucket] = {}
        self.captures = 0
        self._grows = self._probed()

    # -- calls -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Any:
        _check_mode(self._model)
        if next(self._model.parameters()).device != self.device:
            raise ValueError(f"model: was moved from {self.device} since it was captured; accepted is a new capture")
        given = self._checked(inputs)
        batch, length = given["input_ids"].shape[0], given["input_ids"].shape[-1]
        size, which, state = self._size(batch, length), self._which(), self._state()
        bucket = self._buckets.get((size, which))
        if bucket is None or bucket.state != state:
            bucket = self._buckets[size, which] = self._captured(size, given)
        else:
            self._fill_in(bucket.inputs, given)
        return self._sliced(bucket.run(), size, (batch, length))

    def _checked(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = set(self._dtypes)
        if set(inputs) | {"attention_mask"} != wanted:
            names, accepted = ", ".join(sorted(inputs)) or "none", ", ".join(sorted(wanted))
            raise ValueError(f"inputs: got {names}; accepted are {accepted}, of which attention_mask may be left out")
        ids = inputs["input_ids"]
        if not isinstance(ids, Tensor) or ids.dim() != 2 + len(self._choices) or ids.shape[1:-1] != self._choices:
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"input_ids: got {shape}; accepted is [B, {', '.join(map(str, (*self._choices, 'S')))}]")
        if not ids.numel():
            raise ValueError(f"input_ids: got shape {tuple(ids.shape)}; accepted is at least one token")
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or value.shape != ids.shape:
                raise ValueError(f"{name}: accepted is a tensor of input_ids' shape, {tuple(ids.shape)}")
        return dict(inputs)

    def _size(self, batch: int, length: int) -> tuple[int, int]:
        """The bucket's batch and length."""
        if batch > self.batches[-1] or length > self.lengths[-1]:
            most = f"{self.batches[-1]} of {self.lengths[-1]}"
            raise ValueError(f"inputs: got {batch} rows of {length} tokens; accepted are up to {most}")
        # A routed batch has as many rows as names, and a gate is a mean over all positions, padding with them.
        rows = batch if self._table() is not None else self.batches[bisect_left(self.batches, batch)]
        if any(getattr(site, "gate", None) is not None for site in self._sites()):
            return rows, length
        return rows, self.lengths[bisect_left(self.lengths, length)]

    def _captured(self, size: tuple[int, int], given: Mapping[str, Tensor]) -> _Bucket:
        shape = (size[0], *self._choices, size[1])
        inputs = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, dtype in self._dtypes.items()}
        self._fill_in(inputs, given)
        self.captures += 1
        table = self._table()  # those of routes that are over won't come back
        self._buckets = {key: b for key, b in self._buckets.items() if key[1][-1] in (None, table)}

        def run() -> Any:
            if not self.graphs:
                return self._model(**inputs)
            return self._model(**{**inputs, "attention_mask": self._mask(inputs["attention_mask"])})

        if self.graphs:
            if isinstance(self._encoder, FusedEncoder):
                self._encoder.__dict__["keeps_padding"] = True
            try:
                run = _graph(run, self.device, self._pool)
            finally:
                self._encoder.__dict__.pop("keeps_padding", None)
        return _Bucket(inputs, run, self._state())

    def _mask(self, mask: Tensor) -> Tensor:
        """What the model's code takes without looking at the values, which a capture cannot wait for."""
        import transformers

        if int(transformers.__version__.split(".")[0]) >= 5 or mask.dim() != 2:
            return mask
        # transformers 4 asks of a mask [B, S] whether it is all ones.
        return mask[:, None, :].expand(-1, mask.shape[1], -1)

    def _fill_in(self, buffers: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Copy the call's tensors into a bucket's, and padding beside them."""
        ids = given["input_ids"]
        batch, length = ids.shape[0], ids.shape[-1]
        for name, buffer in buffers.items():
            whole = batch == buffer.shape[0] and length == buffer.shape[-1]
            if not whole:
                buffer.fill_(self._fill.get(name, 0))
            if name == "attention_mask" and batch < buffer.shape[0]:
                buffer[batch:, ..., 0] = 1  # rows that nobody asked for attend to something: no NaN there
            part = buffer[:batch, ..., :length]
            if name in given:
                part.copy_(given[name], non_blocking=True)
            else:
                part.fill_(1)

    # -- what a graph holds --------------------------------------------------------------------------------------------

    def _which(self) -> tuple[Any, ...]:
        """What runs, of which several may take turns: each has graphs of its own. The table of a route comes last."""
        container, kind = container_of(self._model), self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        how = (dispatch.forced(), autocast, torch.backends.cuda.matmul.allow_tf32)
        if container is None:
            return (*how, None)
        table = self._table()
        slots = tuple(table.slots) if table is not None and table.was_split else ()
        return (*how, container.active, container.summed, container.skipped, container.merged, slots, table)

    def _state(self) -> tuple[Any, ...]:
        """What a graph holds of the weights: addresses, and what was folded or packed of their values."""
        found: list[Any] = [folded.generation()]
        for t in chain(self._model.parameters(), self._model.buffers()):  # a mask of neurons is a buffer
            found += (t.data_ptr(), None if t.is_inference() else t._version)
        return tuple(found)

    def _actives(self) -> Iterable[Any]:
        for m in self._sublayers:
            active = getattr(m, "active", None)
            if isinstance(active, Routed):
                yield from active.actives
            elif active is not None:
                yield active

    def _sites(self) -> Iterable[Any]:
        return [a.site for a in self._actives() if a.site is not None]

    def _table(self) -> Table | None:
        container = container_of(self._model)
        return None if container is None or container.route is None else container.route.table

    # -- outputs -------------------------------------------------------------------------------------------------------

    def _probed(self) -> Any:
        """Which dimensions of the output are the batch's and the length's, told from two small forwards."""
        table = self._table()
        batch = len(table.slots) if table is not None else 2
        sizes = [(batch, 2), (batch if table is not None else 3, 4)]
        with torch.no_grad():
            outputs = []
            for rows, length in sizes:
                shape = (rows, *self._choices, length)
                inputs = {n: torch.ones(shape, dtype=d, device=self.device) for n, d in self._dtypes.items()}
                inputs |= {n: torch.zeros_like(t) for n, t in inputs.items() if n in ("token_type_ids", "position_ids")}
                outputs.append(self._model(**inputs))
        return _each(
            lambda a, b: tuple(0 if i == 0 else 1 if (x, y) == (2, 4) else None for i, (x, y) in
                               enumerate(zip(a.shape, b.shape, strict=True))),
            *outputs, dict,
        )  # fmt: skip

    def _sliced(self, output: Any, size: tuple[int, int], wanted: tuple[int, int]) -> Any:
        """A copy of the output without the bucket's padding."""

        def part(x: Tensor, dims: tuple[int | None, ...]) -> Tensor:
            for dim, kind in enumerate(dims):
                if kind is not None and size[kind] != wanted[kind]:
                    x = x.narrow(dim, 0, wanted[kind] * x.shape[dim] // size[kind])
            return x.clone() if self.graphs else x.contiguous()

        return _each(part, output, self._grows)


def _graph(run: Callable[[], Any], device: torch.device, pool: Any) -> Callable[[], Any]:
    """``run`` as a CUDA graph; what is packed, folded or tabled once is so before the capture."""
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def _each(function: Callable[..., Any], output: Any, other: Any, make: Callable[..., Any] | None = None) -> Any:
    """``function`` of every tensor of an output and of what stands at its place in another.

    ``make`` is what mappings become; None: what they were.
    """
    if isinstance(output, Tensor):
        return function(output, other)
    if isinstance(output, Mapping):  # a ModelOutput
        kind = type(output) if make is None else make
        return kind(**{key: _each(function, value, other[key], make) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return tuple(_each(function, a, b, make) for a, b in zip(output, other, strict=True))
    return output


def _sizes(name: str, sizes: Iterable[int] | None, most: int, least: int) -> tuple[int, ...]:
    if sizes is None:
        powers = [1 << n for n in range(most.bit_length()) if least <= 1 << n < most]
        return (*powers, most)
    found = tuple(sorted(set(sizes)))
    if not found or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found):
        raise ValueError(f"{name}: got {sizes!r}; accepted are whole numbers of at least 1")
    return found


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise ValueError("model: is in training mode; accepted is one in eval mode "
                         "(torch.cuda.make_graphed_callables captures training)")  # fmt: skip
