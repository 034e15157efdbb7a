"""The fused sublayers of an encoder, as mixins over the original classes.

A mixin knows only the attributes that BERT-like code shares: ``query``, ``key``, ``value``, ``dense``, ``dropout``,
``LayerNorm``, ``intermediate_act_fn``. It computes through :mod:`fastadapt.ops` where every child is what it seems,
and calls the original forward where not. The active adaptation is a plain attribute of the instance, not a registered
child: its parameters live once, in the model's container, and copies and pickles keep the two in step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import ops
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.plain import replaced

_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "none",
}


def name_activation(kind: type[nn.Module], name: str) -> None:
    """Let instances of ``kind`` run as the op's activation ``name``."""
    _ACTIVATIONS[kind] = name


def activation_name(function: Any) -> str | None:
    """The op's name of an activation module; None where it has none."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_new"
    return _ACTIVATIONS.get(type(function))


def _trains(*linears: nn.Linear) -> str | None:
    if torch.is_grad_enabled():
        for m in linears:
            if m.weight.requires_grad:
                return "its weight requires a gradient"
    return None


def _dropout(module: nn.Dropout) -> float:
    return module.p if module.training else 0.0


Op = tuple[str, dict[str, Any]]  # a name of fastadapt.ops, and the facts by which a backend for it is picked


class FusedSublayer:
    """What all fused sublayers share."""

    def refusal(self) -> str | None:
        """Why the original forward runs (or, with an adapter, the original product); None where the fused one does."""
        raise NotImplementedError

    def ops(self, length: int) -> list[Op]:
        """What runs on sequences of ``length``; ``("torch", {"function": ...})`` for what has no op."""
        raise NotImplementedError


class FusedSelfAttention(FusedSublayer):
    """Query, key and value as one product, then attention without a probability matrix in memory."""

    # What some versions of the original class set on the instance, and others have no need of.
    config: Any = None
    is_causal: bool = False
    scaling: float | None = None
    position_embedding_type: str = "absolute"

    # Keyword arguments of the original forward that change nothing about what is computed here.
    _passive = frozenset(
        {"position_ids", "cache_position", "output_hidden_states", "return_dict", "num_items_in_batch"}
    )

    def refusal(self) -> str | None:
        children = self._modules  # read directly: these lines run in every forward
        q, k, v = children["query"], children["key"], children["value"]
        reason = replaced(q, nn.Linear) or replaced(k, nn.Linear) or replaced(v, nn.Linear)
        if reason := reason or replaced(children["dropout"], nn.Dropout) or _trains(q, k, v):
            return reason
        if self.position_embedding_type != "absolute":
            return f"position embeddings are {self.position_embedding_type}"
        if self.is_decoder or self.is_causal:
            return "the model is a decoder"
        config = self.config
        if config is not None:
            if config._attn_implementation not in ("sdpa", "eager"):
                return f"the attention implementation is {config._attn_implementation}"
            if config.output_attentions:
                return "attention probabilities are asked for"
        return None

    def ops(self, length: int) -> list[Op]:
        if self.refusal() is not None:
            return []
        product: Op = ("linear", {"features": self.query.in_features})
        if self.query.weight.device.type != "cpu":
            return [product, ("torch", {"function": "scaled_dot_product_attention"})]
        return [product, ("attention", {"head_dim": self.attention_head_size, "length": length})]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # Head masks, caches, encoder states, requested probabilities: whatever is set and not known to be passive.
        asked = any(a is not None and a is not False for a in args) or any(
            v is not None and v is not False and k not in self._passive for k, v in kwargs.items()
        )
        if asked or self.refusal() is not None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        q, k, v = self.query, self.key, self.value
        qkv = ops.linear(hidden_states, [q.weight, k.weight, v.weight], [q.bias, k.bias, v.bias])
        p, scale, heads = _dropout(self.dropout), self.scaling, self.num_attention_heads
        if qkv.device.type == "cpu":
            return ops.attention(qkv, heads, mask=attention_mask, scale=scale, dropout_p=p), None
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=p, scale=scale)
        return out.transpose(1, 2).reshape(batch, length, -1), None


class FusedIntermediate(FusedSublayer):
    """The feed-forward network's first product with its activation."""

    def refusal(self) -> str | None:
        dense = self._modules["dense"]
        if reason := replaced(dense, nn.Linear) or _trains(dense):
            return reason
        if activation_name(self.intermediate_act_fn) is None:
            return f"no op has the activation {self.intermediate_act_fn!r}"
        return None

    def ops(self, length: int) -> list[Op]:
        return [] if self.refusal() is not None else [("linear", {"features": self.dense.in_features})]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.refusal() is not None:
            return super().forward(hidden_states)
        dense, activation = self.dense, activation_name(self.intermediate_act_fn)
        return ops.linear(hidden_states, dense.weight, dense.bias, activation=activation)


