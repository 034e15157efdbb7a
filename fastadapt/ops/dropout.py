"""Dropout from a counter: the mask is a function of (seed, row, column), so nobody stores it.

The stream is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by
the 64-bit seed. Element (r, c) of a [rows, cols] matrix has the index e = r * P + c, where P is cols rounded
up to a multiple of 64, and reads word (e >> 4) & 3 of the block whose 64-bit counter is (e >> 6) * 16 + (e & 15).
So one vector of 16 counters yields the 64 elements of an aligned block as four whole vectors, and every row
starts on such a block. An element is kept where its 32-bit word is at least round(p * 2**32).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
BLOCK = 64


def threshold(p: float) -> int:
    """Smallest 32-bit word that is kept; 2**32 (nothing is kept) at p = 1."""
    return round(p * 2**32)


def _mulhilo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # a < 2**32; the 64-bit product does not fit int64, so m is taken in two 16-bit halves.
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(counter: Tensor, seed: Tensor, upper: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words (as int64) of each 64-bit ``counter``, keyed by the 0-d int64 ``seed``.

    ``upper`` is the upper half of Philox's 128-bit counter; the mask leaves it 0.
    """
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.full_like(counter, upper & _MASK32), torch.full_like(counter, (upper >> 32) & _MASK32)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, _M0)
        hi1, lo1 = _mulhilo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def keep_mask(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """Boolean [rows, cols], True where the element is kept (probability 1 - p)."""
    padded = -(-cols // BLOCK) * BLOCK
    counter = torch.arange(rows * padded // 4, dtype=torch.int64, device=seed.device)
    words = torch.stack([w.view(-1, 16) for w in philox_words(counter, seed)], dim=1)
    return words.reshape(rows, padded)[:, :cols] >= threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x · mask / (1 - p) over the last dimension as columns; x itself where p is 0 or ``seed`` is None."""
    if p == 0.0 or seed is None:
        return x
    if p == 1.0:
        return torch.zeros_like(x)
    cols = x.shape[-1]
    mask = keep_mask(x.numel() // max(cols, 1), cols, p, seed.to(x.device)).view(x.shape)
    # A select, so that an infinity under the mask does not become NaN.
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0)


def resolve_seed(seed: int | Tensor | None, p: float, device: torch.device) -> Tensor | None:
    """A 0-d int64 tensor on ``device``: the one given, or a draw from PyTorch's generator; None where p = 0."""
    if p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"seed: got a tensor of shape {tuple(seed.shape)} and dtype {seed.dtype}; "
                "accepted are an int or a 0-d int64 tensor"
            )
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}; accepted are an int or a 0-d int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}; accepted is an int of 64 bits")
    return torch.tensor(seed, dtype=torch.int64, device=device)
