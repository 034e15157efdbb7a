"""Launch choices: frozen dataclasses, and one named heuristic a kernel. Nothing here is measured at run time.

Heuristics that are :func:`tunable` give way to what ``fastadapt tune`` wrote for the device at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

from fastadapt.backends.triton import tuned


@dataclass(frozen=True)
class Architecture:
    """What a heuristic may depend on. Only the name's family is used, so one architecture gives one result."""

    name: str
    shared_bytes: int  # that one program may take
    processors: int
    asynchronous: bool  # matrix instructions read shared memory while the next stage is on its way into it
    device: str = ""  # its name, where there is a table of tuned launches for it


SM_80 = Architecture("sm_80", 163 * 1024, 108, False)
SM_86 = Architecture("sm_86", 99 * 1024, 84, False)
SM_90 = Architecture("sm_90", 227 * 1024, 132, True)
_MOST_REGISTERS = 255

# Few, wide programs: the interpreter pays for every operation, not for its size.
INTERPRETER = Architecture("interpreter", 1 << 30, 2, False)


TUNED: dict[str, tuned.Table] = tuned.read(tuned.path())


@lru_cache
def _of_index(index: int | None) -> Architecture:
    major, minor = torch.cuda.get_device_capability(index)
    family = SM_80 if (major, minor) == (8, 0) else SM_90 if major in (9, 10) else SM_86
    name = torch.cuda.get_device_name(index)
    return replace(family, device=name) if name in TUNED else family


def architecture(x: Tensor) -> Architecture:
    """The architecture on which kernels over x run."""
    return _of_index(x.device.index) if x.is_cuda else INTERPRETER


def precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s precision: torch's own TF32 switch for float32; without meaning for narrower types."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; make that the first argument's (a tensor or a list of them)."""

    @wraps(function)
    def launched(first: Tensor | list[Tensor], *arguments: Any) -> Any:
        with torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device):
            return function(first, *arguments)

    return launched


_forced: dict[str, Any] = {}  # heuristic -> the tile that it gives while one is measured


def tunable(heuristic: Callable[..., Any]) -> Callable[..., Any]:
    """A heuristic whose tile a table of tuned launches may replace; no field of such a tile follows from others."""
    name, names = heuristic.__name__, list(inspect.signature(heuristic).parameters)[1:]

    @wraps(heuristic)
    def chosen(arch: Architecture, *args: Any, **kwargs: Any) -> Any:
        if name in _forced:
            return _forced[name]
        tile = heuristic(arch, *args, **kwargs)
        if not arch.device:
            return tile
        arguments = dict(zip(names, args, strict=False)) | kwargs
        found = TUNED[arch.device].get(name, {}).get(tuned.key(arguments))
        return tile if found is None else tuned.tile(type(tile), found, tile)

    return chosen


@contextmanager
def forcing(name: str, tile: Any) -> Iterator[None]:
    """Let a heuristic give ``tile`` while the context lasts."""
    _forced[name] = tile
    try:
        yield
    finally:
        del _forced[name]


def power_of_two(n: int, least: int = 16) -> int:
    """The width of the tile that holds n; ``tl.dot`` needs 16 on every side."""
    return max(least, triton.next_power_of_2(n))


def _deepest(arch: Architecture, fixed: int, a_stage: int, most: int) -> int:
    """As many pipeline stages as shared memory holds; before sm_90 the stage at work lies in registers."""

    def taken(stages: int) -> int:
        return fixed + a_stage * (stages if arch.asynchronous else max(stages - 1, 1))

    return max([n for n in range(1, most + 1) if taken(n) <= arch.shared_bytes], default=1)


# -- bottleneck --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowTile:
    """A program holds ``rows`` rows and walks over H in steps of ``cols`` (a multiple of the dropout's 64).

    ``registers`` is said to the compiler where it would otherwise aim at an occupancy of its own and spill for it.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int | None = None


@tunable
def bottleneck_rows(
    arch: Architecture, rows: int, bottleneck: int, bytes_: int, weight_bytes: int, *, backward: bool
) -> RowTile:
    """Tile of the forward kernel and of the backward kernel that walk over H with the bottleneck held.

    ``bytes_`` and ``weight_bytes`` are an element's: under autocast weights are wider than activations.
    """
    width = power_of_two(bottleneck)
    if arch is INTERPRETER:
        return RowTile(rows=16 if backward else 64, cols=256, warps=1, stages=1)
    if bytes_ == 4:  # no tensor cores in IEEE float32: operands live in registers
        return RowTile(16, 64, 8 if width >= 128 else 4, 1, _MOST_REGISTERS)
    # 64 rows fill a warp group's matrix instruction; with few rows, more programs matter more. Backward keeps dy, x̂ and
    # ds of a block beside its sums, so it has twice the threads for as much, and half the rows for a wide bottleneck.
    # Wider weights than activations (autocast) take as much.
    autocast = weight_bytes > bytes_
    widest_of_64 = 128 if backward or autocast else 256
    many = rows >= 64 * arch.processors
    tile = 64 if many and width <= widest_of_64 else 16 if width <= 64 or (backward and width > 256) else 32
    warps = 8 if width >= 256 or (tile == 64 and (width >= 128 or backward)) else 4
    cols = 64
    a_stage = (width * weight_bytes + tile * bytes_) * cols
    stages = _deepest(arch, tile * width * bytes_, a_stage, 2 if backward or (autocast and width >= 256) else 3)
    spills_for_occupancy = backward or autocast or (tile == 16 and width == 64)
    return RowTile(tile, cols, warps, stages, _MOST_REGISTERS if spills_for_occupancy else None)


@dataclass(frozen=True)
class WeightTile:
    """A program sums ``cols`` columns of H by ``bottleneck`` neurons over its split of the rows, ``rows`` a step."""

    rows: int
    cols: int
    bottleneck: int
    warps: int
    stages: int
    splits: int
    rows_a_split: int


def bottleneck_weights(arch: Architecture, rows: int, hidden: int, bottleneck: int, bytes_: int) -> WeightTile:
    """Tile of the kernel of the weight gradients; splits fill the processors twice, and no more."""
    width = power_of_two(bottleneck)
    if arch is INTERPRETER:
        step, cols, block, warps, stages = 16, 256, width, 1, 1
    elif bytes_ == 4:
        step, cols, block, warps, stages = 16, 64, min(width, 32), 4, 1
    else:
        step, cols, block, warps, stages = 32, 64, min(width, 64), 4, 2
    tiles = triton.cdiv(hidden, cols) * triton.cdiv(width, block)
    splits = max(1, min(triton.cdiv(2 * arch.processors, tiles), triton.cdiv(rows, step)))
    rows_a_split = triton.cdiv(triton.cdiv(rows, splits), step) * step
    splits = triton.cdiv(rows, rows_a_split)
    return WeightTile(step, cols, block, warps, stages, splits, rows_a_split)


# -- rows and columns --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormTile:
    """A program holds whole rows, ``cols`` wide; in backward it walks over ``rows_a_split`` of them."""

    rows: int
    cols: int
    warps: int
    splits: int
    rows_a_split: int


def norm_rows(arch: Architecture, rows: int, hidden: int, *, backward: bool) -> NormTile:
    """Thirty-two elements a thread; backward's partial sums are one row a split."""
    cols = power_of_two(hidden, least=64)
    if arch is INTERPRETER:
        tile, warps = 16 if backward else 64, 1
    else:
        tile = max(1, 4096 // cols // (2 if backward else 1))
        warps = 4 if cols <= 4096 else 8
    if not backward:
        return NormTile(tile, cols, warps, triton.cdiv(rows, tile), tile)
    splits = max(1, min(4 * arch.processors, triton.cdiv(rows, tile)))
    rows_a_split = triton.cdiv(triton.cdiv(rows, splits), tile) * tile
    return NormTile(tile, cols, warps, triton.cdiv(rows, rows_a_split), rows_a_split)


@dataclass(frozen=True)
class ColumnTile:
    """A program walks over its split of the rows of ``cols`` columns."""

    rows: int
    cols: int
    warps: int
    splits: int
    rows_a_split: int


def gradient_columns(arch: Architecture, rows: int, features: int, batch_rows: int = 1) -> ColumnTile:
    """Tile of the elementwise gradient of a linear's epilogue, which also sums columns.

    ``rows`` are those of each of the ``batch_rows`` parts, which are split apart.
    """
    step, cols, warps = (16, 256, 1) if arch is INTERPRETER else (32, 64, 4)
    tiles = triton.cdiv(features, cols) * batch_rows
    splits = max(1, min(triton.cdiv(8 * arch.processors, tiles), triton.cdiv(rows, step)))
    rows_a_split = triton.cdiv(triton.cdiv(rows, splits), step) * step
    return ColumnTile(step, cols, warps, triton.cdiv(rows, rows_a_split), rows_a_split)


# -- linear ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixTile:
    """An output tile of a matrix product, ``depth`` of the inner dimension a step, ``group`` row tiles together."""

    rows: int
    cols: int
    depth: int
    group: int
    warps: int
    stages: int


@tunable
def linear_product(arch: Architecture, rows: int, features: int, bytes_: int, weight_bytes: int) -> MatrixTile:
    """Large tiles where they fill the processors, smaller ones below."""
    if arch is INTERPRETER:
        return MatrixTile(64, 256, 256, 1, 1, 1)
    if bytes_ == 4:
        return MatrixTile(64, 64, 16, 8, 8, 1)
    large = triton.cdiv(rows, 128) * triton.cdiv(features, 128) >= arch.processors
    tile, depth = (128, 64) if large else (64, 64)
    stages = _deepest(arch, 0, tile * depth * (bytes_ + weight_bytes), 4 if large else 3)
    return MatrixTile(tile, tile, depth, 8, 8 if large else 4, stages)


# -- lora --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankTile:
    """A tile of a product with low-rank steps behind it: as :class:`MatrixTile`, ``rank`` ranks a step."""

    rows: int
    cols: int
    depth: int
    rank: int
    group: int
    warps: int
    stages: int
    registers: int | None = None


def lora_fuses(arch: Architecture, rank: int, bytes_: int) -> bool:
    """Whether each tile of the product makes s itself, next to y.

    That is rank / 128 more arithmetic for matrix instructions; apart it is a launch that reads x once more. IEEE
    float32 has no matrix instructions, and half as large tiles.
    """
    return power_of_two(rank) <= 32 and (arch is INTERPRETER or bytes_ == 2)


@tunable
def lora_product(
    arch: Architecture, rows: int, batch_rows: int, features: int, rank: int, bytes_: int, weight_bytes: int, *,
    fused: bool, drops: bool,
) -> LowRankTile:  # fmt: skip
    """Tile of y and of dx; ``rows`` are those of each of the ``batch_rows``, which a tile does not cross."""
    width = power_of_two(rank)
    if arch is INTERPRETER:
        return LowRankTile(64, 256, 256, width, 1, 1, 1)
    if bytes_ == 4:
        return LowRankTile(64, 64, 16, 16, 8, 8, 1)
    width = min(width, 64)
    large = triton.cdiv(rows, 128) * batch_rows * triton.cdiv(features, 128) >= arch.processors and rows >= 128
    # With dropout the LoRA's addition is a second sum of the tile's size, and its mask takes registers too.
    large = large and not drops
    tile, depth = (128, 64) if large else (64, 64)
    height = min(tile, power_of_two(rows))
    a_stage = (height * bytes_ + tile * weight_bytes + (width * weight_bytes if fused else 0)) * depth
    stages = _deepest(arch, (height + tile) * width * bytes_, a_stage, 4 if large else 3)
    return LowRankTile(height, tile, depth, width, 8, 8 if large else 4, stages, _MOST_REGISTERS if drops else None)


@tunable
def lora_low(
    arch: Architecture, rows: int, batch_rows: int, rank: int, bytes_: int, weight_bytes: int, drops: bool
) -> LowRankTile:
    """Tile of s and of t, which are as narrow as a rank: rows enough to fill the processors."""
    width = power_of_two(rank)
    if arch is INTERPRETER:
        return LowRankTile(64, width, 256, width, 1, 1, 1)
    if bytes_ == 4:
        width = min(width, 32)
        return LowRankTile(16, width, 64, width, 1, 4, 1)
    width = min(width, 64)
    tile = 64 if rows * batch_rows >= 64 * 2 * arch.processors else 16
    tile = min(tile, power_of_two(rows))
    depth = 64 if drops or width == 64 else 128
    stages = _deepest(arch, 0, (tile * bytes_ + width * weight_bytes) * depth, 3)
    return LowRankTile(tile, width, depth, width, 1, 8 if tile == width == 64 else 4, stages)


@dataclass(frozen=True)
class LowRankWeightTile:
    """A program sums ``rank`` by ``cols`` of dA or dB over its split: some chunks of rows, ``rows`` a step."""

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int
    chunk: int  # rows of a chunk, which lies within a batch row
    chunks_a_row: int
    chunks_a_split: int
    splits: int
    registers: int | None


def lora_weights(
    arch: Architecture, rows: int, batch_rows: int, columns: int, loras: int, rank: int, bytes_: int, *, drops: bool
) -> LowRankWeightTile:
    """Tile of the weight gradients; splits fill the processors twice, and no more. ``drops``: x is dropped anew."""
    width = power_of_two(rank)
    if arch is INTERPRETER:
        step, cols, warps, stages = 16, 256, 1, 1
    elif bytes_ == 4:
        step, cols, width, warps, stages = 16, 64, min(width, 32), 4, 1
    else:
        step, cols, width, warps, stages = 32, 64, min(width, 64), 4, 2
    programs = triton.cdiv(columns, cols) * triton.cdiv(rank, width) * loras
    wanted = triton.cdiv(2 * arch.processors, programs)
    chunks_a_row = max(1, min(triton.cdiv(wanted, batch_rows), triton.cdiv(rows, step)))
    chunk = triton.cdiv(triton.cdiv(rows, chunks_a_row), step) * step
    chunks_a_row = triton.cdiv(rows, chunk)
    chunks_a_split = triton.cdiv(chunks_a_row * batch_rows, min(wanted, chunks_a_row * batch_rows))
    splits = triton.cdiv(chunks_a_row * batch_rows, chunks_a_split)
    registers = _MOST_REGISTERS if drops and rank > width and bytes_ < 4 else None
    return LowRankWeightTile(step, cols, width, warps, stages, chunk, chunks_a_row, chunks_a_split, splits, registers)


# -- bottlenecks that differ from row to row -----------------------------------------------------------------------


def bottleneck_routed(
    arch: Architecture, rows: int, batch_rows: int, bottleneck: int, bytes_: int, weight_bytes: int, *, backward: bool
) -> RowTile:
    """As :func:`bottleneck_rows`; ``rows`` are those of each of the ``batch_rows``, which a tile does not cross.

    A slot's pointers and sizes take registers too: 64 rows of 256 neurons, in backward of 128, would spill.
    """
    tile = bottleneck_rows(arch, rows * batch_rows, bottleneck, bytes_, weight_bytes, backward=backward)
    if arch is not INTERPRETER and power_of_two(bottleneck) >= (128 if backward else 256):
        tile = replace(tile, rows=min(tile.rows, 32))
    if tile.rows == 32:
        tile = replace(tile, stages=min(tile.stages, 2), registers=_MOST_REGISTERS)
    return replace(tile, rows=min(tile.rows, power_of_two(rows)))


@dataclass(frozen=True)
class RoutedWeightTile:
    """As :class:`WeightTile` for one slot's adapter; a split is some chunks of rows, ``rows`` a step."""

    rows: int
    cols: int
    bottleneck: int
    warps: int
    stages: int
    chunk: int  # rows of a chunk, which lies within a batch row
    chunks_a_row: int
    chunks_a_split: int
    splits: int


def routed_weights(
    arch: Architecture, rows: int, batch_rows: int, hidden: int, slots: int, bottleneck: int, bytes_: int
) -> RoutedWeightTile:
    """Tile of the weight gradients of all slots' adapters; splits fill the processors twice, and no more."""
    tile = bottleneck_weights(arch, rows * batch_rows, hidden, bottleneck, bytes_)
    programs = triton.cdiv(hidden, tile.cols) * triton.cdiv(bottleneck, tile.bottleneck) * slots
    wanted = triton.cdiv(2 * arch.processors, programs)
    chunks_a_row = max(1, min(triton.cdiv(wanted, batch_rows), triton.cdiv(rows, tile.rows)))
    chunk = triton.cdiv(triton.cdiv(rows, chunks_a_row), tile.rows) * tile.rows
    chunks_a_row = triton.cdiv(rows, chunk)
    chunks_a_split = triton.cdiv(chunks_a_row * batch_rows, min(wanted, chunks_a_row * batch_rows))
    splits = triton.cdiv(chunks_a_row * batch_rows, chunks_a_split)
    return RoutedWeightTile(tile.rows, tile.cols, tile.bottleneck, tile.warps, tile.stages, chunk, chunks_a_row,
                            chunks_a_split, splits)  # fmt: skip


# -- mixing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixTile:
    """A program holds ``rows`` rows of ``adapters`` by ``width`` elements."""

    rows: int
    adapters: int
    width: int
    warps: int


def mix_rows(arch: Architecture, adapters: int, bottleneck: int, *, backward: bool) -> MixTile:
    """Sixteen elements a thread of each of two tiles, or in backward eight of each of three."""
    count, width = triton.next_power_of_2(adapters), triton.next_power_of_2(bottleneck)
    if arch is INTERPRETER:
        return MixTile(64, count, width, 1)
    elements = count * width
    warps = 4 if elements <= 2048 else 8
    return MixTile(max(1, warps * 32 * (8 if backward else 16) // elements), count, width, warps)


# -- merging -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightPart:
    """The part of a weight matrix that a program merges."""

    rows: int
    cols: int
    warps: int


def merge_tile(arch: Architecture) -> WeightPart:
    """Sixteen sums a thread; a row of A serves as many rows of W."""
    return WeightPart(64, 256, 1) if arch is INTERPRETER else WeightPart(16, 128, 4)


# -- ordered sums ------------------------------------------------------------------------------------------------


def sum_columns(arch: Architecture) -> int:
    """Columns of partial sums that a program adds."""
    return 4096 if arch is INTERPRETER else 128
