"""The fused sublayers in a live model of AdapterHub's library: its modules, parameters and calls stay its own.

A sublayer looks at the library's active setup in every forward. One adapter, a Fuse, or a BatchSplit runs fused:
bottleneck adapters and fusions as parts whose parameters are the library's own objects, LoRAs in the products, prefixes
in the attention. Where anything else is active, the library's forward runs as it was, and ``fa.explain`` says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import dispatch
from fastadapt.config import FusionConfig
from fastadapt.interop import hub_bottleneck, hub_fusion
from fastadapt.models.methods.fusion import mixable
from fastadapt.models.wiring import Wiring
from fastadapt.modules.active import Active
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.fusion import Fusion
from fastadapt.modules.plain import reads_as
from fastadapt.modules.routed import Routed, Table
from fastadapt.modules.sublayers import FusedIntermediate, FusedOutput, FusedSelfAttention, FusedSublayer, Op

_FUSED: dict[type, type] = {}  # a class in a model of the library's -> that class fused


def prepare(wiring: Wiring, base: nn.Module) -> None:
    """Give every sublayer that AdapterHub's library has changed, if it has, its fused class."""
    if "adapters" not in sys.modules:
        return
    from adapters.methods.lora import LoRALinearTorch

    reads_as(LoRALinearTorch, nn.Linear)  # the mixins below add what is active in one, or refuse
    hub = {wiring.attention: HubSelfAttention, wiring.attention_output: HubOutput,
           wiring.intermediate: HubIntermediate, wiring.output: HubOutput}  # fmt: skip
    for path, module in wiring.sublayers(base):
        mixin = next((m for part, m in hub.items() if path.startswith(wiring.layers) and _ends(path, part)), None)
        kind = type(module)
        linears = [m for m in module._modules.values() if isinstance(m, LoRALinearTorch)]
        foreign = kind.__module__.startswith("adapters.") or linears
        known = next((c for c in kind.__mro__ if c in wiring.fused), None)
        if mixin is None or not foreign or known is None or issubclass(kind, FusedSublayer):
            continue
        if kind not in _FUSED:
            fused = type(f"Hub{wiring.fused[known].__name__}", (mixin, wiring.fused[known], kind), {})
            _FUSED[kind] = fused
            wiring.original[fused] = kind
        module.__class__ = _FUSED[kind]


def _ends(path: str, part: str) -> bool:
    return path.split(".", 3)[-1] == part if path.count(".") >= 3 else False


class _LivePrefix:
    """One of the library's prefixes, which it has computed for the running forward already."""

    def __init__(self, states: Tensor, dropped: bool) -> None:
        self.states, self.dropped = states, dropped  # [2, B, heads, P, d]; whether its rows differ
        self.length = states.shape[3]

    def __call__(self, batch: int) -> Tensor:
        if not self.dropped:
            return self.states[:, 0].transpose(1, 2).flatten(2)  # [2, P, H]
        return self.states.permute(1, 0, 3, 2, 4).flatten(3)  # [B, 2, P, H]


class _LiveLoRA:
    """One of the library's LoRAs, read at every forward."""

    lora_magnitude_vector = None

    def __init__(self, lora: nn.Module) -> None:
        self.lora, self.rank, self.scale = lora, lora.r, lora.scaling

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora.lora_A, self.lora.lora_B

    def dropout_p(self) -> float:
        dropout = self.lora.lora_dropout
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class HubSublayer(FusedSublayer):
    """Mixin before a fused class: what is active is read from the library's setup, in every forward."""

    foreign = True

    def refusal(self) -> str | None:
        return self._look() or super().refusal()

    def ops(self, length: int) -> list[Op]:
        return [] if self.refusal() is not None else super().ops(length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "active": None}  # of one forward, and a tensor with a graph has no copy

    def _check_children(self) -> None:
        """The library's own forward applies what is active in its linears."""

    def _look(self) -> str | None:
        """Set what is active; why this sublayer can't run it, or None."""
        self.__dict__["active"] = None
        names, block, reason = _setup(self)
        if reason is not None or not names:
            return reason or self._look_at_linears((), None, ())
        actives = [Active() for _ in names]
        reason = self._look_at_linears(names, block, actives) or self._look_here(names, block, actives)
        if reason is None and any(a.site is not None or a.prefix is not None or a.loras for a in actives):
            sizes = getattr(block, "batch_sizes", None)
            place = next(self.parameters()).device
            self.__dict__["active"] = actives[0] if sizes is None else Routed(_table(tuple(sizes), place), actives)
        return reason

    def _look_here(self, names: tuple[str, ...], block: Any, actives: Sequence[Active]) -> str | None:
        """Put what the library has here, but for its linears, into ``actives``: one a name, a Fuse's in the first."""
        return None

    def _look_at_linears(self, names: tuple[str, ...], block: Any, actives: Sequence[Active]) -> str | None:
        from adapters.composition import Fuse

        seen = self.__dict__.setdefault("_merged", {})
        for child, linear in self._modules.items():
            loras = getattr(linear, "loras", None)
            if loras is None:
                continue
            if seen.get(child, False) != linear.merged:
                # It writes merged weights through .data, which no version counter shows.
                dispatch.forget([linear.weight])
                seen[child] = linear.merged
            local = () if linear.merged or linear.get_active_setup() is None else names
            here = [name for name in local if name in loras]
            if not here:
                continue
            if isinstance(block, Fuse) or len(here) != len(names):
                return f"a {type(block).__name__} of AdapterHub's has {', '.join(here)} in {child}"
            for name, active in zip(names, actives, strict=True):
                if reason := _unread(loras[name]):
                    return f"{reason} of AdapterHub's is active in {child}"
                active.loras[child] = [_LiveLoRA(loras[name])]
        return None


