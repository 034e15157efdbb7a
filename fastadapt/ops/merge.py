"""Merging low-rank updates into weights, in place, and taking them out again without losing a bit.

    W' = R(W + Δ),  Δ = s·B A  (Hu et al. 2021, arXiv:2106.09685, section 4.1)

R rounds once to W's dtype. Δ is summed in float32 in one order, the same in every backend and thread count:
t = fl(s·b_ik) and d ← fma(t, a_kj, d) for k = 0, 1, ..., from d = +0. So Δ can be made again, and R(W' - Δ) is W but
for few units in the last place. What is missing, the difference of the two bit patterns as integers, is kept as one
signed byte a weight; the rare weight whose difference is larger (a W tiny beside Δ, or a -0) is listed with its index.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastadapt.ops import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A list entry takes 6 to 8 bytes; a matrix of which more than one weight in 50 would be listed is kept as a copy.
COPY_ABOVE = 50


@dataclass
class Residue:
    """What makes the way back from a merged weight exact. Plain tensors: move, copy and save them as any others.

    Attributes:
        codes: int8 [out, in], the difference of bit patterns; or, in the weight's own dtype, a copy of the weight.
        index: int32 [n], ascending flat indices of the weights that a byte can't hold.
        bits: int32 (float32) or int16 (bfloat16, float16) [n], the bit patterns of those weights.
    """

    codes: Tensor
    index: Tensor
    bits: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that the residue takes beside the weight."""
        return self.codes.nbytes + self.index.nbytes + self.bits.nbytes

    def to(self, device: torch.device | str) -> Residue:
        """The residue on another device."""
        return Residue(self.codes.to(device), self.index.to(device), self.bits.to(device))


torch.serialization.add_safe_globals([Residue])


def merge_(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    residues: list[Residue] | None = None,
) -> None:
    """``W_i += scale_i · B_i A_i`` for every i, in place, in one pass; all of them or, where one is refused, none.

    Several LoRAs on one weight are one of the sum of their ranks: A stacked, B times its scale side by side, scale 1.

    Args:
        weights: [out_i, in_i] each, contiguous, all of one dtype (float32, bfloat16 or float16) on one device.
        a: [r_i, in_i] each, any floating dtype and strides, read as float32; ``b``: [out_i, r_i] likewise.
        scales: a number each, read as float32.
        residues: None, or an empty list that receives what :func:`unmerge_` needs to give back every bit of W.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted. Nothing was changed then;
            this includes NaN or infinity in W, A, B or scale and a sum that overflows W's dtype.
    """
    weights, a, b, scales = _checked(weights, a, b, scales)
    _check_receiver(residues)
    _remerge(weights, None, (a, b, scales), residues)


def unmerge_(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    residues: Sequence[Residue] | None = None,
) -> None:
    """Undo :func:`merge_`, given its arguments (with the values of then) again.

    Args:
        weights, a, b, scales: as for :func:`merge_`.
        residues: the list that :func:`merge_` filled: W gets back every bit. None: ``W_i -= scale_i · B_i A_i``,
            rounded once, which is off by what the merge's rounding lost.

    Raises:
        TypeError, ValueError: as :func:`merge_`; nothing was changed then.
    """
    weights, a, b, scales = _checked(weights, a, b, scales)
    _check_residues("residues", residues, weights)
    _remerge(weights, (a, b, scales, residues), None, None)


def swap_(
    weights: Sequence[Tensor],
    old_a: Sequence[Tensor],
    old_b: Sequence[Tensor],
    old_scales: Sequence[float],
    old_residues: Sequence[Residue] | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    residues: list[Residue] | None = None,
) -> None:
    """:func:`unmerge_` of the old and :func:`merge_` of the new in one pass over W, to the same bits.

    Args:
        weights: as for :func:`merge_`.
        old_a, old_b, old_scales, old_residues: what is merged now, as for :func:`unmerge_`.
        a, b, scales, residues: what is to be merged, as for :func:`merge_`; its ranks may differ from the old ones.

    Raises:
        TypeError, ValueError: as :func:`merge_`; nothing was changed then.
    """
    weights, a, b, scales = _checked(weights, a, b, scales)
    _, old_a, old_b, old_scales = _checked(weights, old_a, old_b, old_scales, "old_")
    _check_residues("old_residues", old_residues, weights)
    _check_receiver(residues)
    _remerge(weights, (old_a, old_b, old_scales, old_residues), (a, b, scales), residues)


