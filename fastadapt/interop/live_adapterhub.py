"""The fused sublayers in a live model of AdapterHub's library: its modules, parameters and calls stay its own.

A sublayer looks at the library's active setup in every forward. One adapter, or a Fuse, runs fused: bottleneck
adapters and fusions as parts whose parameters are the library's own objects, prefixes in the attention. Where anything
else is active, a LoRA too, the library's forward runs as it was, and ``fa.explain`` says why.
"""

from __future__ import annotations

import sys
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
from fastadapt.modules.sublayers import FusedIntermediate, FusedOutput, FusedSelfAttention, FusedSublayer, Op

_FUSED: dict[type, type] = {}  # a class in a model of the library's -> that class fused


def prepare(wiring: Wiring, base: nn.Module) -> None:
    """Give every sublayer that AdapterHub's library has changed, if it has, its fused class."""
    if "adapters" not in sys.modules:
        return
    from adapters.methods.lora import LoRALinearTorch

    reads_as(LoRALinearTorch, nn.Linear)  # the mixins below refuse where a LoRA is active in one
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
        names, fuse, reason = _setup(self)
        if reason is not None:
            return reason
        active = Active()
        reason = self._look_at_linears(names) or self._look_here(active, names, fuse)
        if reason is None and (active.site is not None or active.prefix is not None):
            self.__dict__["active"] = active
        return reason

    def _look_here(self, active: Active, names: tuple[str, ...], fuse: bool) -> str | None:
        return None

    def _look_at_linears(self, names: tuple[str, ...]) -> str | None:
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
            return f"a {type(loras[here[0]]).__name__} of AdapterHub's is active in {child}"
        return None


class HubSelfAttention(HubSublayer, FusedSelfAttention):
    """Self-attention of the library's, with its prefixes."""

    def _look_here(self, active: Active, names: tuple[str, ...], fuse: bool) -> str | None:
        from adapters.context import ForwardContext

        context = ForwardContext.get_context()
        if getattr(context, "prompt_tokens_length", None):
            return "prompt tuning is active"
        layer = self.prefix_tuning
        local = () if layer.get_active_setup() is None else names
        here = [name for name in local if name in layer.prefixes]
        if not here:
            return None
        if fuse or here[0] in layer.prefix_gates:
            return "a gated or fused prefix of AdapterHub's is active"
        if context is None or not hasattr(context, "prefix_states"):
            return None  # asked outside of a forward, as fa.explain does: nothing is computed yet
        states = context.prefix_states[here[0]][layer.location_key][layer.prefixes[here[0]]]
        dropout = layer.pool.prefix_tunings[here[0]][layer.location_key].dropout
        active.prefix = _LivePrefix(states, dropout.training and dropout.p > 0.0)
        return None


class HubIntermediate(HubSublayer, FusedIntermediate):
    """The feed-forward network's first product."""


class HubOutput(HubSublayer, FusedOutput):
    """What closes half a layer, with the library's bottleneck adapters and fusions."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if self.refusal() is not None:
            return super(FusedOutput, self).forward(hidden_states, input_tensor)
        return super().forward(hidden_states, input_tensor)

    def _look_here(self, active: Active, names: tuple[str, ...], fuse: bool) -> str | None:
        if self.get_active_setup() is None:
            return None
        here = [name for name in names if name in self.adapters]
        if not here:
            return None
        from adapters.context import ForwardContext

        context = ForwardContext.get_context()
        if getattr(context, "output_adapter_gating_scores", False):
            return "gating scores are asked for"
        if getattr(context, "output_adapter_fusion_attentions", False):
            return "the fusion's attentions are asked for"
        if not fuse:
            site = self._view(here[0])
            active.site = None if isinstance(site, str) else site
            return site if isinstance(site, str) else None
        if len(here) != len(names):
            return "a Fuse has adapters here that others lack"
        mix = self._mix(names)
        active.site = None if isinstance(mix, str) else mix
        return mix if isinstance(mix, str) else None

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


def _setup(module: nn.Module) -> tuple[tuple[str, ...], bool, str | None]:
    """(names of what is active in the whole model, whether they are fused, why that cannot run)."""
    from adapters.composition import Fuse, Stack
    from adapters.context import AdapterSetup

    config = module.adapters_config if hasattr(module, "adapters_config") else _config_of(module)
    context = AdapterSetup.get_context()
    setup = context.adapter_setup if context is not None else None if config is None else config.active_setup
    if setup is None:
        return (), False, None
    while isinstance(setup, Stack) and len(setup) == 1 and not isinstance(setup[0], str):
        setup = setup[0]
    if isinstance(setup, str):
        return (setup,), False, None
    children = tuple(setup)
    if all(isinstance(child, str) for child in children):
        if isinstance(setup, Stack) and len(children) == 1:
            return children, False, None
        if isinstance(setup, Fuse):
            return children, True, None
    return (), False, f"AdapterHub's {type(setup).__name__} is active"


def _config_of(module: nn.Module) -> Any:
    """The library's registry, as the modules inside of ``module`` know it."""
    return next((m.adapters_config for m in module._modules.values() if hasattr(m, "adapters_config")), None)