class HubSelfAttention(HubSublayer, FusedSelfAttention):
    """Self-attention of the library's, with its prefixes."""

    def _look_here(self, names: tuple[str, ...], block: Any, actives: Sequence[Active]) -> str | None:
        from adapters.context import ForwardContext

        context = ForwardContext.get_context()
        if getattr(context, "prompt_tokens_length", None):
            return "prompt tuning is active"
        layer = self.prefix_tuning
        local = () if layer.get_active_setup() is None else names
        here = [name for name in local if name in layer.prefixes]
        if not here:
            return None
        if block is not None or here[0] in layer.prefix_gates:
            return "a prefix of AdapterHub's is active that is gated, or one of several"
        if context is None or not hasattr(context, "prefix_states"):
            return None  # asked outside of a forward, as fa.explain does: nothing is computed yet
        states = context.prefix_states[here[0]][layer.location_key][layer.prefixes[here[0]]]
        dropout = layer.pool.prefix_tunings[here[0]][layer.location_key].dropout
        actives[0].prefix = _LivePrefix(states, dropout.training and dropout.p > 0.0)
        return None


class HubIntermediate(HubSublayer, FusedIntermediate):
    """The feed-forward network's first product."""


class HubOutput(HubSublayer, FusedOutput):
    """What closes half a layer, with the library's bottleneck adapters and fusions."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if self.refusal() is not None:
            return super(FusedOutput, self).forward(hidden_states, input_tensor)
        if isinstance(self.active, Routed) and len(self.active.table.slots) != hidden_states.shape[0]:
            given, rows = len(self.active.table.slots), hidden_states.shape[0]
            raise IndexError(f"batch_sizes: of the active BatchSplit sum to {given}; accepted is {rows}, the batch's")
        return super().forward(hidden_states, input_tensor)

    def _look(self) -> str | None:
        self._drop_deleted()
        return super()._look()

    def _drop_deleted(self) -> None:
        """Keep no view of what the library has deleted, or replaced under its name: it would stay in memory."""
        views, mixes = (self.__dict__.get(kept, {}) for kept in ("_views", "_mixes"))
        gone = {name for name, (adapter, _) in views.items() if self.adapters._modules.get(name) is not adapter}
        for name in gone:
            del views[name]
        for key, (layer, _) in list(mixes.items()):
            if self.adapter_fusion_layer._modules.get(key) is not layer or not gone.isdisjoint(key.split(",")):
                del mixes[key]

    def _look_here(self, names: tuple[str, ...], block: Any, actives: Sequence[Active]) -> str | None:
        if self.get_active_setup() is None:
            return None
        here = [name for name in names if name in self.adapters]
        if not here:
            return None
        from adapters.composition import Fuse
        from adapters.context import ForwardContext

        context = ForwardContext.get_context()
        if getattr(context, "output_adapter_gating_scores", False):
            return "gating scores are asked for"
        if getattr(context, "output_adapter_fusion_attentions", False):
            return "the fusion's attentions are asked for"
        if len(here) != len(names):
            return f"a {type(block).__name__} has adapters here that others lack"
        found = [self._mix(names)] if isinstance(block, Fuse) else [self._view(name) for name in names]
        for active, site in zip(actives, found, strict=False):
            if isinstance(site, str):
                return site
            active.site = site
        if not isinstance(block, Fuse) and len({_sum_of(site.config) for site in found}) > 1:
            return "the adapters of a BatchSplit differ in where residual and LayerNorm stand"
        return None

    def _view(self, name: str) -> Site | str:
        """The library's adapter as a part that has its parameters; or why there is none."""
        adapter = self.adapters[name]
        views = self.__dict__.setdefault("_views", {})
        known = views.get(name)
        if known is None or known[0] is not adapter or known[1].up.weight is not adapter.adapter_up.weight:
            try:
                options = {"version": "", "has_invertible": False, "keys": ()}
                config = hub_bottleneck.from_hub(self._config_of(name).to_dict(), **options)
            except ValueError as error:
                return str(error).removeprefix("path: its ")
            up = adapter.adapter_up.weight
            site = Site(config, up.shape[0], up.shape[1], None, device=torch.device("meta"), dtype=up.dtype)
            for ours, theirs in hub_bottleneck.names_of(site).items():
                _share(site, ours, adapter.get_parameter(theirs[0]))
            known = views[name] = (adapter, site)
        known[1].training = adapter.training
        return known[1]

    def _config_of(self, name: str) -> Any:
        from adapters.configuration import BnConfig

        return self.adapters_config.match(name, BnConfig, self.layer_idx, self.location_key)

    def _mix(self, names: tuple[str, ...]) -> Fusion | str:
        """The library's fusion as a part that has its parameters; or why there is none."""
        key = ",".join(names)
        if key not in self.adapter_fusion_layer:
            return f"there is no fusion of {key}"
        layer = self.adapter_fusion_layer[key]
        sites = [self._view(name) for name in names]
        unfit = next((s for s in sites if isinstance(s, str)), None)
        if unfit is not None:
            return unfit
        reason = mixable({name: (site.config, site) for name, site in zip(names, sites, strict=True)}, "")
        if reason is not None:
            return reason
        views = self.__dict__.setdefault("_mixes", {})
        known = views.get(key)
        if known is None or known[0] is not layer or known[1].sites != sites:
            try:
                config: FusionConfig = hub_fusion.from_hub(layer.config.to_dict(), key)
            except ValueError as error:
                return str(error).removeprefix("path: its ")
            hidden, dtype = sites[0].up.weight.shape[0], sites[0].up.weight.dtype
            mix = Fusion(config, hidden, layer.dropout.p, sites, device=torch.device("meta"), dtype=dtype)
            for ours, _ in list(mix.named_parameters()):
                _share(mix, ours, layer.get_parameter(ours))
            known = views[key] = (layer, mix)
        known[1].training = layer.training
        return known[1]


