"""Checks of a configuration's fields."""

from __future__ import annotations

import sys
from typing import Any


def choice(field: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``accepted``; by type as well, because 1 == True."""
    if not any(type(value) is type(a) and value == a for a in accepted):
        raise ValueError(f"{field}: got {value!r}; accepted are {', '.join(map(repr, accepted))}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(
    field: str, value: Any, least: float | None = None, *, above: float | None = None, accepted: str | None = None
) -> None:
    """Raise unless ``value`` is a finite number, of at least ``least`` or above ``above`` where these are given.

    ``accepted`` is what the error says instead, for a field that takes other things as well.
    """
    if accepted is None:
        bound = "" if least is None else f" of at least {least}"
        accepted = "is a finite number" + (bound if above is None else f" above {above}")
    else:
        accepted = f"are {accepted}"
    if not is_number(value):
        raise TypeError(f"{field}: got {value!r}; accepted {accepted}")
    # Asked so that NaN is refused, and an int that no float holds.
    held = abs(value) <= sys.float_info.max
    if not held or (least is not None and value < least) or (above is not None and value <= above):
        raise ValueError(f"{field}: got {value!r}; accepted {accepted}")


def several(field: str, value: Any, accepted: str) -> tuple[Any, ...]:
    """``value`` as a tuple, a string alone as one of one; raises ``TypeError`` for what is no list."""
    if isinstance(value, str):
        return (value,)
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{field}: got {value!r}; accepted are {accepted}") from None


def different(values: tuple[Any, ...]) -> bool:
    """Whether all are strings, and each there once."""
    return all(isinstance(v, str) for v in values) and len(set(values)) == len(values)


def positive(field: str, value: Any) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: got {value!r}; accepted is an int of at least 1")
    if value < 1:
        raise ValueError(f"{field}: got {value}; accepted is an int of at least 1")


def layer_numbers(field: str, value: Any) -> tuple[int, ...]:
    """``value`` as sorted layer numbers, each once; raises for what are none."""
    try:
        layers = tuple(value)
    except TypeError:
        raise TypeError(f"{field}: got {value!r}; accepted is a list of layer numbers") from None
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers):
        raise ValueError(f"{field}: got {value!r}; accepted are layer numbers counted from 0")
    return tuple(sorted(set(layers)))
