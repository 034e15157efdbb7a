"""The fused sublayers of an encoder, as mixins over the original classes.

A mixin knows only the attributes that BERT-like code shares: ``query``, ``key``, ``value``, ``dense``, ``dropout``,
``LayerNorm``, ``intermediate_act_fn``. It computes through :mod:`fastadapt.ops` where every child is what it seems,
and calls the original forward where not. The active adaptation is a plain attribute of the instance, not a registered
child: its parameters live once, in the model's container, and copies and pickles keep the two in step.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import dispatch, ops
from fastadapt.modules.active import Active
from fastadapt.modules.bottleneck import Site, norm_alone
from fastadapt.modules.linear import lost
from fastadapt.modules.peer import PeerLoRA
from fastadapt.modules.plain import parameter, replaced
from fastadapt.modules.project import project
from fastadapt.modules.routed import Routed, Table

if TYPE_CHECKING:
    from fastadapt.modules.fusion import Fusion
    from fastadapt.modules.prefix import Prefix

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


def attention_runs_here(device: torch.device) -> bool:
    """Whether attention is the op; elsewhere it is PyTorch's own, whose kernels are as good as can be."""
    return device.type == "cpu" or dispatch.transformed()  # those have no forward-mode AD


def _dropout(module: nn.Dropout) -> float:
    return module.p if module.training else 0.0


def _asks(args: tuple[Any, ...], kwargs: dict[str, Any], passive: frozenset[str] = frozenset()) -> bool:
    """Whether an argument that is not ``passive`` asks for something."""
    return any(a is not None and a is not False for a in args) or any(
        v is not None and v is not False and k not in passive for k, v in kwargs.items()
    )


Op = tuple[str, dict[str, Any]]  # a name of fastadapt.ops, and the facts by which a backend for it is picked