def _share(part: nn.Module, key: str, parameter: nn.Parameter) -> None:
    owner, _, name = key.rpartition(".")
    part.get_submodule(owner)._parameters[name] = parameter


def _unread(lora: nn.Module) -> str | None:
    """What a LoRA of the library's is, where it can't be read."""
    from adapters.methods.lora import LoRA

    if type(lora) is not LoRA:
        return f"a {type(lora).__name__}"
    return "a gated LoRA" if lora.use_gating else "a DoRA" if lora.use_dora else None


def _sum_of(config: Any) -> tuple[Any, ...]:
    """What the library takes from the first or the last adapter of a BatchSplit, for all of its rows."""
    return config.parallel, config.original_ln_before, config.residual_before_ln, config.original_ln_after


@lru_cache(maxsize=16)
def _table(sizes: tuple[int, ...], device: torch.device) -> Table:
    """The rows of a BatchSplit; as good for training as for inference."""
    with torch.inference_mode(False):
        return Table([slot for slot, size in enumerate(sizes) for _ in range(size)], device, ())


def _setup(module: nn.Module) -> tuple[tuple[str, ...], Any, str | None]:
    """(names of what is active in the whole model, the Fuse or BatchSplit of them, why that cannot run)."""
    from adapters.composition import BatchSplit, Fuse, Stack
    from adapters.context import AdapterSetup

    config = module.adapters_config if hasattr(module, "adapters_config") else _config_of(module)
    context = AdapterSetup.get_context()
    setup = context.adapter_setup if context is not None else None if config is None else config.active_setup
    if setup is None:
        return (), None, None
    while isinstance(setup, Stack) and len(setup) == 1 and not isinstance(setup[0], str):
        setup = setup[0]
    if isinstance(setup, str):
        return (setup,), None, None
    children = tuple(setup)
    if all(isinstance(child, str) for child in children):
        if isinstance(setup, Stack) and len(children) == 1:
            return children, None, None
        if isinstance(setup, (Fuse, BatchSplit)):
            return children, setup, None
    return (), None, f"AdapterHub's {type(setup).__name__} is active"


def _config_of(module: nn.Module) -> Any:
    """The library's registry, as the modules inside of ``module`` know it."""
    return next((m.adapters_config for m in module._modules.values() if hasattr(m, "adapters_config")), None)