class FusedOutput(FusedSublayer):
    """Dense, dropout, the active adapter, residual and LayerNorm, as they close both halves of a layer."""

    active_site: Site | None = None

    def refusal(self) -> str | None:
        return self._dense_refusal() or replaced(self.LayerNorm, nn.LayerNorm)

    def ops(self, length: int) -> list[Op]:
        site, hidden = self.active_site, self.dense.out_features
        if site is None and self.refusal() is not None:
            return []
        product: list[Op] = [] if self._dense_refusal() else [("linear", {"features": self.dense.in_features})]
        if site is None or site.down is None:
            return [*product, ("add_norm", {"hidden": hidden})]
        return [*product, ("bottleneck", {"hidden": hidden, "bottleneck": site.down.out_features})]

    def _dense_refusal(self) -> str | None:
        dense, dropout = self._modules["dense"], self._modules["dropout"]
        return replaced(dense, nn.Linear) or replaced(dropout, nn.Dropout) or _trains(dense)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        site = self.active_site
        if site is None and self.refusal() is not None:
            return super().forward(hidden_states, input_tensor)
        if self._dense_refusal() is None:
            dense = self.dense
            f = ops.linear(hidden_states, dense.weight, dense.bias, dropout_p=_dropout(self.dropout))
        else:
            f = self.dropout(self.dense(hidden_states))
        norm = self.LayerNorm if site is None or site.LayerNorm is None else site.LayerNorm
        if site is not None and site.down is not None:
            return site(f, input_tensor, norm)
        return ops.add_norm(f, input_tensor, norm.weight, norm.bias, eps=norm.eps)


class FusedEmbeddings(FusedSublayer):
    """The embeddings, whose output can begin the graph of a reentrant checkpoint.

    Such a checkpoint records nothing unless one of its inputs requires a gradient, and the output of frozen embeddings
    does not. So it is made to, and only then: without a checkpoint it would cost a backward through the first layer.
    """

    first_layer: nn.Module | None = None
    adapted: bool | None = None  # None: no adaptation was ever put here; False: none is active

    def refusal(self) -> str | None:
        return None

    def ops(self, length: int) -> list[Op]:
        return [("torch", {"function": "embedding"})]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(*args, **kwargs)
        checkpointed = self.adapted and self.training and getattr(self.first_layer, "gradient_checkpointing", False)
        if checkpointed and torch.is_grad_enabled() and not out.requires_grad:
            out = out.detach().requires_grad_()
        return out


class FusedNorm(FusedSublayer, nn.LayerNorm):
    """A LayerNorm that stands alone (the embeddings'), with the active adaptation's weights where it owns some."""

    active_site: Site | None = None

    def refusal(self) -> str | None:
        return None

    def ops(self, length: int) -> list[Op]:
        return [("torch", {"function": "layer_norm"})]

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm = self if self.active_site is None else self.active_site.LayerNorm
        return F.layer_norm(hidden_states, self.normalized_shape, norm.weight, norm.bias, self.eps)


class FusedDropout(FusedSublayer, nn.Dropout):
    """A dropout that stands alone (the embeddings'); on a CPU its mask comes from a counter, in parallel."""

    def refusal(self) -> str | None:
        return None

    def ops(self, length: int) -> list[Op]:
        return [("torch", {"function": "dropout"})] if self.training else []

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace or input.device.type != "cpu":
            return super().forward(input)
        return ops.drop(input, self.p)
