"""The ordered sum of partial sums: out[j] = Σ_split partial[split, j], the same bits on every run (no atomics).

Up to four outputs lie side by side in a row of the partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt.backends.triton import launch

_LANES = 16  # splits that one step adds side by side


@triton.jit
def _sum_kernel(
    partial, out0, out1, out2, out3, splits, end0, end1, end2, end3,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, COLUMNS), tl.float32)
    for first in range(0, splits, LANES):
        split = first + lane
        inside = (split < splits)[:, None] & (column < end3)[None, :]
        total += tl.load(partial + split.to(tl.int64)[:, None] * end3 + column[None, :], mask=inside, other=0.0)
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
    ends, end = [], 0
    for out in outputs:
        end += out.numel()
        ends.append(end)
    spare = 4 - len(outputs)
    columns = launch.sum_columns(launch.architecture(partial))
    _sum_kernel[(triton.cdiv(end, columns),)](
        partial, *outputs, *[outputs[0]] * spare, partial.shape[0], *ends, *[end] * spare,
        LANES=_LANES, COLUMNS=columns, OUTPUTS=len(outputs), num_warps=4,
    )  # fmt: skip
    return outputs