def _remerge(weights, old, new, residues):
    # Imported late: torch.compiler.disable loads the compiler, and with it Triton.
    from fastadapt.ops.remerge import remerge

    if weights:
        remerge(weights, old, new, residues)


# -- checks ------------------------------------------------------------------------------------------------------


def _check_weights(weights: Sequence[Tensor]) -> list[Tensor]:
    weights = list(weights)
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"weights[{i}]: got {type(w).__name__}; a tensor is accepted")
        if w.dtype not in DTYPES:
            raise TypeError(f"weights[{i}]: got dtype {w.dtype}; accepted are float32, bfloat16 and float16")
        if w.is_meta or w.layout != torch.strided or is_traceable_wrapper_subclass(w):
            kind = "a meta tensor" if w.is_meta else f"a {type(w).__name__} of layout {w.layout}"
            raise ValueError(f"weights[{i}]: got {kind}; a strided tensor with data of its own is accepted")
        if w.dim() != 2:
            raise ValueError(f"weights[{i}]: got shape {tuple(w.shape)}; accepted is [out, in]")
        if not w.is_contiguous():
            raise ValueError(f"weights[{i}]: got strides {w.stride()}; a contiguous weight is accepted")
        if w.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}]: is {w.dtype}, but weights[0] is {weights[0].dtype}; one dtype is accepted")
        if w.device != weights[0].device:
            raise ValueError(
                f"weights[{i}]: is on {w.device}, but weights[0] is on {weights[0].device}; one device is accepted"
            )
    return weights


def _spans(weights: list[Tensor]) -> list[tuple[int, int, int]]:
    """(first byte, byte past the last, which weight) in ascending order; raises where two overlap."""
    spans = sorted((w.data_ptr(), w.data_ptr() + w.nbytes, i) for i, w in enumerate(weights) if w.numel())
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            i, j = sorted((i, j))
            raise ValueError(f"weights[{j}]: shares memory with weights[{i}]; each weight is accepted once")
    return spans


def _checked(weights, a, b, scales, prefix=""):
    """The lists, a and b contiguous; raises where something doesn't fit."""
    weights = _check_weights(weights)
    a, b, scales = list(a), list(b), list(scales)
    for name, given in (("a", a), ("b", b), ("scales", scales)):
        if len(given) != len(weights):
            raise ValueError(f"{prefix}{name}: got {len(given)} for {len(weights)} weights; accepted is one each")
    spans = _spans(weights)
    starts = [span[0] for span in spans]
    for i, w in enumerate(weights):
        out, width = w.shape
        rank = b[i].shape[1] if isinstance(b[i], Tensor) and b[i].dim() == 2 else None
        if rank == 0:
            raise ValueError(f"{prefix}b[{i}]: got shape {tuple(b[i].shape)}; accepted is [{out}, r] with r from 1")
        for name, factors, shape in (("b", b, (out, rank)), ("a", a, (rank, width))):
            factor, at = factors[i], f"{prefix}{name}[{i}]"
            checks.floating(at, factor)
            if factor.is_meta:
                raise ValueError(f"{at}: got a meta tensor; one with data is accepted")
            if tuple(factor.shape) != shape:
                accepted = ", ".join("r" if n is None else str(n) for n in shape)
                raise ValueError(f"{at}: got shape {tuple(factor.shape)}; accepted is [{accepted}]")
            if factor.device != w.device:
                raise ValueError(f"{at}: is on {factor.device}, but its weight is on {w.device}; move one of them")
            factor = factors[i] = factor.detach().contiguous()
            if factor.numel() and starts:
                start = factor.data_ptr()
                # The weight that starts last before the factor's end is the one that may reach into it.
                before = bisect.bisect_left(starts, start + factor.nbytes) - 1
                if before >= 0 and spans[before][1] > start:
                    raise ValueError(f"{at}: shares memory with weights[{spans[before][2]}]; its own is accepted")
        if isinstance(scales[i], bool) or not isinstance(scales[i], Real):
            raise TypeError(f"{prefix}scales[{i}]: got {type(scales[i]).__name__}; a number is accepted")
        scales[i] = float(scales[i])
    return weights, a, b, scales


