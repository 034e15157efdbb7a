"""Which backend serves an op: one table, one picker.

A backend is a module of :mod:`fastadapt.backends` with ``refusal(op, device_type, dtype, facts) -> str | None``
(None: it can) and one function an op, of the signature in :mod:`fastadapt.ops.schemas`. It may have
``reluctance(op, device_type, facts) -> str | None``, why it should serve only where it is forced. The reference is the
op's own file. Ops ask :func:`pick`; nothing else chooses.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

BACKENDS: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")

# Fastest first; what runs on a device type without being forced.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

_MODULES = {
    "reference": "fastadapt.ops.reference",
    "cpu": "fastadapt.backends.cpu",
    "triton": "fastadapt.backends.triton",
    "cuda": "fastadapt.backends.cuda",
}
_loaded: dict[str, ModuleType | str] = {}  # the module, or why it can't be loaded
_func_transforms = torch._C._are_functorch_transforms_active


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}; accepted are {', '.join(BACKENDS)}")
    return name


_environment = os.environ.get("FASTADAPT_BACKEND") or None
_forced: str | None = _validated(_environment, "FASTADAPT_BACKEND") if _environment else None


def load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it can't be had here. Loaded at first need, once."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(_MODULES[name])
        except (ImportError, OSError) as error:
            _loaded[name] = f"{name} backend cannot be loaded: {error}"
    return _loaded[name]


def prepare() -> None:
    """Load what may be picked on this machine: code that is compiled at its first call cannot import."""
    for device_type, names in PREFERENCE.items():
        if device_type != "cuda" or torch.cuda.is_available():
            for name in names:
                load(name)


def transformed() -> bool:
    """Whether this call runs under forward-mode AD or a transform of ``torch.func``.

    A kernel would lose the tangents, and knows no batching rule: the reference's steps are PyTorch's own, which do.
    Code that is being compiled can ask for forward-mode AD alone.
    """
    return forward_ad._current_level >= 0 or (not is_compiling() and _func_transforms())


def refusal(name: str, op: str, device_type: str, dtype: torch.dtype, **facts: Any) -> str | None:
    """Why backend ``name`` can't serve this call; None where it can."""
    module = load(name)
    if isinstance(module, str):
        return module
    if name != "reference" and transformed():
        return "forward-mode AD and the transforms of torch.func are the reference's alone (fa.backend('reference'))"
    return module.refusal(op, device_type, dtype, facts)


def _unpicked(name: str, op: str, device_type: str, dtype: torch.dtype, facts: dict[str, Any]) -> str | None:
    """Why ``name`` doesn't serve this call where nobody forces it."""
    reason = refusal(name, op, device_type, dtype, **facts)
    if reason is None and hasattr(_loaded[name], "reluctance"):
        reason = _loaded[name].reluctance(op, device_type, facts)
    return reason


def serving(op: str, device_type: str, dtype: torch.dtype, **facts: Any) -> str:
    """The name of the backend that serves ``op``; raises ``RuntimeError`` where a forced one can't."""
    if _forced is not None:
        reason = refusal(_forced, op, device_type, dtype, **facts)
        if reason is not None:
            raise RuntimeError(f"backend {_forced!r} was forced but cannot run {op}: {reason}")
        return _forced
    for name in PREFERENCE.get(device_type, ("reference",)):
        if _unpicked(name, op, device_type, dtype, facts) is None:
            return name
    raise RuntimeError(f"no backend runs {op} on {device_type} in {dtype}")


def kernel(name: str, op: str) -> Callable[..., Any]:
    """Backend ``name``'s function for ``op``."""
    return getattr(load(name), op)


def pick(op: str, device_type: str, dtype: torch.dtype, **facts: Any) -> Callable[..., Any]:
    """The function that serves ``op``; raises ``RuntimeError`` where a forced backend can't."""
    return kernel(serving(op, device_type, dtype, **facts), op)


def straight(call: Callable[..., Any], x: Tensor, dropout_p: float, *arguments: Any) -> Any:
    """``call(kernels, x, *arguments)`` where a call with ``x`` may go straight to the C++ kernels, else None.

    They check what they are given, in no time, where Python's checks take as long as a small product. None too is what
    they refuse, or ``call`` does: the op's common way serves it otherwise, or says what is wrong.
    """
    kernels = native(x, dropout_p)
    if kernels is None:
        return None
    try:
        return call(kernels, x, *arguments)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def native(x: Tensor, dropout_p: float = 0.0) -> ModuleType | None:
    """The C++ kernels, where ``x`` is of an inference on a CPU without dropout and autocast that forces no other."""
    if type(dropout_p) is not float or dropout_p != 0.0:
        return None
    # Every op asks this at every call, and so these functions are looked up in no module of torch's.
    if is_grad_enabled() or is_compiling() or not isinstance(x, Tensor) or not x.is_cpu:
        return None
    if _forced not in (None, "cpu") or is_autocast_enabled("cpu") or not x.is_contiguous():
        return None
    if _func_transforms() or forward_ad._current_level >= 0:
        return None
    module = _loaded.get("cpu") or load("cpu")
    return module if isinstance(module, ModuleType) else None


def choice(op: str, device_type: str, dtype: torch.dtype, **facts: Any) -> tuple[str, dict[str, str]]:
    """(the backend that :func:`pick` takes, {each faster backend: why it was refused}); for ``fa.explain``."""
    if _forced is not None:
        reason = refusal(_forced, op, device_type, dtype, **facts)
        return (_forced, {}) if reason is None else ("none", {_forced: reason})
    refused: dict[str, str] = {}
    for name in PREFERENCE.get(device_type, ("reference",)):
        reason = _unpicked(name, op, device_type, dtype, facts)
        if reason is None:
            return name, refused
        refused[name] = reason
    return "none", refused


def forced() -> str | None:
    """The backend forced by :func:`backend` or ``FASTADAPT_BACKEND``, if any."""
    return _forced


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for the whole process while the context lasts.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: for another name.
        RuntimeError: on entry where the backend can't be loaded, and by an op that it can't serve.
    """
    global _forced
    _validated(name, "backend")
    module = load(name)
    if isinstance(module, str):
        raise RuntimeError(module)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forget(tensors: list[Tensor]) -> int:
    """Drop the packed copies that backends hold of these tensors; returns how many there were."""
    dropped = 0
    for module in _loaded.values():
        if isinstance(module, ModuleType) and hasattr(module, "forget"):
            dropped += module.forget(tensors)
    return dropped
