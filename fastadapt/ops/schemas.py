"""The kernel contract: one schema an op, and what its outputs look like (the fake kernels).

Kernels see flattened, contiguous activations [T, H] in one compute dtype (float32, bfloat16, float16 or float64).
Parameters may have another floating dtype: a kernel rounds matrices and their biases to the compute dtype once and
reads LayerNorm parameters and scales as they are. Sums run in float32 or wider. Gradients of parameters leave in
float32 (float64 in float64). An output that was not asked for is an empty tensor.
A prefix comes contiguous in the compute dtype, as [2, P, H] or [B, 2, P, H].
`z` is the bottleneck's pre-activation, `s` the input of the LayerNorm, both rounded to the compute dtype. A linear's
`z` is for its own backend's backward alone: the pre-activation, or in bfloat16 on a CPU the activation's derivative as
one byte (:func:`derivative_in_a_byte`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("fastadapt", "DEF")

library.define(
    "bottleneck_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, str activation, "
    "float scale, Tensor? scale_vector, bool skip, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, float dropout_p, Tensor? seed, bool save) -> (Tensor y, Tensor z, Tensor s)"
)
# g_up, g_bias: gradients of w_up and b_up before the scale is applied (dw_up = scale * g_up).
library.define(
    "bottleneck_backward(Tensor dy, Tensor x, Tensor z, Tensor s, Tensor w_down, Tensor w_up, str activation, "
    "float scale, Tensor? scale_vector, bool skip, Tensor? norm_weight, float eps, float dropout_p, Tensor? seed, "
    "bool need_dx, bool need_dresidual, bool need_dweights, bool need_dnorm) -> (Tensor dx, Tensor dresidual, "
    "Tensor dw_down, Tensor db_down, Tensor g_up, Tensor g_bias, Tensor dnorm_weight, Tensor dnorm_bias)"
)
# The bottleneck for rows that differ in it: one entry a slot in every list, `rows` as of lora_forward. A slot without
# w_down has no adapter, s = [x if skip] + [residual]; one that swaps reads the residual and adds x to it. z is [T, the
# largest b]. Every slot has a LayerNorm. Gradients leave as lists, empty tensors for slots that need none.
library.define(
    "bottleneck_rows_forward(Tensor x, Tensor? residual, Tensor rows, Tensor?[] w_down, Tensor?[] b_down, "
    "Tensor?[] w_up, Tensor?[] b_up, Tensor?[] scale_vectors, Tensor[] norm_weights, Tensor[] norm_biases, "
    "str[] activations, float[] scales, bool[] skips, bool[] swaps, float eps, float[] dropout_p, Tensor? seed, "
    "bool save) -> (Tensor y, Tensor z, Tensor s)"
)
library.define(
    "bottleneck_rows_backward(Tensor dy, Tensor x, Tensor residual, Tensor z, Tensor s, Tensor rows, "
    "Tensor?[] w_down, Tensor?[] w_up, Tensor?[] scale_vectors, Tensor[] norm_weights, str[] activations, "
    "float[] scales, bool[] skips, bool[] swaps, float eps, float[] dropout_p, Tensor? seed, bool need_dx, "
    "bool need_dresidual, bool[] need_dweights, bool[] need_dnorm) -> (Tensor dx, Tensor dresidual, "
    "Tensor[] dw_down, Tensor[] db_down, Tensor[] g_up, Tensor[] g_bias, Tensor[] dnorm_weight, Tensor[] dnorm_bias)"
)
library.define(
    "add_norm_forward(Tensor x, Tensor? residual, Tensor norm_weight, Tensor norm_bias, float eps, "
    "float dropout_p, Tensor? seed, bool save) -> (Tensor y, Tensor s)"
)
library.define(
    "add_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor norm_weight, float eps, float dropout_p, "
    "Tensor? seed, bool need_dx, bool need_dresidual, bool need_dnorm) "
    "-> (Tensor dx, Tensor dresidual, Tensor dnorm_weight, Tensor dnorm_bias)"
)
library.define(
    "linear_forward(Tensor x, Tensor[] weights, Tensor?[] biases, str activation, float dropout_p, Tensor? seed, "
    "bool save) -> (Tensor y, Tensor z)"
)
library.define(
    "linear_backward(Tensor dy, Tensor z, Tensor[] weights, str activation, float dropout_p, Tensor? seed, "
    "bool need_dx, bool need_dbias) -> (Tensor dx, Tensor dbias)"
)
# A linear layer with low-rank additions, and rows that differ in them. LoRA i adds scales[i] drop(x) a[i]^T b[i]^T to
# the columns of weight owners[i], in the rows of slot slots[i]. `rows` [n] (int64) gives every batch row, of T / n
# rows of x each, its slot; None is slot 0 for all. `biases` holds one a weight for slot 0, then for slot 1, ...
# `s` [T, R] is what b multiplies, scale included, R the largest sum of ranks in a slot; a slot's LoRAs lie in their
# order. dbias is [slots, N].
library.define(
    "lora_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, float[] scales, int[] owners, "
    "int[] slots, Tensor? rows, float[] lora_p, Tensor? lora_seeds, str activation, float dropout_p, Tensor? seed, "
    "bool save) -> (Tensor y, Tensor z, Tensor s)"
)
library.define(
    "lora_backward(Tensor dy, Tensor x, Tensor z, Tensor s, Tensor[] weights, int slot_count, Tensor[] a, Tensor[] b, "
    "float[] scales, int[] owners, int[] slots, Tensor? rows, float[] lora_p, Tensor? lora_seeds, str activation, "
    "float dropout_p, Tensor? seed, bool need_dx, bool need_dbias, bool need_dlora) "
    "-> (Tensor dx, Tensor dbias, Tensor[] da, Tensor[] db)"
)
# m = [p_n sigma_n | p_n], p = softmax(drop(g_n . sigma_n + c_n + shift)), t = [g_n | c_n]; sigma [T, N b], t and m
# [T, N b + N], shift [T].
library.define("mix_forward(Tensor sigma, Tensor t, Tensor? shift, int count, float dropout_p, Tensor? seed) -> Tensor")
library.define(
    "mix_backward(Tensor dm, Tensor sigma, Tensor t, Tensor? shift, int count, float dropout_p, Tensor? seed) "
    "-> (Tensor dsigma, Tensor dt, Tensor dshift)"
)
library.define("drop(Tensor x, float dropout_p, Tensor seed) -> Tensor")
library.define(
    "attention_forward(Tensor qkv, Tensor? prefix, Tensor? mask, int heads, float scale, float dropout_p, "
    "Tensor? seed, bool save) -> (Tensor out, Tensor lse)"
)
library.define(
    "attention_backward(Tensor dout, Tensor qkv, Tensor? prefix, Tensor? mask, Tensor lse, int heads, float scale, "
    "float dropout_p, Tensor? seed) -> (Tensor dqkv, Tensor dprefix)"
)
# Takes the old adaptation out of the weights and puts the new one in, in place; either may be absent (empty lists).
# With no old codes the way out rounds. `exact` asks for the new one's codes, index and bits, the fields of a Residue.
# All weights change or none: `refused` is then one of which an input or the result isn't finite, else -1.
library.define(
    "remerge_(Tensor(w!)[] weights, Tensor[] old_a, Tensor[] old_b, float[] old_scales, Tensor[] old_codes, "
    "Tensor[] old_index, Tensor[] old_bits, Tensor[] a, Tensor[] b, float[] scales, bool exact) "
    "-> (Tensor[] codes, Tensor[] index, Tensor[] bits, Tensor refused)"
)


def derivative_in_a_byte(x: Tensor, activation: str) -> bool:
    """Whether the CPU kernels keep σ' of a linear as one byte: round(202 σ') + 26, so that 0 and 1 are exact.

    The step of 1/202 is as coarse as bfloat16 is just below 1, and σ' of these activations lies in [-0.13, 1.13].
    """
    ranges = ("relu", "gelu", "gelu_new", "silu", "leaky_relu")
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and activation in ranges


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Register what op ``name`` gives back for tensors without data.

    One of those among tensors with data brings the op here, too, which would give back memory that nobody wrote.
    """

    def register(shapes: Callable[..., Any]) -> None:
        def checked(first: Tensor, *rest: Any) -> Any:
            if type(first) in (Tensor, torch.nn.Parameter) and not first.is_meta:
                raise ValueError(f"{name}: got a tensor on meta beside one on {first.device}; move one of them")
            return shapes(first, *rest)

        torch.library.register_fake(f"fastadapt::{name}", checked, lib=library)

    return register


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape)