def _check_receiver(residues: list[Residue] | None) -> None:
    if residues is None:
        return
    if not isinstance(residues, list):
        raise TypeError(f"residues: got {type(residues).__name__}; accepted are None and an empty list")
    if residues:
        raise ValueError(f"residues: got a list of {len(residues)}; accepted are None and an empty list")


def _bits_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int16


def _check_residues(name: str, residues: Sequence[Residue] | None, weights: list[Tensor]) -> None:
    if residues is None:
        return
    if len(residues) != len(weights):
        raise ValueError(f"{name}: got {len(residues)} for {len(weights)} weights; accepted is one each")
    for i, (kept, w) in enumerate(zip(residues, weights, strict=True)):
        if not isinstance(kept, Residue):
            raise TypeError(f"{name}[{i}]: got {type(kept).__name__}; accepted is what merge_ put there")
        if kept.codes.dtype not in (torch.int8, w.dtype) or kept.bits.dtype != _bits_dtype(w.dtype):
            raise TypeError(f"{name}[{i}]: was made for another dtype than the weight's {w.dtype}")
        if kept.codes.shape != w.shape or kept.index.dtype != torch.int32 or kept.index.shape != kept.bits.shape:
            raise ValueError(f"{name}[{i}]: was made for shape {tuple(kept.codes.shape)}, not {tuple(w.shape)}")
        if any(t.device != w.device for t in (kept.codes, kept.index, kept.bits)):
            raise ValueError(f"{name}[{i}]: is on {kept.codes.device}, but its weight is on {w.device}; move one")
        if not all(t.is_contiguous() for t in (kept.codes, kept.index, kept.bits)):
            raise ValueError(f"{name}[{i}]: is not contiguous; accepted is what merge_ put there")


def check_places(name: str, residues: Sequence[Residue], weights: list[Tensor]) -> None:
    """Raise where a residue lists what is no weight of its matrix, or not in ascending order.

    For kernels that would write there; the C++ kernels for CPUs look themselves. All lists at once: each look at values
    is a wait for the device.
    """
    counts = torch.tensor([kept.index.numel() for kept in residues])
    if not counts.any():
        return
    index = torch.cat([kept.index.view(-1) for kept in residues])
    owner = torch.arange(len(residues)).repeat_interleave(counts).to(index.device)
    sizes = torch.tensor([w.numel() for w in weights]).to(index.device)
    bad = (index < 0) | (index >= sizes[owner])
    bad[1:] |= (index[1:] <= index[:-1]) & (owner[1:] == owner[:-1])
    if not bad.any():
        return
    at = int(bad.nonzero()[0])
    i = int(owner[at])
    place = at - int(counts[:i].sum())
    found = f"{int(index[at])} after {int(index[at - 1])}" if place else f"{int(index[at])}"
    raise ValueError(
        f"{name}[{i}]: index[{place}] is {found}; accepted are ascending ones from 0 to {weights[i].numel() - 1}, as "
        "merge_ put there; nothing was changed"
    )


# -- reference ---------------------------------------------------------------------------------------------------

_TILE = 1 << 16  # weights at a time, so that the float64 intermediates stay in the cache


