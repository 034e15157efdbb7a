"""Whether a child module is what its class says, so that its parameters may be read instead of calling it."""

from __future__ import annotations

from torch import Tensor, nn

_READ_AS: dict[type, type] = {}  # a class of this library -> the plain class whose parameters its instances hold


def reads_as(kind: type[nn.Module], plain: type[nn.Module]) -> None:
    """Let instances of ``kind`` be read as a ``plain``: the reader adds what they would have added.

    Where ``kind`` has a method ``refusal``, that says why one of them cannot be.
    """
    _READ_AS[kind] = plain


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """``module.name``, past nn.Module's own lookup where it lies there: these are asked for in every forward."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def replaced(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``module`` cannot be read as a plain ``kind``; None where it can.

    A subclass (an adapted, quantised or parametrised layer), a patched ``forward`` and hooks all do something that
    reading the parameters would leave out.
    """
    found = type(module)
    if found is not kind:
        if _READ_AS.get(found) is not kind:
            name = f"{found.__module__}.{found.__name__}" if found.__name__ == kind.__name__ else found.__name__
            return f"{name} stands in place of {kind.__name__}"
        if hasattr(found, "refusal") and (reason := module.refusal()):
            return reason
    if "forward" in module.__dict__:
        return f"the forward of its {kind.__name__} is patched"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"its {kind.__name__} has hooks"
    if kind is nn.LayerNorm and (module._parameters["bias"] is None or len(module.normalized_shape) != 1):
        return "its LayerNorm has no bias, or spans several dimensions"
    return None