def _grad(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


@_fake("bottleneck_forward")
def _(
    x, w_down, b_down, w_up, b_up, activation, scale, scale_vector, skip, residual, norm_weight, norm_bias, eps,
    dropout_p, seed, save,
):  # fmt: skip
    rows, hidden = x.shape
    z = _like(x, rows, w_down.shape[0]) if save else _like(x, 0)
    s = _like(x, rows, hidden) if save and norm_weight is not None else _like(x, 0)
    return _like(x, rows, hidden), z, s


@_fake("bottleneck_backward")
def _(
    dy, x, z, s, w_down, w_up, activation, scale, scale_vector, skip, norm_weight, eps, dropout_p, seed, need_dx,
    need_dresidual, need_dweights, need_dnorm,
):  # fmt: skip
    (rows, hidden), b = dy.shape, w_down.shape[0]  # x has no rows where w_down has no gradient
    weights = [(b, hidden), (b,), (hidden, b), (hidden,)] if need_dweights else [(0,)] * 4
    norm = [(hidden,)] * 2 if need_dnorm else [(0,)] * 2
    return (
        _like(x, rows, hidden) if need_dx else _like(x, 0),
        _like(x, rows, hidden) if need_dresidual else _like(x, 0),
        *(_grad(x, *shape) for shape in weights),
        *(_grad(x, *shape) for shape in norm),
    )


@_fake("bottleneck_rows_forward")
def _(
    x, residual, rows, w_down, b_down, w_up, b_up, scale_vectors, norm_weights, norm_biases, activations, scales,
    skips, swaps, eps, dropout_p, seed, save,
):  # fmt: skip
    if not save:
        return torch.empty_like(x), _like(x, 0), _like(x, 0)
    widest = max((w.shape[0] for w in w_down if w is not None), default=0)
    return torch.empty_like(x), _like(x, x.shape[0], widest), torch.empty_like(x)


@_fake("bottleneck_rows_backward")
def _(
    dy, x, residual, z, s, rows, w_down, w_up, scale_vectors, norm_weights, activations, scales, skips, swaps, eps,
    dropout_p, seed, need_dx, need_dresidual, need_dweights, need_dnorm,
):  # fmt: skip
    hidden = dy.shape[1]
    weights: list[list[Tensor]] = [[], [], [], []]
    norms: list[list[Tensor]] = [[], []]
    for w, wanted, norm in zip(w_down, need_dweights, need_dnorm, strict=True):
        b = w.shape[0] if wanted and w is not None else 0
        for grads, shape in zip(weights, [(b, hidden), (b,), (hidden, b), (hidden,)], strict=True):
            grads.append(_grad(dy, *(shape if b else (0,))))
        for grads in norms:
            grads.append(_grad(dy, hidden if norm else 0))
    return (
        torch.empty_like(dy) if need_dx else _like(dy, 0),
        torch.empty_like(dy) if need_dresidual else _like(dy, 0),
        *weights,
        *norms,
    )


@_fake("add_norm_forward")
def _(x, residual, norm_weight, norm_bias, eps, dropout_p, seed, save):
    return torch.empty_like(x), torch.empty_like(x) if save else _like(x, 0)


@_fake("add_norm_backward")
def _(dy, ds, s, norm_weight, eps, dropout_p, seed, need_dx, need_dresidual, need_dnorm):
    norm = (s.shape[1],) if need_dnorm else (0,)
    return (
        torch.empty_like(s) if need_dx else _like(s, 0),
        torch.empty_like(s) if need_dresidual else _like(s, 0),
        _grad(s, *norm),
        _grad(s, *norm),
    )


@_fake("linear_forward")
def _(x, weights, biases, activation, dropout_p, seed, save):
    y = _like(x, x.shape[0], sum(w.shape[0] for w in weights))
    if not save or activation == "none":
        return y, _like(x, 0)
    return y, torch.empty_like(y, dtype=torch.uint8 if derivative_in_a_byte(x, activation) else None)


@_fake("linear_backward")
def _(dy, z, weights, activation, dropout_p, seed, need_dx, need_dbias):
    return (
        _like(dy, dy.shape[0], weights[0].shape[1]) if need_dx else _like(dy, 0),
        _grad(dy, dy.shape[1]) if need_dbias else _grad(dy, 0),
    )


def lora_offsets(ranks: Sequence[int], slots: Sequence[int]) -> tuple[list[int], int]:
    """Column of s at which each LoRA's part begins, and how many columns s has."""
    used: dict[int, int] = {}
    offsets = []
    for rank, slot in zip(ranks, slots, strict=True):
        offsets.append(used.get(slot, 0))
        used[slot] = offsets[-1] + rank
    return offsets, max(used.values()) if used else 0


@_fake("lora_forward")
def _(
    x, weights, biases, a, b, scales, owners, slots, rows, lora_p, lora_seeds, activation, dropout_p, seed, save,
):  # fmt: skip
    y = _like(x, x.shape[0], sum(w.shape[0] for w in weights))
    if not save:
        return y, _like(x, 0), _like(x, 0)
    s = _like(x, x.shape[0], lora_offsets([m.shape[0] for m in a], slots)[1])
    if activation == "none":
        return y, _like(x, 0), s
    return y, torch.empty_like(y, dtype=torch.uint8 if derivative_in_a_byte(x, activation) else None), s


@_fake("lora_backward")
def _(
    dy, x, z, s, weights, slot_count, a, b, scales, owners, slots, rows, lora_p, lora_seeds, activation, dropout_p,
    seed, need_dx, need_dbias, need_dlora,
):  # fmt: skip
    return (
        _like(dy, dy.shape[0], weights[0].shape[1]) if need_dx else _like(dy, 0),
        _grad(dy, slot_count, dy.shape[1]) if need_dbias else _grad(dy, 0),
        [_grad(dy, *m.shape) for m in a] if need_dlora else [],
        [_grad(dy, *m.shape) for m in b] if need_dlora else [],
    )


@_fake("mix_forward")
def _(sigma, t, shift, count, dropout_p, seed):
    return torch.empty_like(t)


@_fake("mix_backward")
def _(dm, sigma, t, shift, count, dropout_p, seed):
    return torch.empty_like(sigma), torch.empty_like(t), _like(t, 0) if shift is None else torch.empty_like(shift)


@_fake("drop")
def _(x, dropout_p, seed):
    return torch.empty_like(x)


@_fake("attention_forward")
def _(qkv, prefix, mask, heads, scale, dropout_p, seed, save):
    batch, length, width = qkv.shape
    return _like(qkv, batch, length, width // 3), _grad(qkv, batch, heads, length) if save else _grad(qkv, 0)


@_fake("attention_backward")
def _(dout, qkv, prefix, mask, lse, heads, scale, dropout_p, seed):
    return torch.empty_like(qkv), _grad(qkv, *prefix.shape) if prefix is not None else _grad(qkv, 0)


# -- the CUDA C++ kernels' ops -----------------------------------------------------------------------------------

# The same schemas under a name of their own: a dispatch key holds one kernel an op, and Triton's holds these ops' CUDA
# key. So both backends are nodes of a compiled graph, and dispatch.py picks between them before there is one.
CUDA_OPS = ("bottleneck_forward", "add_norm_forward", "remerge_")
cuda_library = torch.library.Library("fastadapt_cuda", "DEF")


def _define_for_cuda(name: str) -> None:
    op = getattr(torch.ops.fastadapt, name).default
    cuda_library.define(str(op._schema).removeprefix("fastadapt::"))
    if name != "remerge_":  # never part of a graph
        torch.library.register_fake(f"fastadapt_cuda::{name}", op, lib=cuda_library)


for _name in CUDA_OPS:
    _define_for_cuda(_name)
