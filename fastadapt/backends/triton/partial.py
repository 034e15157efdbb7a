"""The ordered sum of partial sums: out[j] = Σ_split partial[split, j], the same bits on every run (no atomics).

Outputs lie side by side in a row of the partial sums; one launch adds up to four of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt.backends.triton import launch

_LANES = 16  # splits that one step adds side by side


@triton.jit
def _sum_kernel(
    partial, out0, out1, out2, out3, splits, stride, end0, end1, end2, end3,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, COLUMNS), tl.float32)
    for first in range(0, splits, LANES):
        split = first + lane
        inside = (split < splits)[:, None] & (column < end3)[None, :]
        total += tl.load(partial + split.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
    value = tl.sum(total, 0)
    tl.store(out0 + column, value, mask=column < end0)
    if OUTPUTS > 1:
        tl.store(out1 + (column - end0), value, mask=(column >= end0) & (column < end1))
    if OUTPUTS > 2:
        tl.store(out2 + (column - end1), value, mask=(column >= end1) & (column < end2))
    if OUTPUTS > 3:
        tl.store(out3 + (column - end2), value, mask=(column >= end2) & (column < end3))


def ordered_sum(partial: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The rows of ``partial`` [splits, columns], float32, summed into tensors of ``shapes``, in that order."""
    outputs = [torch.empty(shape, dtype=torch.float32, device=partial.device) for shape in shapes]
    columns, start = launch.sum_columns(launch.architecture(partial)), 0
    for first in range(0, len(outputs), 4):
        group = outputs[first : first + 4]
        ends = list(itertools.accumulate(out.numel() for out in group))
        spare = 4 - len(group)
        _sum_kernel[(triton.cdiv(ends[-1], columns),)](
            partial[:, start:], *group, *[group[0]] * spare, partial.shape[0], partial.shape[1], *ends,
            *[ends[-1]] * spare, LANES=_LANES, COLUMNS=columns, OUTPUTS=len(group), num_warps=4,
        )  # fmt: skip
        start += ends[-1]
    return outputs


@triton.jit
def _slot_sum_kernel(
    partial, slot_of, out, splits, splits_a_row, columns, LANES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, COLUMNS), tl.float32)
    for first in range(0, splits, LANES):
        split = first + lane
        mine = tl.load(slot_of + split // splits_a_row, mask=split < splits, other=-1) == slot
        inside = mine[:, None] & (column < columns)[None, :]
        total += tl.load(partial + split.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + slot * columns + column, tl.sum(total, 0), mask=column < columns)


def slot_sum(partial: Tensor, slot_of: Tensor, slots: int) -> Tensor:
    """[slots, columns]: the rows of ``partial`` [splits, columns], float32, summed by slot.

    Batch row i, whose slot is ``slot_of[i]``, has the next splits / len(slot_of) of them.
    """
    splits, columns = partial.shape
    out = partial.new_empty((slots, columns))
    width = launch.sum_columns(launch.architecture(partial))
    _slot_sum_kernel[(triton.cdiv(columns, width), slots)](
        partial, slot_of, out, splits, splits // slot_of.shape[0], columns, LANES=_LANES, COLUMNS=width, num_warps=4
    )
    return out