class FusedSublayer:
    """What all fused sublayers share."""

    active: Active | Routed | None = None

    def refusal(self) -> str | None:
        """Why the original forward runs (or, with an adapter, the original product); None where the fused one does."""
        raise NotImplementedError

    def ops(self, length: int) -> list[Op]:
        """What runs on sequences of ``length``; ``("torch", {"function": ...})`` for what has no op."""
        raise NotImplementedError

    def _product(self, *linears: str) -> Op:
        """The op of these children as one product."""
        facts = {"features": self._modules[linears[0]].in_features}
        rank = 0 if self.active is None else self.active.rank(linears)
        peers = [m for name in linears if isinstance(m := self._modules[name], PeerLoRA)]
        rank += sum(term.a.shape[0] for m in peers for term in m.terms(0))
        return ("lora", {**facts, "rank": rank}) if rank else ("linear", facts)

    def _check_children(self) -> None:
        """Raise where the original forward, which calls the linears, would leave out what is active in them."""
        reason = lost(self._modules, self.active)
        if reason is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {reason} since an adaptation was activated there, which can't run in it; "
                "accepted is the layer as it was, or another active adaptation"
            )


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
        product = self._product("query", "key", "value")
        if not attention_runs_here(self.query.weight.device):
            return [product, ("torch", {"function": "scaled_dot_product_attention"})]
        prefix = self._prefix()
        keys = length + (0 if prefix is None else prefix.length)
        return [product, ("attention", {"head_dim": self.attention_head_size, "length": keys})]

    def _prefix(self) -> Prefix | None:
        return None if self.active is None else self.active.prefix

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        first: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original; with ``first`` [B, 1, H], position 0 of the hidden states, attention of that alone."""
        # Head masks, caches, encoder states, requested probabilities: whatever is set and not known to be passive.
        asked = _asks(args, kwargs, self._passive)
        refusal, prefix = self.refusal(), self._prefix()  # in this order: asking may settle what is active
        if asked or refusal is not None:
            self._check_children()
            if prefix is not None:
                out = self._composed(prefix, hidden_states, attention_mask, *args, **kwargs)
            else:
                out = super().forward(hidden_states, attention_mask, *args, **kwargs)
            return out if first is None else (out[0][:, :1], None)
        children = self._modules
        linears = {"query": children["query"], "key": children["key"], "value": children["value"]}
        p, scale, heads = _dropout(children["dropout"]), self.scaling, self.num_attention_heads
        if first is not None:
            q = project(first, {"query": linears.pop("query")}, self.active)
            kv = project(hidden_states, linears, self.active)
            if attention_mask is not None and not isinstance(attention_mask, Tensor):  # a batch without padding
                return attention_mask.attention_of_first(q, kv, heads, prefix, scale, p), None
            return self.of_first(q, kv, heads, prefix, attention_mask, scale, p), None
        qkv = project(hidden_states, linears, self.active)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):  # a batch without padding
            return attention_mask.attention(qkv, heads, prefix, scale, p), None
        if attention_runs_here(qkv.device):
            before = None if prefix is None else prefix(qkv.shape[0])
            return ops.attention(qkv, heads, prefix=before, mask=attention_mask, scale=scale, dropout_p=p), None
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, prefix, attention_mask, scale, p), None

    @classmethod
    def attend(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: Prefix | None,
        mask: Tensor | None,
        scale: float | None,
        p: float,
    ) -> Tensor:
        """PyTorch's attention of queries [B, heads, Q, d], as [B, Q, H]."""
        if prefix is not None:
            k, v, mask = cls.behind(prefix, k, v, mask)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    @classmethod
    def of_first(
        cls,
        q: Tensor,
        kv: Tensor,
        heads: int,
        prefix: Prefix | None,
        mask: Tensor | None,
        scale: float | None,
        p: float,
    ) -> Tensor:
        """Attention of one position [B, 1, H] to kv [B, S, 2H]: little work, whose time is that of reading kv."""
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        return cls.attend(q, k, v, prefix, None if mask is None else mask[..., :1, :], scale, p)

    @staticmethod
    def behind(prefix: Prefix, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values [B, heads, P + S, d] and mask behind those of the prefix, to which every query may attend."""
        batch, heads, _, size = k.shape
        before = prefix(batch).to(k.dtype).unflatten(-1, (heads, size)).transpose(-3, -2)  # [..., 2, heads, P, d]
        before_k, before_v = before.expand(batch, *before.shape[-4:]).unbind(1)
        if mask is not None:
            free = True if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (prefix.length, 0), value=free)
        return torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2), mask

    def _composed(
        self, prefix: Prefix, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Attention with a prefix where the fused one cannot run; the original forward knows of no prefix."""
        bound = inspect.signature(super().forward).bind(hidden_states, attention_mask, *args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        known = {*self._passive, "hidden_states", "attention_mask", "kwargs", "output_attentions", "head_mask"}
        unknown = [key for key, value in given.items() if key not in known and value is not None and value is not False]
        implementation = "eager" if self.config is None else self.config._attn_implementation
        if unknown or self.position_embedding_type != "absolute" or self.is_decoder or self.is_causal:
            reason = ", ".join(unknown) or "relative positions or causal attention"
            raise RuntimeError(f"{type(self).__name__}: a prefix is active, which can't run with {reason}")
        if implementation not in ("sdpa", "eager"):
            raise RuntimeError(f"{type(self).__name__}: a prefix is active, which can't run with {implementation}")
        heads = self.num_attention_heads
        q, k, v = (
            m(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        k, v, mask = self.behind(prefix, k, v, attention_mask)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        probabilities = self.dropout(scores.softmax(-1))
        if given.get("head_mask") is not None:
            probabilities = probabilities * given["head_mask"]
        return (probabilities @ v).transpose(1, 2).flatten(2), probabilities


class FusedIntermediate(FusedSublayer):
    """The feed-forward network's first product with its activation."""

    def refusal(self) -> str | None:
        dense = self._modules["dense"]
        if reason := replaced(dense, nn.Linear) or _trains(dense):
            return reason
        if self._activation() is None:
            return f"no op has the activation {self.intermediate_act_fn!r}"
        return None

    def _activation(self) -> str | None:
        function = self._modules.get("intermediate_act_fn")
        return activation_name(self.intermediate_act_fn if function is None else function)

    def ops(self, length: int) -> list[Op]:
        return [] if self.refusal() is not None else [self._product("dense")]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.refusal() is not None:  # asking may settle what is active
            self._check_children()
            return super().forward(hidden_states)
        dense = {"dense": self._modules["dense"]}
        return project(hidden_states, dense, self.active, activation=self._activation())


class FusedOutput(FusedSublayer):
    """Dense, dropout, the active adapter, residual and LayerNorm, as they close both halves of a layer."""

    def refusal(self) -> str | None:
        return self._dense_refusal() or replaced(self._modules["LayerNorm"], nn.LayerNorm)

    def ops(self, length: int) -> list[Op]:
        hidden = self.dense.out_features
        if isinstance(self.active, Routed):
            product = [] if self._dense_refusal() else [self._product("dense")]
            return [*product, ("bottleneck_rows", {"hidden": hidden, "bottleneck": self.active.bottleneck()})]
        site = self._site()
        if site is None and self.refusal() is not None:
            return []
        product = [] if self._dense_refusal() else [self._product("dense")]
        return [*product, *([("add_norm", {"hidden": hidden})] if site is None else site.ops(hidden))]

    def _site(self) -> Site | Fusion | None:
        site = None if self.active is None else self.active.site
        return None if site is None or site.asleep() else site

    def _dense_refusal(self) -> str | None:
        dense, dropout = self._modules["dense"], self._modules["dropout"]
        return replaced(dense, nn.Linear) or replaced(dropout, nn.Dropout) or _trains(dense)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        active, children = self.active, self._modules
        dense, dropout, norm = children["dense"], children["dropout"], children["LayerNorm"]
        routed = isinstance(active, Routed)
        site = None if routed else self._site()
        own_bias = None if routed or active is None else active.norm_bias
        refusal = self._dense_refusal()
        if not routed and site is None and own_bias is None and (refusal or replaced(norm, nn.LayerNorm)) is not None:
            self._check_children()
            return super().forward(hidden_states, input_tensor)
        if refusal is None:
            f = project(hidden_states, {"dense": dense}, active, dropout_p=_dropout(dropout))
        else:
            self._check_children()
            f = dropout(dense(hidden_states))
        if routed:
            return active.close(f, input_tensor, norm)
        if site is not None and site.rows() is not None:  # some rows go without their adapter in this forward
            table = Table([0] * f.shape[0], f.device, ())
            return Routed(table, [active]).close(f, input_tensor, norm)
        return self._close(site, f, input_tensor, norm, own_bias)

    def _close(
        self, site: Site | Fusion | None, f: Tensor, x: Tensor, norm: nn.Module, own_bias: Tensor | None
    ) -> Tensor:
        """Adapter, residual and LayerNorm."""
        if site is not None:
            return site(f, x, norm if site.LayerNorm is None else site.LayerNorm)
        bias = parameter(norm, "bias") if own_bias is None else own_bias
        return ops.add_norm(f, x, parameter(norm, "weight"), bias, eps=norm.eps)


class _Read(threading.local):
    """Of the forward that a thread runs: the layer of which position 0 alone is read, and whether it was called."""

    layer: nn.Module | None = None
    called: bool = False


_read = _Read()


@contextmanager
def first_alone(layer: nn.Module | None) -> Iterator[_Read]:
    """While the context lasts, position 0 alone is read of that layer, and it gives [B, 1, H]."""
    before = _read.layer
    _read.layer, _read.called = layer, False
    try:
        yield _read
    finally:
        _read.layer = before


class FusedLayer:
    """One layer, which calls its sublayers itself where the original does nothing else.

    The original looks at the signature of its feed-forward half in every call, and passes through a module that only
    calls two others: a quarter of what a small batch's layer spends in Python.
    """

    attention_class: type[nn.Module]  # what holds a layer's attention and its output
    returns_tuple: bool  # (output, attention probabilities), or the output alone: the installed transformers' way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _read.layer is self:
            _read.called = True
            kwargs["first_alone"] = True  # an argument: a checkpoint that runs the layer again gives it the same
        return super().__call__(*args, **kwargs)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, first_alone: bool = False, **kwargs: Any
    ) -> Any:
        own, children = self.__dict__, self._modules
        attention = children["attention"]
        if (
            _asks(args, kwargs)
            or own.get("chunk_size_feed_forward")
            or own.get("is_decoder")
            or "feed_forward_chunk" in own
            or replaced(attention, self.attention_class) is not None
        ):
            out = super().forward(hidden_states, attention_mask, *args, **kwargs)
            return out if not first_alone else (out[0][:, :1], *out[1:]) if self.returns_tuple else out[:, :1]
        halves = attention._modules
        if first_alone:
            padded = attention_mask is None or isinstance(attention_mask, Tensor)
            first = hidden_states[:, :1].contiguous() if padded else attention_mask.first(hidden_states)
            context, probabilities = halves["self"](hidden_states, attention_mask=attention_mask, first=first)
            hidden_states = first
        else:
            context, probabilities = halves["self"](hidden_states, attention_mask=attention_mask)
        x = halves["output"](context, hidden_states)
        y = children["output"](children["intermediate"](x), x)
        return (y, probabilities) if self.returns_tuple else y


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

    def refusal(self) -> str | None:
        if self.active is None and self.weight.requires_grad and torch.is_grad_enabled():
            return "its weight requires a gradient"
        return None

    def ops(self, length: int) -> list[Op]:
        if self.refusal() is not None:
            return []
        if self.weight.device.type == "cpu":
            return [("add_norm", {"hidden": self.normalized_shape[0]})]
        return [("torch", {"function": "layer_norm"})]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.refusal() is not None:
            return super().forward(hidden_states)
        if isinstance(self.active, Routed):
            return self.active.norm(hidden_states, self)
        weight, bias = self.weight, self.bias
        if self.active is not None and self.active.site is not None and not self.active.site.asleep():
            weight, bias = self.active.site.LayerNorm.weight, self.active.site.LayerNorm.bias
        elif self.active is not None and self.active.norm_bias is not None:
            bias = self.active.norm_bias
        return norm_alone(hidden_states, weight, bias, self.eps)


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
