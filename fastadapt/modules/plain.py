"""Whether a child module is what its class says, so that its parameters may be read instead of calling it."""

from __future__ import annotations

from torch import nn


def replaced(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``module`` cannot be read as a plain ``kind``; None where it can.

    A subclass (an adapted, quantised or parametrised layer), a patched ``forward`` and hooks all do something that
    reading the parameters would leave out.
    """
    if type(module) is not kind:
        return f"{type(module).__name__} stands in place of {kind.__name__}"
    if "forward" in module.__dict__:
        return f"the forward of its {kind.__name__} is patched"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"its {kind.__name__} has hooks"
    if kind is nn.LayerNorm and (module.bias is None or len(module.normalized_shape) != 1):
        return "its LayerNorm has no bias, or spans several dimensions"
    return None