def _fma(t: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """t·x + d of float32 values held in float64, rounded once to float32 (and held in float64 again).

    The product is exact in float64. The sum is rounded to odd there: then rounding it to float32 can't round twice
    (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    p = t * x
    s = p + d
    part = s - p
    error = (p - (s - part)) + (d - part)
    bits = s.view(torch.int64)
    step = torch.where((error > 0) == (s > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    return odd.view(torch.float64).float().double()


def scaled(b: Tensor, scale: float) -> Tensor:
    """t = fl(s·b), float32."""
    return b.float() * torch.tensor(scale, dtype=torch.float32, device=b.device)


def _delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Δ of some rows, float32: a [r, in] in float32, b [rows, r]."""
    t, a = scaled(b, scale).double(), a.double()
    d = torch.zeros((b.shape[0], a.shape[1]), dtype=torch.float64, device=b.device)
    for k in range(a.shape[0]):
        d = _fma(t[:, k, None], a[k], d)
    return d.float()


def _tiles(w: Tensor):
    rows = max(1, _TILE // max(1, w.shape[1]))
    return (slice(start, start + rows) for start in range(0, w.shape[0], rows))


def _without(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """R(W' - Δ)."""
    a, out = a.float(), torch.empty_like(w)
    for rows in _tiles(w):
        out[rows] = w[rows].float() - _delta(a, b[rows], scale)
    return out


def _bare(w: Tensor, a: Tensor, b: Tensor, scale: float, codes: Tensor, index: Tensor, bits: Tensor) -> Tensor:
    """W as it was before the merge."""
    if codes.dtype == w.dtype:
        return codes
    whole = _without(w, a, b, scale).view(bits.dtype)
    whole += codes
    whole.view(-1)[index.long()] = bits
    return whole.view(w.dtype)


def _merged(w: Tensor, a: Tensor, b: Tensor, scale: float, exact: bool):
    """(W', its residue if it is to be exact)."""
    a, out = a.float(), torch.empty_like(w)
    difference = torch.empty(w.shape, dtype=torch.int64, device=w.device) if exact else None
    of_bits = _bits_dtype(w.dtype)
    for rows in _tiles(w):
        delta = _delta(a, b[rows], scale)
        out[rows] = w[rows].float() + delta
        if exact:
            back = (out[rows].float() - delta).to(w.dtype)
            difference[rows] = w[rows].view(of_bits).long() - back.view(of_bits).long()
    if not exact:
        return out, None
    large = (difference < -128) | (difference > 127)
    index = large.view(-1).nonzero().view(-1)
    if index.numel() * COPY_ABOVE > w.numel() or w.numel() > 2**31 - 1:
        empty = index.new_empty(0)
        return out, (w.detach().clone(), empty.int(), empty.to(of_bits))
    return out, (difference.to(torch.int8), index.int(), w.view(of_bits).view(-1)[index])


def remerge_(weights, old_a, old_b, old_scales, old_codes, old_index, old_bits, a, b, scales, exact):
    """The oracle of every backend; see :mod:`fastadapt.ops.schemas` for the contract.

    Everything is computed before anything is written, so it holds a second copy of the weights for a while.
    """
    results, residues = [], []
    for i, w in enumerate(weights):
        w = w.detach()
        result = w
        if old_a:
            if not _finite(old_a[i], old_b[i], old_scales[i]):
                return [], [], [], torch.tensor(i)
            if old_codes:
                kept = old_codes[i], old_index[i], old_bits[i]
                result = _bare(w, old_a[i], old_b[i], old_scales[i], *kept)
            else:
                result = _without(w, old_a[i], old_b[i], old_scales[i])
        if a:
            result, residue = _merged(result, a[i], b[i], scales[i], exact)
            residues.append(residue)
        if not torch.isfinite(result).all():
            return [], [], [], torch.tensor(i)
        results.append(result)
    for w, result in zip(weights, results, strict=True):
        w.detach().copy_(result)
    codes, index, bits = ([list(parts) for parts in zip(*residues, strict=True)] if exact else []) or ([], [], [])
    return codes, index, bits, torch.tensor(-1)


def _finite(a: Tensor, b: Tensor, scale: float) -> bool:
    return math.isfinite(scale) and bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
